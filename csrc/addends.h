// What the CPU and the CUDA kernels share that add bias and residual to an image and normalize it:
// the checks of what is added up, how the residual is read, and the norm's epsilon.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"

namespace cosmos3 {

constexpr double kNormEps = 1e-12;  // that of torch.nn.functional.normalize

// The residual [B, C/t, s·H, s·W]: cells of s x s are averaged, and added to the last of each t
// channels. Both are 1 where it has the shape of x.
struct Factors {
  int64_t t = 1, s = 1;
};

inline Factors factors_of(const Tensor& x, const std::optional<Tensor>& residual) {
  Factors factors;
  if (residual.has_value()) {
    if (residual->size(1) > 0) {
      factors.t = x.size(1) / residual->size(1);
    }
    for (int64_t dim : {3, 2}) {
      if (x.size(dim) > 0) {
        factors.s = residual->size(dim) / x.size(dim);
      }
    }
  }
  return factors;
}

// Whether a parameter has an element for each channel of x, which the op calls `x_name`.
inline void check_channels(const char* op, const char* argument,
                           const std::optional<Tensor>& parameter, const Tensor& x,
                           const char* x_name = "x") {
  if (!parameter.has_value()) {
    return;
  }
  check_rank(op, argument, *parameter, 1, "[C]");
  check_dtype(op, argument, parameter->scalar_type());
  check_device(op, argument, *parameter, x_name, x);
  if (parameter->size(0) != x.size(1)) {
    fail(op, ": ", argument, " must have the C = ", x.size(1), " elements of ", x_name, ", got ",
         parameter->size(0));
  }
}

inline void check_addends(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
  check_rank(op, "x", x, 4, "[B, C, H, W]");
  check_dtype(op, "x", x.scalar_type());
  check_channels(op, "weight", weight, x);
  check_channels(op, "bias", bias, x);
  if (!residual.has_value()) {
    return;
  }
  check_rank(op, "residual", *residual, 4, "[B, C/t, s·H, s·W]");
  if (residual->scalar_type() != x.scalar_type()) {
    fail(op, ": residual must have the dtype of x, ", name(x.scalar_type()), ", got ",
         name(residual->scalar_type()));
  }
  check_device(op, "residual", *residual, "x", x);
  const Factors factors = factors_of(x, residual);
  if (residual->size(0) != x.size(0) || residual->size(1) * factors.t != x.size(1) ||
      residual->size(2) != x.size(2) * factors.s || residual->size(3) != x.size(3) * factors.s ||
      factors.t < 1 || factors.s < 1) {
    fail(op, ": residual must have shape [B, C/t, s·H, s·W] for x ", list(x.sizes()), ", got ",
         list(residual->sizes()));
  }
}

}  // namespace cosmos3
