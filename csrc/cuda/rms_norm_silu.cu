// CUDA kernel of cosmos3::rms_norm_silu, add_rms_norm_silu and add_pad: a warp takes whole pixels
// of channels-last data, keeps what it has read in registers, and needs nothing from other warps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../addends.h"
#include "../dtypes.h"
#include "launch.h"

namespace cosmos3 {
namespace {

constexpr int kWarp = 32;
constexpr int kHeld = 32;  // channels that a thread keeps
constexpr unsigned kThreads = 256;
constexpr int64_t kPixels = kThreads / kWarp;  // that a block takes at a time

// Images are [B, H, W, C] in memory. `bias`, `residual`, `weight`, `sum` and `activated` may be
// null. P is the dtype of the weight and the bias.
template <typename T, typename P>
struct Job {
  const T* x;
  const P* weight;
  const P* bias;
  const T* residual;
  unsigned t, s;  // see Factors
  T* sum;
  T* activated;
  int64_t pixels;  // of the results
  int channels;
  int64_t height, width;
  int pad;  // rows and columns of zeros after those of `sum`
  bool silu;

  C10_HOST_DEVICE bool averages() const {
    return t > 1 || s > 1;
  }
};

// A pixel of the results: its channels in x and in a residual like it, and the first cell of a
// residual that is averaged.
struct Pixel {
  int64_t offset, cell;
  bool inside;
};

template <typename T, typename P>
__device__ Pixel pixel_of(const Job<T, P>& job, int64_t pixel) {
  if (!job.pad && !job.averages()) {
    return {pixel * job.channels, 0, true};
  }
  const int64_t line = pixel / (job.width + job.pad), column = pixel % (job.width + job.pad);
  const int64_t b = line / (job.height + job.pad), row = line % (job.height + job.pad);
  const int64_t line_of_x = b * job.height + row;
  return {(line_of_x * job.width + column) * job.channels,
          (line_of_x * job.s * job.width * job.s + column * job.s) * (job.channels / job.t),
          row < job.height && column < job.width};
}

// f(lane, value) for kLanes elements from `from` on: one of them, or accesses of 16 bytes on their
// boundary.
template <int kLanes, typename T, typename F>
__device__ void load(const T* from, F&& f) {
  if constexpr (kLanes == 1) {
    f(0, *from);
  } else {
    constexpr int kPerAccess = static_cast<int>(sizeof(uint4) / sizeof(T));
#pragma unroll
    for (int first = 0; first < kLanes; first += kPerAccess) {
      const uint4 vector = reinterpret_cast<const uint4*>(from)[first / kPerAccess];
      const T* lanes = reinterpret_cast<const T*>(&vector);
#pragma unroll
      for (int lane = 0; lane < kPerAccess; ++lane) {
        f(first + lane, lanes[lane]);
      }
    }
  }
}

// value(lane) of kLanes elements to `to`: one of them, or 16 bytes.
template <int kLanes, typename T, typename F>
__device__ void store(T* to, F&& value) {
  if constexpr (kLanes == 1) {
    *to = value(0);
  } else {
    uint4 vector;
    T* lanes = reinterpret_cast<T*>(&vector);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = value(lane);
    }
    *reinterpret_cast<uint4*>(to) = vector;
  }
}

// What an averaged residual adds to a channel.
template <typename T, typename P>
__device__ Compute<T> average(const Job<T, P>& job, const Pixel& at, unsigned channel) {
  if (channel % job.t != job.t - 1) {
    return 0;
  }
  const int64_t channels = job.channels / job.t, pitch = job.width * job.s * channels;
  const T* cell = job.residual + at.cell + channel / job.t;
  Compute<T> total = 0;
  for (unsigned row = 0; row < job.s; ++row) {
    for (unsigned column = 0; column < job.s; ++column) {
      total += convert<Compute<T>>(cell[row * pitch + column * channels]);
    }
  }
  return total / static_cast<Compute<T>>(job.s * job.s);
}

// x + bias + residual of kLanes channels from `channel` on; zeros beyond the image.
template <int kLanes, typename T, typename P>
__device__ void add_up(Compute<T>* held, const Job<T, P>& job, const Pixel& at, int channel) {
  using Value = Compute<T>;
  if (!at.inside) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      held[lane] = 0;
    }
    return;
  }
  load<kLanes>(job.x + at.offset + channel,
               [&](int lane, T value) { held[lane] = convert<Value>(value); });
  if (job.bias != nullptr) {
    load<kLanes>(job.bias + channel,
                 [&](int lane, P value) { held[lane] += convert<Value>(value); });
  }
  if (job.residual == nullptr) {
    return;
  }
  if constexpr (kLanes == 1) {
    if (job.averages()) {
      held[0] += average(job, at, channel);
      return;
    }
  }
  load<kLanes>(job.residual + at.offset + channel,
               [&](int lane, T value) { held[lane] += convert<Value>(value); });
}

