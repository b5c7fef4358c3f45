// CUDA kernels of cosmos3::prepare_latents. One row is one (batch, channel, frame) plane of H x W
// elements and is taken by one block, so that which operand it takes is decided once per block and
// every offset is a 64-bit row base plus an index within the plane.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../dtypes.h"
#include "../prepare_latents.h"
#include "launch.h"

namespace cosmos3 {
namespace {

// Registers for nine full blocks: the planes of a 720p video of 189 frames are then all on an H100
// at once.
constexpr int64_t kMaxThreads = 128, kResident = 9;

// A launch carries which frames are conditioned as bits in its arguments: no copy to the device,
// nothing to keep alive, capturable in a graph. More frames than this take further launches.
constexpr int64_t kMaxFrames = 4096;
struct FrameSet {
  uint32_t bits[kMaxFrames / 32];

  __device__ bool contains(unsigned t) const {
    return bits[t / 32] >> (t % 32) & 1;
  }
};

// A latent of a dtype known only at run time. `dense`: each plane is one run of memory;
// `vectorized`: it also starts on a 16-byte boundary and is in the dtype of the output.
struct Source {
  const void* data;
  ScalarType dtype;
  Strides strides;
  bool dense;
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

// Of element i of a plane. Only a plane that is not dense pays for the division.
__device__ int64_t plane_offset(const Strides& strides, bool dense, int64_t i, int64_t width) {
  return dense ? i : i / width * strides.h + i % width * strides.w;
}

// 16-byte loads that a thread has in flight before its first store. No pointer of this file is
// restricted: nvcc would take a load after the store of the one before, to save registers.
constexpr int kInFlight = 8;

template <typename T>
__device__ void copy_plane(T* out, const Source& source, int64_t offset, const Shape& shape) {
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(T);
  const int64_t plane = shape.plane();
  if (source.vectorized) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(source.data) + offset);
    uint4* to = reinterpret_cast<uint4*>(out);
    const int64_t vectors = plane / kLanes;
    const int64_t step = blockDim.x;
    for (int64_t i = threadIdx.x; i < vectors; i += kInFlight * step) {
      uint4 held[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        // Past the end the first one again: a branch would keep the loads from overlapping.
        held[k] = from[i + k * step < vectors ? i + k * step : i];
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (i + k * step < vectors) {
          to[i + k * step] = held[k];
        }
      }
    }
    return;
  }
  for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {
    out[i] = load_as<T>(source, offset + plane_offset(source.strides, source.dense, i, shape.w));
  }
}

// The grid is (frame, channel, batch entry), so that no index takes a division; y and z end at
// 65535, beyond which a block takes further channels and batch entries.
template <typename F>
__device__ void for_each_channel(const Shape& shape, F&& f) {
  for (int64_t b = blockIdx.z; b < shape.b; b += gridDim.z) {
    for (int64_t c = blockIdx.y; c < shape.c; c += gridDim.y) {
      f(b, c);
    }
  }
}

// Also where there is no channel or batch entry: a latent without elements has a velocity mask.
template <typename T>
__device__ void write_velocity(T* velocity_mask, int64_t t, bool is_condition) {
  if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) {
    velocity_mask[t] = convert<T>(is_condition ? 0.0f : 1.0f);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    prepare_latents_kernel(T* latents, T* velocity_mask, const Source cond, const Source noise,
                           const Shape shape, const int64_t first_frame, const FrameSet frames) {
  const int64_t t = first_frame + blockIdx.x;
  const bool is_condition = frames.contains(blockIdx.x);
  for_each_channel(shape, [&](int64_t b, int64_t c) {
    T* out = latents + ((b * shape.c + c) * shape.t + t) * shape.plane();
    // Not `is_condition ? cond : noise`: choosing a kernel argument copies both to local memory.
    if (is_condition) {
      copy_plane(out, cond, row_offset(cond.strides, b, c, t), shape);
    } else {
      copy_plane(out, noise, row_offset(noise.strides, b, c, t), shape);
    }
  });
  write_velocity(velocity_mask, t, is_condition);
}

template <typename T>
__global__ void write_frames_kernel(T* noise, const Strides to, const bool dense, const Source cond,
                                    const Shape shape, const int64_t first_frame,
                                    const FrameSet frames, T* velocity_mask) {
  const int64_t t = first_frame + blockIdx.x;
  const bool is_condition = frames.contains(blockIdx.x);
  write_velocity(velocity_mask, t, is_condition);
  if (!is_condition || shape.plane() == 0) {  // a tensor without elements may have no address
    return;
  }
  for_each_channel(shape, [&](int64_t b, int64_t c) {
    T* out = noise + row_offset(to, b, c, t);
    const int64_t offset = row_offset(cond.strides, b, c, t);
    if (dense) {
      copy_plane(out, cond, offset, shape);
      return;
    }
    for (int64_t i = threadIdx.x; i < shape.plane(); i += blockDim.x) {
      out[plane_offset(to, false, i, shape.w)] =
          load_as<T>(cond, offset + plane_offset(cond.strides, cond.dense, i, shape.w));
    }
  });
}

template <typename T>
__device__ T blend(Compute<T> m, Compute<T> cond, Compute<T> noise) {
  // Compiled without fused multiply-adds: float32 equals the eager formula to the bit.
  return convert<T>(m * cond + (Compute<T>{1} - m) * noise);
}

template <typename T>
__device__ void blend_plane(T* out, const Source& cond, int64_t cond_offset, const Source& noise,
                            int64_t noise_offset, Compute<T> m, const Shape& shape) {
  constexpr int64_t kLanes = sizeof(uint4) / sizeof(T);
  const int64_t plane = shape.plane();
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
    return;
  }
  for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {
    out[i] = blend<T>(
        m,
        load_as<Compute<T>>(cond, cond_offset + plane_offset(cond.strides, cond.dense, i, shape.w)),
        load_as<Compute<T>>(noise,
                            noise_offset + plane_offset(noise.strides, noise.dense, i, shape.w)));
  }
}

template <typename T>
__global__ void blend_kernel(T* latents, T* velocity_mask, const Source cond, const Source noise,
                             const Source mask, const int64_t mask_batch, const Shape shape) {
  const int64_t t = blockIdx.x;
  for_each_channel(shape, [&](int64_t b, int64_t c) {
    const Compute<T> m = load_as<Compute<T>>(mask, row_offset(mask.strides, b, 0, t));
    blend_plane(latents + ((b * shape.c + c) * shape.t + t) * shape.plane(), cond,
                row_offset(cond.strides, b, c, t), noise, row_offset(noise.strides, b, c, t), m,
                shape);
    if (b < mask_batch && c == 0 && threadIdx.x == 0) {
      velocity_mask[b * shape.t + t] = blend<T>(m, 0, 1);
    }
  });
}

bool is_vector_aligned(const void* data, const Shape& shape, const Strides& strides, int64_t size) {
  auto aligned = [&](int64_t elements) { return elements * size % sizeof(uint4) == 0; };
  return shape.plane() > 0 && reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0 &&
         aligned(shape.plane()) && aligned(strides.b) && aligned(strides.c) && aligned(strides.t) &&
         plane_is_dense(shape, strides);
}

Source source_of(const Tensor& x, const Shape& shape, ScalarType out_dtype) {
  const Strides strides = strides_of(x);
  const bool vectorized = x.scalar_type() == out_dtype &&
                          is_vector_aligned(x.const_data_ptr(), shape, strides, x.element_size());
  return {x.const_data_ptr(), x.scalar_type(), strides, plane_is_dense(shape, strides), vectorized};
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

// Warps enough for the plane's 16-byte vectors, `in_flight` to a thread; no more, so that blocks
// need not wait for others to end.
unsigned threads_for(const Shape& shape, int64_t element_size, int64_t in_flight = kInFlight) {
  const int64_t per_thread = in_flight * static_cast<int64_t>(sizeof(uint4));
  const int64_t wanted = (shape.plane() * element_size + per_thread - 1) / per_thread;
  return static_cast<unsigned>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, kMaxThreads));
}

