// CUDA kernel of cosmos3::pack_pixels: each thread makes 16 bytes of a row of patches, whose next
// 16 its neighbor makes.
#include <torch/csrc/stable/library.h>

#include "../dtypes.h"
#include "../pack_pixels.h"
#include "launch.h"

namespace cosmos3 {
namespace {

constexpr unsigned kThreads = 128;

// The result [B, rows, columns, channels]; `vectorized`: each row is whole 16-byte vectors.
struct Patches {
  int64_t rows, columns, channels;
  int size;
  bool vectorized;
};

// In the order of torch.nn.functional.pixel_unshuffle: color, row, column; then zeros.
struct Channel {
  int64_t index;
  int dy, dx;
};

template <typename Out, typename In>
__device__ Out packed(In value) {
  if constexpr (std::is_same_v<In, uint8_t>) {
    return convert<Out>(normalized(value));
  } else {
    return convert<Out>(value);
  }
}

template <typename Out, typename In>
__global__ void pack_pixels_kernel(Out* __restrict__ out, const In* __restrict__ pixels,
                                   const Pixels image, const Patches patches) {
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(Out));
  const int64_t length = patches.columns * patches.channels, first = index_in_row() * kLanes;
  if (first >= length) {
    return;
  }
  const int size = patches.size, filled = 3 * size * size;
  Channel start{first % patches.channels, 0, 0};
  const int64_t start_column = first / patches.channels * size * image.sw;
  int64_t start_offset = start_column;
  if (start.index < filled) {
    const int channel = static_cast<int>(start.index), color = channel / (size * size);
    start.dy = channel / size % size;
    start.dx = channel % size;
    start_offset += color * image.sc + start.dy * image.sh + start.dx * image.sw;
  }
  // From the end of a row of a patch to the next one, and from a color's last row to the next
  // color.
  const int64_t to_row = image.sh - size * image.sw, to_color = image.sc - size * image.sh;
  for_each_row(image.batch, patches.rows, [&](int64_t b, int64_t row) {
    const In* from = pixels + b * image.sb + row * size * image.sh;
    Channel channel = start;
    int64_t offset = start_offset, column = start_column;
    In held[kLanes];
    bool is_filled[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      is_filled[lane] = channel.index < filled && first + lane < length;
      held[lane] = is_filled[lane] ? from[offset] : In{};
      ++channel.index;
      offset += image.sw;
      if (++channel.dx == size) {
        channel.dx = 0;
        offset += to_row;
        if (++channel.dy == size) {
          channel.dy = 0;
          offset += to_color;
        }
      }
      if (channel.index == patches.channels) {
        column += size * image.sw;
        offset = column;
        channel = {0, 0, 0};
      }
    }
    uint4 vector;
    Out* lanes = reinterpret_cast<Out*>(&vector);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = is_filled[lane] ? packed<Out>(held[lane]) : convert<Out>(0.0f);
    }
    Out* to = out + (b * patches.rows + row) * length + first;
    if (patches.vectorized) {
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
void run(const Tensor& out, const Tensor& pixels, int64_t patch_size) {
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(Out);
  const int64_t length = out.size(3) * out.size(1);
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  const bool vectorized =
      length % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(uint4) == 0;
  launch("pack_pixels", pack_pixels_kernel<Out, In>,
         grid_of_rows(out.size(0), out.size(2), (length + kLanes - 1) / kLanes, kThreads), kThreads,
         current_stream(pixels.get_device_index()), to,
         static_cast<const In*>(pixels.const_data_ptr()), pixels_of(pixels),
         Patches{out.size(2), out.size(3), out.size(1), static_cast<int>(patch_size), vectorized});
}

Tensor pack_pixels(Tensor pixels, int64_t patch_size, ScalarType dtype, int64_t channels) {
  check_pixels(pixels, patch_size, dtype, channels);
  const DeviceGuard guard(pixels.get_device_index());
  Tensor out = empty_patches(pixels, patch_size, dtype, channels);
  if (out.numel() == 0) {
    return out;
  }
  dispatch(dtype, [&](auto out_tag) {
    using Out = decltype(out_tag);
    if (is_bytes(pixels)) {
      run<Out, uint8_t>(out, pixels, patch_size);
      return;
    }
    dispatch(pixels.scalar_type(),
             [&](auto in_tag) { run<Out, decltype(in_tag)>(out, pixels, patch_size); });
  });
  return out;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("pack_pixels", TORCH_BOX(&cosmos3::pack_pixels));
}