template <int kLanes, typename T, typename P>
__device__ void write_sum(const Compute<T>* held, const Job<T, P>& job, int64_t pixel,
                          int channel) {
  store<kLanes>(job.sum + pixel * job.channels + channel,
                [&](int lane) { return convert<T>(held[lane]); });
}

template <int kLanes, typename T, typename P>
__device__ void write_activated(const Compute<T>* held, const Job<T, P>& job, int64_t pixel,
                                int channel, Compute<T> inverse) {
  using Value = Compute<T>;
  Value scale[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    scale[lane] = 1;
  }
  if (job.weight != nullptr) {
    const Value root = std::sqrt(static_cast<Value>(job.channels));
    load<kLanes>(job.weight + channel,
                 [&](int lane, P value) { scale[lane] = convert<Value>(value) * root; });
  }
  store<kLanes>(job.activated + pixel * job.channels + channel, [&](int lane) {
    const Value scaled = held[lane] * inverse * scale[lane];
    return convert<T>(job.silu ? scaled / (Value{1} + std::exp(-scaled)) : scaled);
  });
}

// 1 / max(norm, least), of what each thread of the warp has of the squares.
template <typename Value>
__device__ Value inverse_norm(Value squares) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  const Value norm = std::sqrt(squares), least = static_cast<Value>(kNormEps);
  return Value{1} / (norm < least ? least : norm);
}

// Up to 1024 channels, a whole number of 16-byte vectors on their boundaries, and no averages.
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads) vectors_kernel(const Job<T, P> job) {
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(T));
  const int lane = threadIdx.x % kWarp;
  for (int64_t pixel = blockIdx.x * kPixels + threadIdx.x / kWarp; pixel < job.pixels;
       pixel += gridDim.x * kPixels) {
    const Pixel at = pixel_of(job, pixel);
    Compute<T> held[kHeld];
    Compute<T> squares = 0;
#pragma unroll
    for (int k = 0; k < kHeld; k += kLanes) {
      const int channel = k * kWarp + lane * kLanes;
      if (channel < job.channels) {
        add_up<kLanes>(held + k, job, at, channel);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          squares += held[k + i] * held[k + i];
        }
      }
    }
    if (job.sum != nullptr) {
#pragma unroll
      for (int k = 0; k < kHeld; k += kLanes) {
        const int channel = k * kWarp + lane * kLanes;
        if (channel < job.channels) {
          write_sum<kLanes>(held + k, job, pixel, channel);
        }
      }
    }
    if (job.activated != nullptr) {
      const Compute<T> inverse = inverse_norm(squares);
#pragma unroll
      for (int k = 0; k < kHeld; k += kLanes) {
        const int channel = k * kWarp + lane * kLanes;
        if (channel < job.channels) {
          write_activated<kLanes>(held + k, job, pixel, channel, inverse);
        }
      }
    }
  }
}

// Anything, one channel at a time. For the second result it is added up again, of what the first
// reading left in the caches.
template <typename T, typename P>
__global__ void elements_kernel(const Job<T, P> job) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t pixel = blockIdx.x * kPixels + threadIdx.x / kWarp; pixel < job.pixels;
       pixel += gridDim.x * kPixels) {
    const Pixel at = pixel_of(job, pixel);
    Compute<T> held[1];
    Compute<T> squares = 0;
    for (int channel = lane; channel < job.channels; channel += kWarp) {
      add_up<1>(held, job, at, channel);
      squares += held[0] * held[0];
      if (job.sum != nullptr) {
        write_sum<1>(held, job, pixel, channel);
      }
    }
    if (job.activated != nullptr) {
      const Compute<T> inverse = inverse_norm(squares);
      for (int channel = lane; channel < job.channels; channel += kWarp) {
        add_up<1>(held, job, at, channel);
        write_activated<1>(held, job, pixel, channel, inverse);
      }
    }
  }
}

constexpr int64_t kMostChannels = int64_t{1} << 30, kMostBlocks = (int64_t{1} << 31) - 1;

bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0;
}

template <typename T>
T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

std::optional<Tensor> channels_last(const std::optional<Tensor>& x) {
  return x.has_value() ? std::make_optional(torch::stable::contiguous(
                             *x, torch::headeronly::MemoryFormat::ChannelsLast))
                       : std::nullopt;
}