// (frames, channels, batch entries); never empty where there is a frame.
dim3 grid_of(const char* op, int64_t frames, const Shape& shape) {
  constexpr int64_t kLimitX = (int64_t{1} << 31) - 1, kLimitYZ = 65535;
  if (frames > kLimitX) {
    fail(op, ": noise must have at most ", kLimitX, " frames on CUDA, got ", frames);
  }
  auto clamped = [&](int64_t size) {
    return static_cast<unsigned>(std::clamp<int64_t>(size, 1, kLimitYZ));
  };
  return dim3(static_cast<unsigned>(frames), clamped(shape.c), clamped(shape.b));
}

std::tuple<Tensor, Tensor> prepare_latents(Tensor cond_latent, Tensor noise,
                                           std::vector<int64_t> condition_frames) {
  const char* op = "prepare_latents";
  check_frames(op, cond_latent, noise, condition_frames);
  const DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  auto [latents, velocity_mask] = allocating(op, [&] {
    return std::make_tuple(
        torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w}),
        torch::stable::new_empty(noise, {1, 1, shape.t, 1, 1}));
  });
  const Source cond = source_of(cond_latent, shape, noise.scalar_type());
  const Source base = source_of(noise, shape, noise.scalar_type());
  const cudaStream_t stream = current_stream(noise.get_device_index());
  dispatch(noise.scalar_type(), [&, out = latents, velocity = velocity_mask](auto tag) {
    using T = decltype(tag);
    for (int64_t first = 0; first < shape.t; first += kMaxFrames) {
      const int64_t count = std::min(kMaxFrames, shape.t - first);
      launch(op, prepare_latents_kernel<T>, grid_of(op, count, shape),
             threads_for(shape, sizeof(T)), stream, static_cast<T*>(out.mutable_data_ptr()),
             static_cast<T*>(velocity.mutable_data_ptr()), cond, base, shape, first,
             frame_set(condition_frames, first, count));
    }
  });
  return {latents, velocity_mask};
}

