// What the CPU and CUDA kernels of cosmos3::unpack_pixels share: the checks of the arguments, the
// result's memory, and what a value becomes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "checks.h"
#include "dtypes.h"

namespace cosmos3 {

inline void check_patches(const Tensor& x, int64_t patch_size) {
  const char* op = "unpack_pixels";
  check_rank(op, "x", x, 4, "[B, 3·p², h, w]");
  check_dtype(op, "x", x.scalar_type());
  check_patch_size(op, patch_size);
  if (x.size(1) != 3 * patch_size * patch_size) {
    fail(op, ": x must have 3·patch_size² = ", 3 * patch_size * patch_size, " channels, got ",
         list(x.sizes()));
  }
}

// The result, of arguments that check_patches has passed.
inline Tensor empty_image(const Tensor& x, int64_t patch_size, bool as_bytes) {
  const int64_t batch = x.size(0), height = x.size(2) * patch_size;
  const int64_t width = x.size(3) * patch_size;
  return allocating("unpack_pixels", [&] {
    return as_bytes ? torch::stable::new_empty(x, {batch, height, width, 3}, ScalarType::Byte)
                    : torch::stable::new_empty(x, {batch, 3, height, width});
  });
}

// A NaN stays one.
template <typename T>
C10_HOST_DEVICE inline T clamped(T value) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return value < T(-1) ? T(-1) : value > T(1) ? T(1) : value;
  } else {
    return convert<T>(clamped(convert<float>(value)));
  }
}

// round(255 (x / 2 + 1/2)) in float32, halves to even; 0 for a NaN.
C10_HOST_DEVICE inline uint8_t byte_of(float value) {
  const float inside = value >= -1.0f ? (value <= 1.0f ? value : 1.0f) : -1.0f;
  return static_cast<uint8_t>(nearbyintf(255.0f * (inside * 0.5f + 0.5f)));
}

}  // namespace cosmos3
