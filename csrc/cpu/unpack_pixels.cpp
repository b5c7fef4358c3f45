// CPU kernel of cosmos3::unpack_pixels: what the last convolution writes to an image in floats or
// bytes, in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../unpack_pixels.h"

namespace cosmos3 {
namespace {

// Calls write(b, color, y, x, value) for every pixel, one image row after the other.
template <typename In, typename Write>
void unpack(const Tensor& x, int64_t patch, const Write& write) {
  const int64_t batch = x.size(0), rows = x.size(2), columns = x.size(3);
  const int64_t sb = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const In* data = static_cast<const In*>(x.const_data_ptr());
  torch::stable::parallel_for(0, batch * rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / rows, row = line % rows;
      const In* from = data + b * sb + row * sh;
      // Channels in the order of torch.nn.functional.pixel_shuffle: color, row, column.
      for (int64_t channel = 0; channel < 3 * patch * patch; ++channel) {
        const int64_t dx = channel % patch, dy = channel / patch % patch;
        const int64_t color = channel / patch / patch;
        for (int64_t column = 0; column < columns; ++column) {
          write(b, color, row * patch + dy, column * patch + dx, from[channel * sc + column * sw]);
        }
      }
    }
  });
}

template <typename T>
void unpack_floats(Tensor& out, const Tensor& x, int64_t patch) {
  const int64_t height = out.size(2), width = out.size(3);
  T* to = static_cast<T*>(out.mutable_data_ptr());
  unpack<T>(x, patch, [=](int64_t b, int64_t c, int64_t y, int64_t x, T value) {
    to[((b * 3 + c) * height + y) * width + x] = clamped(value);
  });
}

template <typename T>
void unpack_bytes(Tensor& out, const Tensor& x, int64_t patch) {
  const int64_t height = out.size(1), width = out.size(2);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  unpack<T>(x, patch, [=](int64_t b, int64_t c, int64_t y, int64_t x, T value) {
    to[((b * height + y) * width + x) * 3 + c] = byte_of(convert<float>(value));
  });
}

Tensor unpack_pixels(Tensor x, int64_t patch_size, bool as_bytes) {
  check_patches(x, patch_size);
  Tensor out = empty_image(x, patch_size, as_bytes);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    if (as_bytes) {
      unpack_bytes<T>(out, x, patch_size);
    } else {
      unpack_floats<T>(out, x, patch_size);
    }
  });
  return out;
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def("unpack_pixels(Tensor x, int patch_size, bool as_bytes=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("unpack_pixels", TORCH_BOX(&cosmos3::unpack_pixels));
}