std::tuple<Tensor, Tensor> prepare_latents_mask(Tensor cond_latent, Tensor noise,
                                                Tensor condition_mask) {
  const char* op = "prepare_latents";
  check_mask(op, cond_latent, noise, condition_mask);
  const DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  const int64_t mask_batch = condition_mask.size(0);
  auto [latents, velocity_mask] = allocating(op, [&] {
    return std::make_tuple(
        torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w}),
        torch::stable::new_empty(noise, {mask_batch, 1, shape.t, 1, 1}));
  });
  const Source mask{condition_mask.const_data_ptr(), condition_mask.scalar_type(),
                    strides_of(condition_mask), false, false};
  // An empty latent still has a velocity mask: planes without elements.
  const Shape launched = shape.rows() ? shape : Shape{mask_batch, 1, shape.t, 0, 0};
  if (launched.b * launched.c * launched.t == 0) {
    return {latents, velocity_mask};
  }
  dispatch(noise.scalar_type(), [&, out = latents, velocity = velocity_mask](auto tag) {
    using T = decltype(tag);
    launch(op, blend_kernel<T>, grid_of(op, launched.t, launched),
           threads_for(launched, sizeof(T), 1), current_stream(noise.get_device_index()),
           static_cast<T*>(out.mutable_data_ptr()), static_cast<T*>(velocity.mutable_data_ptr()),
           source_of(cond_latent, launched, noise.scalar_type()),
           source_of(noise, launched, noise.scalar_type()), mask, mask_batch, launched);
  });
  return {latents, velocity_mask};
}

Tensor prepare_latents_(Tensor cond_latent, Tensor noise, std::vector<int64_t> condition_frames) {
  const char* op = "prepare_latents_";
  check_frames_in_place(op, cond_latent, noise, condition_frames);
  const DeviceGuard guard(noise.get_device_index());
  const Shape shape = shape_of(noise);
  auto [source, velocity_mask] = allocating(op, [&] {
    return std::make_tuple(apart(cond_latent, noise),
                           torch::stable::new_empty(noise, {1, 1, shape.t, 1, 1}));
  });
  const Strides to = strides_of(noise);
  const cudaStream_t stream = current_stream(noise.get_device_index());
  dispatch(noise.scalar_type(), [&, read = source, velocity = velocity_mask](auto tag) {
    using T = decltype(tag);
    Source cond = source_of(read, shape, noise.scalar_type());
    cond.vectorized &= is_vector_aligned(noise.const_data_ptr(), shape, to, sizeof(T));
    for (int64_t first = 0; first < shape.t; first += kMaxFrames) {
      const int64_t count = std::min(kMaxFrames, shape.t - first);
      launch(op, write_frames_kernel<T>, grid_of(op, count, shape), threads_for(shape, sizeof(T)),
             stream, static_cast<T*>(noise.mutable_data_ptr()), to, plane_is_dense(shape, to), cond,
             shape, first, frame_set(condition_frames, first, count),
             static_cast<T*>(velocity.mutable_data_ptr()));
    }
  });
  return velocity_mask;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("prepare_latents", TORCH_BOX(&cosmos3::prepare_latents));
  m.impl("prepare_latents.mask", TORCH_BOX(&cosmos3::prepare_latents_mask));
  m.impl("prepare_latents_", TORCH_BOX(&cosmos3::prepare_latents_));
}
