// CPU kernel of cosmos3::pack_pixels: bytes or floats of an image to what the first convolution
// reads, in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../dtypes.h"
#include "channels_last.h"

namespace cosmos3 {
namespace {

void check_pixels(const Tensor& pixels, int64_t patch_size, ScalarType dtype, int64_t channels) {
  const char* op = "pack_pixels";
  const bool bytes = pixels.scalar_type() == ScalarType::Byte;
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
  if (patch_size < 1) {
    fail(op, ": patch_size must be at least 1, got ", patch_size);
  }
  if (pixels.size(bytes ? 1 : 2) % patch_size || pixels.size(bytes ? 2 : 3) % patch_size) {
    fail(op, ": pixels must have height and width divisible by patch_size = ", patch_size, ", got ",
         list(pixels.sizes()));
  }
  if (channels != 0 && channels < 3 * patch_size * patch_size) {
    fail(op, ": channels must be 0 or at least 3·patch_size² = ", 3 * patch_size * patch_size,
         ", got ", channels);
  }
}

// 2 (x / 255) - 1 in float32, as the engines normalise bytes.
float normalized(int byte) {
  return 2.0f * (static_cast<float>(byte) / 255.0f) - 1.0f;
}

template <typename Out, typename Read>
void pack(Tensor& out, int64_t patch, const Read& read) {
  const int64_t batch = out.size(0), channels = out.size(1), rows = out.size(2);
  const int64_t columns = out.size(3);
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      Out* at = to + line * columns * channels;
      for (int64_t x = 0; x < columns; ++x) {
        // Channels in the order of torch.nn.functional.pixel_unshuffle: color, row, column.
        for (int64_t color = 0; color < 3; ++color) {
          for (int64_t dy = 0; dy < patch; ++dy) {
            for (int64_t dx = 0; dx < patch; ++dx) {
              *at++ = read(line / rows, color, line % rows * patch + dy, x * patch + dx);
            }
          }
        }
        // The zeros after them.
        for (; at < to + (line * columns + x + 1) * channels; ++at) {
          *at = convert<Out>(0.0f);
        }
      }
    }
  });
}

template <typename Out>
void pack_bytes(Tensor& out, const Tensor& pixels, int64_t patch) {
  Out table[256];
  for (int byte = 0; byte < 256; ++byte) {
    table[byte] = convert<Out>(normalized(byte));
  }
  const auto* data = static_cast<const uint8_t*>(pixels.const_data_ptr());
  const int64_t sb = pixels.stride(0), sh = pixels.stride(1), sw = pixels.stride(2);
  const int64_t sc = pixels.stride(3);
  pack<Out>(out, patch, [=, &table](int64_t b, int64_t c, int64_t y, int64_t x) {
    return table[data[b * sb + y * sh + x * sw + c * sc]];
  });
}

template <typename Out, typename In>
void pack_floats(Tensor& out, const Tensor& pixels, int64_t patch) {
  const auto* data = static_cast<const In*>(pixels.const_data_ptr());
  const int64_t sb = pixels.stride(0), sc = pixels.stride(1), sh = pixels.stride(2);
  const int64_t sw = pixels.stride(3);
  pack<Out>(out, patch, [=](int64_t b, int64_t c, int64_t y, int64_t x) {
    return convert<Out>(data[b * sb + c * sc + y * sh + x * sw]);
  });
}

Tensor pack_pixels(Tensor pixels, int64_t patch_size, ScalarType dtype, int64_t channels) {
  check_pixels(pixels, patch_size, dtype, channels);
  const bool bytes = pixels.scalar_type() == ScalarType::Byte;
  const int64_t height = pixels.size(bytes ? 1 : 2), width = pixels.size(bytes ? 2 : 3);
  Tensor out = allocating("pack_pixels", [&] {
    return empty_channels_last(pixels, pixels.size(0),
                               channels ? channels : 3 * patch_size * patch_size,
                               height / patch_size, width / patch_size, dtype);
  });
  dispatch(dtype, [&](auto out_tag) {
    using Out = decltype(out_tag);
    if (bytes) {
      pack_bytes<Out>(out, pixels, patch_size);
      return;
    }
    dispatch(pixels.scalar_type(),
             [&](auto in_tag) { pack_floats<Out, decltype(in_tag)>(out, pixels, patch_size); });
  });
  return out;
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def("pack_pixels(Tensor pixels, int patch_size, ScalarType dtype, int channels=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("pack_pixels", TORCH_BOX(&cosmos3::pack_pixels));
}
