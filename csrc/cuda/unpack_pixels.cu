// CUDA kernel of cosmos3::unpack_pixels: each thread makes 16 bytes of a row of the image, whose
// next 16 its neighbor makes.
#include <torch/csrc/stable/library.h>

#include "../unpack_pixels.h"
#include "launch.h"

namespace cosmos3 {
namespace {

constexpr unsigned kThreads = 128;

// [B, 3·size², rows, columns]; strides in elements.
struct Patches {
  int64_t batch, rows, columns;
  int64_t sb, sc, sh, sw;
  int size;
};

// Rows are those of floats [B, 3, H, W] or of bytes [B, H, W, 3]. `vectorized`: each of them is
// whole 16-byte vectors.
template <typename Out, typename In>
__global__ void unpack_pixels_kernel(Out* __restrict__ out, const In* __restrict__ x,
                                     const Patches patches, const bool vectorized) {
  constexpr bool kBytes = std::is_same_v<Out, uint8_t>;
  constexpr int kColors = kBytes ? 3 : 1;  // that follow each other in a row
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(Out));
  const int size = patches.size;
  const int64_t height = patches.rows * size, rows = 3 / kColors * height;
  const int64_t length = patches.columns * size * kColors, first = index_in_row() * kLanes;
  if (first >= length) {
    return;
  }
  // Channels in the order of torch.nn.functional.pixel_shuffle: color, row, column.
  const int64_t color_step = patches.sc * size * size;
  const int64_t pixel = first / kColors;
  const int start_color = static_cast<int>(first % kColors);
  const int start_dx = static_cast<int>(pixel % size);
  const int64_t start_offset =
      start_color * color_step + start_dx * patches.sc + pixel / size * patches.sw;
  for_each_row(patches.batch, rows, [&](int64_t b, int64_t row) {
    const int64_t y = row % height;
    const In* from = x + b * patches.sb + row / height * color_step + y % size * size * patches.sc +
                     y / size * patches.sh;
    int color = start_color, dx = start_dx;
    int64_t offset = start_offset;
    In held[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      held[lane] = first + lane < length ? from[offset] : In{};
      offset += color_step;
      if (++color == kColors) {
        color = 0;
        offset += patches.sc - kColors * color_step;
        if (++dx == size) {
          dx = 0;
          offset += patches.sw - size * patches.sc;
        }
      }
    }
    uint4 vector;
    Out* lanes = reinterpret_cast<Out*>(&vector);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if constexpr (kBytes) {
        lanes[lane] = byte_of(convert<float>(held[lane]));
      } else {
        lanes[lane] = clamped(held[lane]);
      }
    }
    Out* to = out + (b * rows + row) * length + first;
    if (vectorized) {
      *reinterpret_cast<uint4*>(to) = vector;
      return;
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (first + lane < length) {
        to[lane] = lanes[lane];
      }
    }
  });
}

template <typename Out, typename In>
void run(const Tensor& out, const Tensor& x, int64_t patch_size) {
  constexpr bool kBytes = std::is_same_v<Out, uint8_t>;
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(Out);
  const Patches patches{x.size(0),   x.size(2),   x.size(3),   x.stride(0),
                        x.stride(1), x.stride(2), x.stride(3), static_cast<int>(patch_size)};
  const int64_t height = patches.rows * patch_size, width = patches.columns * patch_size;
  const int64_t rows = kBytes ? height : 3 * height, length = kBytes ? 3 * width : width;
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  const bool vectorized =
      length % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(uint4) == 0;
  launch("unpack_pixels", unpack_pixels_kernel<Out, In>,
         grid_of_rows(patches.batch, rows, (length + kLanes - 1) / kLanes, kThreads), kThreads,
         current_stream(x.get_device_index()), to, static_cast<const In*>(x.const_data_ptr()),
         patches, vectorized);
}

Tensor unpack_pixels(Tensor x, int64_t patch_size, bool as_bytes) {
  check_patches(x, patch_size);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty_image(x, patch_size, as_bytes);
  if (out.numel() == 0) {
    return out;
  }
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    if (as_bytes) {
      run<uint8_t, T>(out, x, patch_size);
    } else {
      run<T, T>(out, x, patch_size);
    }
  });
  return out;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("unpack_pixels", TORCH_BOX(&cosmos3::unpack_pixels));
}
