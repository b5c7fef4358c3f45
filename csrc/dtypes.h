// The dtypes that the ops take: choosing a template by one at run time, and converting between them
// as torch does, on the host and on a device.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace cosmos3 {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// f(T{}) for the type T of `dtype`, which check_dtype has passed.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(Half{});
  }
}

// To nearest even; float64 reaches a 16-bit type through float32.
template <typename To, typename From>
C10_HOST_DEVICE inline __attribute__((always_inline)) To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (sizeof(To) == 2 || sizeof(From) == 2) {
    return static_cast<To>(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

// What arithmetic on T is done in.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace cosmos3
