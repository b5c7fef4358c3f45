// CUDA kernels of cosmos3::prepare_latents. One row is one (batch, channel, frame) plane of H x W
// elements and belongs to one block, so that which operand it takes is decided once per block and
// every offset is a 64-bit row base plus an index within the plane.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../dtypes.h"
#include "../prepare_latents.h"
#include "launch.h"

namespace cosmos3 {
namespace {

// A launch carries which frames are conditioned as bits in its arguments: no copy to the device,
// nothing to keep alive, capturable in a graph. More frames than this take further launches.
constexpr int64_t kMaxFrames = 4096;
struct FrameSet {
  uint32_t bits[kMaxFrames / 32];

  __host__ __device__ bool contains(int64_t t) const {
    return bits[t / 32] >> (t % 32) & 1;
  }
};

// A latent of a dtype known only at run time; `vectorized` promises that each plane is one run
// of memory starting on a 16-byte boundary, in the dtype of the output.
struct Source {
  const void* data;
  ScalarType dtype;
  Strides strides;
  bool vectorized;
};

template <typename T>
__device__ T load_as(const Source& source, int64_t offset) {
  switch (source.dtype) {
    case ScalarType::Float:
      return convert<T>(static_cast<const float*>(source.data)[offset]);
    case ScalarType::BFloat16:
      return convert<T>(static_cast<const BFloat16*>(source.data)[offset]);
    case ScalarType::Half:
      return convert<T>(static_cast<const Half*>(source.data)[offset]);
    default:
      return convert<T>(static_cast<const double*>(source.data)[offset]);
  }
}

__device__ int64_t row_offset(const Strides& strides, int64_t b, int64_t c, int64_t t) {
  return b * strides.b + c * strides.c + t * strides.t;
}

__device__ int64_t plane_offset(const Strides& strides, int64_t i, int64_t width) {
  return i / width * strides.h + i % width * strides.w;
}

template <typename T>
__device__ void copy_row(T* out, const Source& source, int64_t offset, const Shape& shape) {
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(T);
  const int64_t plane = shape.plane();
  if (source.vectorized) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(source.data) + offset);
    uint4* to = reinterpret_cast<uint4*>(out);
    for (int64_t i = threadIdx.x; i < plane / kLanes; i += blockDim.x) {
      to[i] = from[i];
    }
    return;
  }
  for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {
    out[i] = load_as<T>(source, offset + plane_offset(source.strides, i, shape.w));
  }
}

template <typename T>
__global__ void prepare_latents_kernel(T* __restrict__ latents, T* __restrict__ velocity_mask,
                                       const Source cond, const Source noise, const Shape shape,
                                       const int64_t first_frame, const int64_t num_frames,
                                       const FrameSet frames) {
  const int64_t row = blockIdx.x;
  const int64_t local_t = row % num_frames;
  const int64_t t = first_frame + local_t;
  const int64_t c = row / num_frames % shape.c;
  const int64_t b = row / num_frames / shape.c;
  const bool is_condition = frames.contains(local_t);
  T* out = latents + ((b * shape.c + c) * shape.t + t) * shape.plane();
  // Not `is_condition ? cond : noise`: choosing a kernel argument copies both to local memory.
  if (is_condition) {
    copy_row(out, cond, row_offset(cond.strides, b, c, t), shape);
  } else {
    copy_row(out, noise, row_offset(noise.strides, b, c, t), shape);
  }
  if (b == 0 && c == 0 && threadIdx.x == 0) {
    velocity_mask[t] = convert<T>(is_condition ? 0.0f : 1.0f);
  }
}

template <typename T>
__global__ void write_frames_kernel(T* __restrict__ noise, const Strides to, const Source cond,
                                    const Shape shape, const int64_t first_frame,
                                    const int64_t num_frames, const FrameSet frames,
                                    T* __restrict__ velocity_mask) {
  // One block per (batch, channel) and one more for the velocity mask; each walks the frames.
  if (blockIdx.x == shape.b * shape.c) {
    for (int64_t i = threadIdx.x; i < num_frames; i += blockDim.x) {
      velocity_mask[first_frame + i] = convert<T>(frames.contains(i) ? 0.0f : 1.0f);
    }
    return;
  }
  const int64_t c = blockIdx.x % shape.c;
  const int64_t b = blockIdx.x / shape.c;
  const bool dense = to.w == 1 && to.h == shape.w;
  for (int64_t i = 0; i < num_frames; ++i) {
    if (!frames.contains(i)) {
      continue;
    }
    const int64_t t = first_frame + i;
    T* out = noise + row_offset(to, b, c, t);
    const int64_t offset = row_offset(cond.strides, b, c, t);
    if (dense) {
      copy_row(out, cond, offset, shape);
      continue;
    }
    for (int64_t j = threadIdx.x; j < shape.plane(); j += blockDim.x) {
      out[plane_offset(to, j, shape.w)] =
          load_as<T>(cond, offset + plane_offset(cond.strides, j, shape.w));
    }
  }
}