std::optional<Tensor> as(const std::optional<Tensor>& parameter, ScalarType dtype) {
  return parameter.has_value()
             ? std::make_optional(torch::stable::contiguous(torch::stable::to(*parameter, dtype)))
             : std::nullopt;
}

template <typename T, typename P>
void run(const char* op, const Tensor& like, const Job<T, P>& job) {
  constexpr int kVector = static_cast<int>(sizeof(uint4) / sizeof(T));
  const bool vectorized = !job.averages() && job.channels % kVector == 0 &&
                          job.channels <= kWarp * kHeld && is_aligned(job.x) &&
                          is_aligned(job.weight) && is_aligned(job.bias) &&
                          is_aligned(job.residual);
  // The grid ends at 2^31 - 1, beyond which a block takes further pixels.
  const int64_t blocks = std::min((job.pixels + kPixels - 1) / kPixels, kMostBlocks);
  launch_warps(op, vectorized ? vectors_kernel<T, P> : elements_kernel<T, P>,
               dim3(static_cast<unsigned>(blocks)), kThreads,
               current_stream(like.get_device_index()), job);
}

// Writes what of `sum` and `activated` there is.
void add_and_normalize(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                       bool silu, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, int pad,
                       const std::optional<Tensor>& sum, const std::optional<Tensor>& activated) {
  const Tensor& result = sum.has_value() ? *sum : *activated;
  if (result.numel() == 0) {
    return;
  }
  const Factors factors = factors_of(x, residual);
  if (x.size(1) > kMostChannels) {
    fail(op, ": x must have at most ", kMostChannels, " channels on CUDA, got ", x.size(1));
  }
  const std::optional<Tensor> input = channels_last(x), added = channels_last(residual);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto with_parameters = [&](auto parameter_tag, ScalarType dtype) {
      using P = decltype(parameter_tag);
      const std::optional<Tensor> scale = as(weight, dtype), biases = as(bias, dtype);
      run<T, P>(op, x,
                {data_of<const T>(input), data_of<const P>(scale), data_of<const P>(biases),
                 data_of<const T>(added), static_cast<unsigned>(factors.t),
                 static_cast<unsigned>(factors.s), data_of<T>(sum), data_of<T>(activated),
                 result.numel() / x.size(1), static_cast<int>(x.size(1)), x.size(2), x.size(3), pad,
                 silu});
    };
    auto is_other = [&](const std::optional<Tensor>& parameter) {
      return parameter.has_value() && parameter->scalar_type() != x.scalar_type();
    };
    if constexpr (!std::is_same_v<T, Compute<T>>) {
      if (is_other(weight) || is_other(bias)) {
        with_parameters(Compute<T>{}, ScalarType::Float);
        return;
      }
    }
    with_parameters(T{}, x.scalar_type());
  });
}

Tensor empty_like_image(const Tensor& x, int64_t pad = 0) {
  return torch::stable::empty({x.size(0), x.size(1), x.size(2) + pad, x.size(3) + pad},
                              x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu, std::optional<Tensor> bias,
                     std::optional<Tensor> residual) {
  const char* op = "rms_norm_silu";
  check_addends(op, x, weight, bias, residual);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = allocating(op, [&] { return empty_like_image(x); });
  add_and_normalize(op, x, weight, silu, bias, residual, 0, std::nullopt, out);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu,
                                             std::optional<Tensor> bias,
                                             std::optional<Tensor> residual) {
  const char* op = "add_rms_norm_silu";
  check_addends(op, x, weight, bias, residual);
  const DeviceGuard guard(x.get_device_index());
  auto [sum, out] =
      allocating(op, [&] { return std::make_tuple(empty_like_image(x), empty_like_image(x)); });
  add_and_normalize(op, x, weight, silu, bias, residual, 0, sum, out);
  return {sum, out};
}

Tensor add_pad(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual, bool pad) {
  const char* op = "add_pad";
  check_addends(op, x, std::nullopt, bias, residual);
  const DeviceGuard guard(x.get_device_index());
  Tensor sum = allocating(op, [&] { return empty_like_image(x, pad); });
  add_and_normalize(op, x, std::nullopt, false, bias, residual, pad, sum, std::nullopt);
  return sum;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("rms_norm_silu", TORCH_BOX(&cosmos3::rms_norm_silu));
  m.impl("add_rms_norm_silu", TORCH_BOX(&cosmos3::add_rms_norm_silu));
  m.impl("add_pad", TORCH_BOX(&cosmos3::add_pad));
}
