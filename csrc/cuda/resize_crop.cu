// CUDA kernels of cosmos3::resize_crop: each pass takes one thread per pixel that it makes. The
// weights are those of csrc/resize_crop.h, computed on the host: a sine of the device may differ.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../resize_crop.h"
#include "launch.h"

namespace cosmos3 {
namespace {

constexpr unsigned kThreads = 128;

// Images [B, H, W, 3] on the device; strides in bytes.
struct Images {
  const uint8_t* data;
  int64_t sb, sh, sw, sc;
};

// An Axis on the device. Weights are [taps, outputs], so that threads of neighboring columns read
// neighboring ones.
struct DeviceAxis {
  const int32_t* starts;
  const int32_t* weights;
  int64_t taps, outputs;
};

__device__ uint8_t to_byte(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum) >> kFractionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Output `index` of an axis, `step` bytes from one source element to the next.
__device__ void combine(uint8_t* __restrict__ out, const uint8_t* __restrict__ from, int64_t step,
                        int64_t color_step, const DeviceAxis& axis, int64_t index) {
  // Unsigned, so that a sum may wrap.
  uint32_t red = kHalf, green = kHalf, blue = kHalf;
  from += axis.starts[index] * step;
  for (int64_t tap = 0; tap < axis.taps; ++tap, from += step) {
    const uint32_t weight = axis.weights[tap * axis.outputs + index];
    red += from[0] * weight;
    green += from[color_step] * weight;
    blue += from[2 * color_step] * weight;
  }
  out[0] = to_byte(red);
  out[1] = to_byte(green);
  out[2] = to_byte(blue);
}

__global__ void resize_columns_kernel(uint8_t* __restrict__ out, const Images images,
                                      const int64_t batch, const int64_t height,
                                      const DeviceAxis columns) {
  const int64_t x = index_in_row();
  if (x >= columns.outputs) {
    return;
  }
  for_each_row(batch, height, [&](int64_t b, int64_t y) {
    combine(out + ((b * height + y) * columns.outputs + x) * 3,
            images.data + b * images.sb + y * images.sh, images.sw, images.sc, columns, x);
  });
}

__global__ void resize_rows_kernel(uint8_t* __restrict__ out, const Images images,
                                   const int64_t batch, const int64_t width,
                                   const DeviceAxis rows) {
  const int64_t x = index_in_row();
  if (x >= width) {
    return;
  }
  for_each_row(batch, rows.outputs, [&](int64_t b, int64_t y) {
    combine(out + ((b * rows.outputs + y) * width + x) * 3,
            images.data + b * images.sb + x * images.sw, images.sh, images.sc, rows, y);
  });
}

// Starts and weights of an axis on the device of `like`, for whose copy the host waits.
Tensor upload(const Axis& axis, const Tensor& like) {
  const int64_t outputs = axis.outputs();
  Tensor table = torch::stable::empty({outputs * (1 + axis.taps)}, ScalarType::Int, std::nullopt,
                                      torch::stable::Device(torch::headeronly::DeviceType::CPU));
  auto* to = static_cast<int32_t*>(table.mutable_data_ptr());
  std::memcpy(to, axis.starts.data(), outputs * sizeof(int32_t));
  for (int64_t tap = 0; tap < axis.taps; ++tap) {
    for (int64_t i = 0; i < outputs; ++i) {
      to[(1 + tap) * outputs + i] = axis.weights[i * axis.taps + tap];
    }
  }
  return torch::stable::to(table, like.device());
}

DeviceAxis on_device(const Axis& axis, const Tensor& table) {
  const auto* data = static_cast<const int32_t*>(table.const_data_ptr());
  return {data, data + axis.outputs(), axis.taps, axis.outputs()};
}

Images images_of(const Tensor& images) {
  return {static_cast<const uint8_t*>(images.const_data_ptr()), images.stride(0), images.stride(1),
          images.stride(2), images.stride(3)};
}

Tensor resize_crop(Tensor image, std::vector<int64_t> size, std::vector<int64_t> crop,
                   std::string filter, bool vertical_first) {
  const char* op = "resize_crop";
  const Crop wanted = check_resize_crop(image, size, crop, filter);
  const Filter& chosen = *find_filter(filter);
  const DeviceGuard guard(image.get_device_index());
  Tensor out = allocating(op, [&] { return empty_crop(image, wanted); });
  if (out.numel() == 0) {
    return out;
  }
  Tensor source = image.dim() == 3 ? torch::stable::unsqueeze(image, 0) : image;
  const int64_t batch = source.size(0);
  const auto [kept_columns, kept_rows] = allocating(op, [&] {
    return std::make_pair(axis_of(source.size(2), size[1], wanted.left, wanted.width, chosen),
                          axis_of(source.size(1), size[0], wanted.top, wanted.height, chosen));
  });
  const Axis &columns = *kept_columns, &rows = *kept_rows;
  source = torch::stable::narrow(source, 1, rows.begin, rows.end - rows.begin);
  source = torch::stable::narrow(source, 2, columns.begin, columns.end - columns.begin);
  const auto [column_table, row_table] =
      allocating(op, [&] { return std::make_pair(upload(columns, image), upload(rows, image)); });
  const cudaStream_t stream = current_stream(image.get_device_index());

  auto along_rows = [&, table = column_table](const Tensor& from, const Tensor& to) {
    launch(op, resize_columns_kernel, grid_of_rows(batch, from.size(1), wanted.width, kThreads),
           kThreads, stream, static_cast<uint8_t*>(to.mutable_data_ptr()), images_of(from), batch,
           from.size(1), on_device(columns, table));
  };
  auto across_rows = [&, table = row_table](const Tensor& from, const Tensor& to) {
    launch(op, resize_rows_kernel, grid_of_rows(batch, wanted.height, from.size(2), kThreads),
           kThreads, stream, static_cast<uint8_t*>(to.mutable_data_ptr()), images_of(from), batch,
           from.size(2), on_device(rows, table));
  };
  auto between = [&](int64_t height, int64_t width) {
    return allocating(op,
                      [&] { return torch::stable::new_empty(image, {batch, height, width, 3}); });
  };
  if (!columns.resized) {
    across_rows(source, out);
  } else if (!rows.resized) {
    along_rows(source, out);
  } else if (vertical_first) {
    const Tensor narrowed = between(wanted.height, source.size(2));
    across_rows(source, narrowed);
    along_rows(narrowed, out);
  } else {
    const Tensor narrowed = between(source.size(1), wanted.width);
    along_rows(source, narrowed);
    across_rows(narrowed, out);
  }
  return out;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("resize_crop", TORCH_BOX(&cosmos3::resize_crop));
}
