// CPU kernel of cosmos3::pack_pixels: bytes or floats of an image to what the first convolution
// reads, in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../pack_pixels.h"

namespace cosmos3 {
namespace {

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
    table[byte] = convert<Out>(normalized(static_cast<uint8_t>(byte)));
  }
  const auto* data = static_cast<const uint8_t*>(pixels.const_data_ptr());
  pack<Out>(out, patch,
            [&table, data, p = pixels_of(pixels)](int64_t b, int64_t c, int64_t y, int64_t x) {
              return table[data[b * p.sb + c * p.sc + y * p.sh + x * p.sw]];
            });
}

template <typename Out, typename In>
void pack_floats(Tensor& out, const Tensor& pixels, int64_t patch) {
  const auto* data = static_cast<const In*>(pixels.const_data_ptr());
  pack<Out>(out, patch, [data, p = pixels_of(pixels)](int64_t b, int64_t c, int64_t y, int64_t x) {
    return convert<Out>(data[b * p.sb + c * p.sc + y * p.sh + x * p.sw]);
  });
}

Tensor pack_pixels(Tensor pixels, int64_t patch_size, ScalarType dtype, int64_t channels) {
  check_pixels(pixels, patch_size, dtype, channels);
  Tensor out = empty_patches(pixels, patch_size, dtype, channels);
  dispatch(dtype, [&](auto out_tag) {
    using Out = decltype(out_tag);
    if (is_bytes(pixels)) {
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