template <typename T>
__device__ T blend(Compute<T> m, Compute<T> cond, Compute<T> noise) {
  // Compiled without fused multiply-adds: float32 equals the eager formula to the bit.
  return convert<T>(m * cond + (Compute<T>{1} - m) * noise);
}

template <typename T>
__global__ void blend_kernel(T* __restrict__ latents, T* __restrict__ velocity_mask,
                             const Source cond, const Source noise, const Source mask,
                             const int64_t mask_batch, const Shape shape) {
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(T);
  const int64_t t = blockIdx.x % shape.t;
  const int64_t c = blockIdx.x / shape.t % shape.c;
  const int64_t b = blockIdx.x / shape.t / shape.c;
  const int64_t plane = shape.plane();
  const Compute<T> m = load_as<Compute<T>>(mask, row_offset(mask.strides, b, 0, t));
  T* out = latents + static_cast<int64_t>(blockIdx.x) * plane;
  const int64_t cond_offset = row_offset(cond.strides, b, c, t);
  const int64_t noise_offset = row_offset(noise.strides, b, c, t);
  if (cond.vectorized && noise.vectorized) {
    const uint4* cond_row =
        reinterpret_cast<const uint4*>(static_cast<const T*>(cond.data) + cond_offset);
    const uint4* noise_row =
        reinterpret_cast<const uint4*>(static_cast<const T*>(noise.data) + noise_offset);
    for (int64_t i = threadIdx.x; i < plane / kLanes; i += blockDim.x) {
      const uint4 cond_vector = cond_row[i];
      uint4 vector = noise_row[i];
      const T* cond_lanes = reinterpret_cast<const T*>(&cond_vector);
      T* lanes = reinterpret_cast<T*>(&vector);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] =
            blend<T>(m, convert<Compute<T>>(cond_lanes[lane]), convert<Compute<T>>(lanes[lane]));
      }
      reinterpret_cast<uint4*>(out)[i] = vector;
    }
  } else {
    for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {
      out[i] = blend<T>(
          m, load_as<Compute<T>>(cond, cond_offset + plane_offset(cond.strides, i, shape.w)),
          load_as<Compute<T>>(noise, noise_offset + plane_offset(noise.strides, i, shape.w)));
    }
  }
  if (b < mask_batch && c == 0 && threadIdx.x == 0) {
    velocity_mask[b * shape.t + t] = blend<T>(m, 0, 1);
  }
}

bool is_vector_aligned(const void* data, const Shape& shape, const Strides& strides, int64_t size) {
  auto aligned = [&](int64_t elements) { return elements * size % sizeof(uint4) == 0; };
  return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0 && aligned(shape.plane()) &&
         aligned(strides.b) && aligned(strides.c) && aligned(strides.t) &&
         plane_is_dense(shape, strides);
}

Source source_of(const Tensor& x, const Shape& shape, ScalarType out_dtype) {
  const Strides strides = strides_of(x);
  const bool vectorized = x.scalar_type() == out_dtype &&
                          is_vector_aligned(x.const_data_ptr(), shape, strides, x.element_size());
  return {x.const_data_ptr(), x.scalar_type(), strides, vectorized};
}

FrameSet frame_set(const std::vector<int64_t>& frames, int64_t first, int64_t count) {
  FrameSet set{};
  for (int64_t frame : frames) {
    if (frame >= first && frame < first + count) {
      set.bits[(frame - first) / 32] |= uint32_t{1} << ((frame - first) % 32);
    }
  }
  return set;
}

// Warps enough for the plane's 16-byte vectors, at most 256 threads.
unsigned threads_for(const Shape& shape, int64_t element_size) {
  const int64_t vectors = shape.plane() * element_size / static_cast<int64_t>(sizeof(uint4));
  return static_cast<unsigned>(std::clamp<int64_t>((vectors + 31) / 32 * 32, 32, 256));
}

unsigned grid_size(const char* op, int64_t blocks) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1;
  if (blocks > kLimit) {
    fail(op, ": B * C * T must be at most ", kLimit, " on CUDA, got ", blocks);
  }
  return static_cast<unsigned>(blocks);
}

