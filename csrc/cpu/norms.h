// The arithmetic of RMS norm and SiLU over one pixel's channels, and its parameters.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../addends.h"
#include "../dtypes.h"
#include "simd.h"

namespace cosmos3 {

constexpr int kLanes = 16;

template <typename Value>
COSMOS3_INLINE Value inverse_norm(const Value* value, int64_t channels) {
  Value partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      partial[lane] += value[i + lane] * value[i + lane];
    }
  }
  Value squares = 0;
  for (; i < channels; ++i) {
    squares += value[i] * value[i];
  }
  for (Value each : partial) {
    squares += each;
  }
  const Value norm = std::sqrt(squares), least = static_cast<Value>(kNormEps);
  return Value{1} / (norm < least ? least : norm);
}

COSMOS3_INLINE float exponential(float x) {
  return exp_approx(x);
}
COSMOS3_INLINE double exponential(double x) {
  return std::exp(x);
}

// Its elements times `factor`, or `absent`.
template <typename Value>
std::vector<Value> values_of(const std::optional<Tensor>& parameter, Value factor,
                             std::vector<Value> absent) {
  if (!parameter.has_value()) {
    return absent;
  }
  const int64_t size = parameter->size(0), stride = size > 1 ? parameter->stride(0) : 0;
  std::vector<Value> values(size);
  dispatch(parameter->scalar_type(), [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(parameter->const_data_ptr());
    for (int64_t c = 0; c < size; ++c) {
      values[c] = static_cast<Value>(data[c * stride]) * factor;
    }
  });
  return values;
}

}  // namespace cosmos3
