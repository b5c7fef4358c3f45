// What the CPU and CUDA kernels of cosmos3::pack_pixels share: the checks of the arguments, where
// the pixels lie, the result's memory, and what a byte becomes.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "channels_last.h"
#include "checks.h"

namespace cosmos3 {

// [B, 3, H, W], whatever the order of its dimensions; strides in elements. Plain data, so that it
// also travels as a CUDA kernel argument.
struct Pixels {
  int64_t batch, height, width;
  int64_t sb, sc, sh, sw;
};

inline bool is_bytes(const Tensor& pixels) {
  return pixels.scalar_type() == ScalarType::Byte;
}

// Of bytes [B, H, W, 3] or floats [B, 3, H, W].
inline Pixels pixels_of(const Tensor& x) {
  const int color = is_bytes(x) ? 3 : 1, row = is_bytes(x) ? 1 : 2, column = is_bytes(x) ? 2 : 3;
  return {x.size(0),       x.size(row),   x.size(column),  x.stride(0),
          x.stride(color), x.stride(row), x.stride(column)};
}

inline void check_pixels(const Tensor& pixels, int64_t patch_size, ScalarType dtype,
                         int64_t channels) {
  const char* op = "pack_pixels";
  const bool bytes = is_bytes(pixels);
  check_rank(op, "pixels", pixels, 4, "[B, 3, H, W], or [B, H, W, 3] in uint8");
  if (!bytes && !is_supported(pixels.scalar_type())) {
    fail(op, ": pixels must be uint8, float32, bfloat16, float16 or float64, got ",
         name(pixels.scalar_type()));
  }
  if (pixels.size(bytes ? 3 : 1) != 3) {
    fail(op, ": pixels must have 3 colors in shape [B, 3, H, W], or [B, H, W, 3] in uint8, got ",
         list(pixels.sizes()));
  }
  check_dtype(op, "dtype", dtype);
  check_patch_size(op, patch_size);
  const Pixels image = pixels_of(pixels);
  if (image.height % patch_size || image.width % patch_size) {
    fail(op, ": pixels must have height and width divisible by patch_size = ", patch_size, ", got ",
         list(pixels.sizes()));
  }
  if (channels != 0 && channels < 3 * patch_size * patch_size) {
    fail(op, ": channels must be 0 or at least 3·patch_size² = ", 3 * patch_size * patch_size,
         ", got ", channels);
  }
}

// The result, of arguments that check_pixels has passed.
inline Tensor empty_patches(const Tensor& pixels, int64_t patch_size, ScalarType dtype,
                            int64_t channels) {
  const Pixels image = pixels_of(pixels);
  return allocating("pack_pixels", [&] {
    return empty_channels_last(pixels, image.batch,
                               channels ? channels : 3 * patch_size * patch_size,
                               image.height / patch_size, image.width / patch_size, dtype);
  });
}

// 2 (x / 255) - 1 in float32, as the engines normalise bytes.
C10_HOST_DEVICE inline float normalized(uint8_t byte) {
  return 2.0f * (static_cast<float>(byte) / 255.0f) - 1.0f;
}

}  // namespace cosmos3