std::tuple<Tensor, Tensor> prepare_latents(Tensor cond_latent, Tensor noise,
                                           std::vector<int64_t> condition_frames) {
  check_frames("prepare_latents", cond_latent, noise, condition_frames);
  const torch::stable::accelerator::DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  Tensor latents = torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w});
  Tensor velocity_mask = torch::stable::new_empty(noise, {1, 1, shape.t, 1, 1});
  const Source cond = source_of(cond_latent, shape, noise.scalar_type());
  const Source base = source_of(noise, shape, noise.scalar_type());
  const cudaStream_t stream = current_stream(noise.get_device_index());
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    // An empty latent still has a velocity mask: one (batch, channel) of planes without elements.
    const int64_t planes = std::max<int64_t>(1, shape.b * shape.c);
    for (int64_t first = 0; first < shape.t; first += kMaxFrames) {
      const int64_t count = std::min(kMaxFrames, shape.t - first);
      prepare_latents_kernel<T>
          <<<grid_size("prepare_latents", planes * count), threads_for(shape, sizeof(T)), 0,
             stream>>>(static_cast<T*>(latents.mutable_data_ptr()),
                       static_cast<T*>(velocity_mask.mutable_data_ptr()), cond, base,
                       shape.rows() ? shape : Shape{1, 1, shape.t, 0, 0}, first, count,
                       frame_set(condition_frames, first, count));
      check_launch("prepare_latents");
    }
  });
  return {latents, velocity_mask};
}

std::tuple<Tensor, Tensor> prepare_latents_mask(Tensor cond_latent, Tensor noise,
                                                Tensor condition_mask) {
  check_mask("prepare_latents", cond_latent, noise, condition_mask);
  const torch::stable::accelerator::DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  const int64_t mask_batch = condition_mask.size(0);
  Tensor latents = torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w});
  Tensor velocity_mask = torch::stable::new_empty(noise, {mask_batch, 1, shape.t, 1, 1});
  const Source mask{condition_mask.const_data_ptr(), condition_mask.scalar_type(),
                    strides_of(condition_mask), false};
  // An empty latent still has a velocity mask: planes without elements.
  const Shape launched = shape.rows() ? shape : Shape{mask_batch, 1, shape.t, 0, 0};
  if (launched.b * launched.c * launched.t == 0) {
    return {latents, velocity_mask};
  }
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    blend_kernel<T><<<grid_size("prepare_latents", launched.b * launched.c * launched.t),
                      threads_for(shape, sizeof(T)), 0, current_stream(noise.get_device_index())>>>(
        static_cast<T*>(latents.mutable_data_ptr()),
        static_cast<T*>(velocity_mask.mutable_data_ptr()),
        source_of(cond_latent, shape, noise.scalar_type()),
        source_of(noise, shape, noise.scalar_type()), mask, mask_batch, launched);
    check_launch("prepare_latents");
  });
  return {latents, velocity_mask};
}

Tensor prepare_latents_(Tensor cond_latent, Tensor noise, std::vector<int64_t> condition_frames) {
  check_frames("prepare_latents_", cond_latent, noise, condition_frames);
  check_writable("prepare_latents_", noise);
  const torch::stable::accelerator::DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  Tensor velocity_mask = torch::stable::new_empty(noise, {1, 1, shape.t, 1, 1});
  const Strides to = strides_of(noise);
  const cudaStream_t stream = current_stream(noise.get_device_index());
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    Source cond = source_of(cond_latent, shape, noise.scalar_type());
    cond.vectorized &= is_vector_aligned(noise.const_data_ptr(), shape, to, sizeof(T));
    const Shape launched = shape.rows() ? shape : Shape{0, 0, shape.t, 0, 0};
    for (int64_t first = 0; first < shape.t; first += kMaxFrames) {
      const int64_t count = std::min(kMaxFrames, shape.t - first);
      write_frames_kernel<T><<<grid_size("prepare_latents_", launched.b * launched.c + 1),
                               threads_for(shape, sizeof(T)), 0, stream>>>(
          static_cast<T*>(noise.mutable_data_ptr()), to, cond, launched, first, count,
          frame_set(condition_frames, first, count),
          static_cast<T*>(velocity_mask.mutable_data_ptr()));
      check_launch("prepare_latents_");
    }
  });
  return velocity_mask;
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CUDA, m) {
  m.impl("prepare_latents", TORCH_BOX(&cosmos3::prepare_latents));
  m.impl("prepare_latents.mask", TORCH_BOX(&cosmos3::prepare_latents_mask));
  m.impl("prepare_latents_", TORCH_BOX(&cosmos3::prepare_latents_));
}
