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
// Channels that a thread keeps, of one pixel or of several.
template <typename T>
constexpr int kHeld = 128 / static_cast<int>(sizeof(Compute<T>));
// Pixels that a warp takes at once, kVectors to a thread for each.
template <typename T, int kVectors>
constexpr int kAtOnce = std::min(
    4, kHeld<T>* static_cast<int>(sizeof(T)) / (kVectors * static_cast<int>(sizeof(uint4))));
// Blocks that a multiprocessor has the registers for; wider types need more to load at once.
template <typename T>
constexpr int kResident = sizeof(T) == 2   ? 4
                          : sizeof(T) == 4 ? 3
                                           : 2;
constexpr unsigned kThreads = 128;
constexpr int64_t kWarps = kThreads / kWarp;

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

// A device divides 64 bits in a function of a hundred instructions, 32 in twenty.
template <typename Index, typename T, typename P>
__device__ Pixel place(const Job<T, P>& job, Index pixel) {
  const Index height = static_cast<Index>(job.height), width = static_cast<Index>(job.width);
  const Index pad = static_cast<Index>(job.pad);
  const Index line = pixel / (width + pad), column = pixel % (width + pad);
  const Index b = line / (height + pad), row = line % (height + pad);
  const int64_t line_of_x = static_cast<int64_t>(b) * job.height + row;
  return {(line_of_x * job.width + column) * job.channels,
          (line_of_x * job.s * job.width * job.s + column * job.s) * (job.channels / job.t),
          row < height && column < width};
}

// Of a pixel whose number is an Index, which a place that has to be looked for needs.
template <typename Index, typename T, typename P>
__device__ Pixel pixel_of(const Job<T, P>& job, int64_t pixel) {
  if (!job.pad && !job.averages()) {
    return {pixel * job.channels, 0, true};
  }
  return place<Index>(job, static_cast<Index>(pixel));
}

// f(lane, value) for the elements of a vector that was read.
template <typename T, typename Vector, typename F>
__device__ void each_lane(Vector vector, F&& f) {
  const T* lanes = reinterpret_cast<const T*>(&vector);
#pragma unroll
  for (int lane = 0; lane < static_cast<int>(sizeof(Vector) / sizeof(T)); ++lane) {
    f(lane, lanes[lane]);
  }
}

// f(lane, value) for kLanes elements from `from` on: one of them, or accesses of 16 bytes on their
// boundary, or one of 8 bytes.
template <int kLanes, typename T, typename F>
__device__ void load(const T* from, F&& f) {
  if constexpr (kLanes == 1 && sizeof(T) < sizeof(uint2)) {
    f(0, *from);
  } else {
    using Vector = std::conditional_t<kLanes * sizeof(T) == sizeof(uint2), uint2, uint4>;
    constexpr int kPerAccess = static_cast<int>(sizeof(Vector) / sizeof(T));
#pragma unroll
    for (int first = 0; first < kLanes; first += kPerAccess) {
      each_lane<T>(*reinterpret_cast<const Vector*>(from + first),
                   [&](int lane, T value) { f(first + lane, value); });
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

// What an averaged residual adds to kLanes of its own channels, of which the first is for `channel`
// of x. kKnownSide: rows and columns of a cell, where it is known; 0: those of the job.
template <int kLanes, unsigned kKnownSide, typename T, typename P>
__device__ void average(Compute<T>* mean, const Job<T, P>& job, const Pixel& at, unsigned channel) {
  using Value = Compute<T>;
  const unsigned side = kKnownSide ? kKnownSide : job.s;
  const int64_t channels = job.channels / job.t, pitch = job.width * side * channels;
  const T* cell = job.residual + at.cell + channel / job.t;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    mean[lane] = 0;
  }
#pragma unroll kKnownSide ? kKnownSide : 1
  for (unsigned row = 0; row < side; ++row) {
#pragma unroll kKnownSide ? kKnownSide : 1
    for (unsigned column = 0; column < side; ++column) {
      load<kLanes>(cell + row * pitch + column * channels,
                   [&](int lane, T value) { mean[lane] += convert<Value>(value); });
    }
  }
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    mean[lane] /= static_cast<Value>(side * side);
  }
}

// x + bias + residual of one channel; zero beyond the image.
template <typename T, typename P>
__device__ Compute<T> sum_of(const Job<T, P>& job, const Pixel& at, int channel) {
  using Value = Compute<T>;
  if (!at.inside) {
    return 0;
  }
  Value sum = convert<Value>(job.x[at.offset + channel]);
  if (job.bias != nullptr) {
    sum += convert<Value>(job.bias[channel]);
  }
  if (job.residual == nullptr) {
    return sum;
  }
  if (!job.averages()) {
    return sum + convert<Value>(job.residual[at.offset + channel]);
  }
  Value mean = 0;
  if (channel % job.t == job.t - 1) {
    average<1, 0>(&mean, job, at, channel);
  }
  return sum + mean;
}

template <int kLanes, typename T, typename P>
__device__ void write_sum(const Compute<T>* held, const Job<T, P>& job, int64_t pixel,
                          int channel) {
  store<kLanes>(job.sum + pixel * job.channels + channel,
                [&](int lane) { return convert<T>(held[lane]); });
}

// Rounding to 16 bits hides a thousand times the error of the device's quick functions.
template <typename T>
__device__ Compute<T> silu_of(Compute<T> x) {
  if constexpr (sizeof(T) == 2) {
    return x * quick_reciprocal(1 + quick_exp(-x));
  } else {
    return x / (Compute<T>{1} + std::exp(-x));
  }
}

// `factor` is what every channel is multiplied by.
template <int kLanes, typename T, typename P>
__device__ void write_activated(const Compute<T>* held, const Job<T, P>& job, int64_t pixel,
                                int channel, Compute<T> factor) {
  using Value = Compute<T>;
  Value scale[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    scale[lane] = factor;
  }
  if (job.weight != nullptr) {
    load<kLanes>(job.weight + channel,
                 [&](int lane, P value) { scale[lane] *= convert<Value>(value); });
  }
  store<kLanes>(job.activated + pixel * job.channels + channel, [&](int lane) {
    const Value scaled = held[lane] * scale[lane];
    return convert<T>(job.silu ? silu_of<T>(scaled) : scaled);
  });
}

// 1 / max(norm, least), of what each thread of the warp has of the squares, and the root of the
// channels where there is a weight.
template <typename T, typename P>
__device__ Compute<T> factor_of(const Job<T, P>& job, Compute<T> squares) {
  using Value = Compute<T>;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  const Value root = job.weight ? std::sqrt(static_cast<Value>(job.channels)) : Value{1};
  const Value least = static_cast<Value>(kNormEps);
  if constexpr (sizeof(T) == 2) {
    return root * quick_reciprocal_root(squares < least * least ? least * least : squares);
  } else {
    const Value norm = std::sqrt(squares);
    return root / (norm < least ? least : norm);
  }
}

// That of every down-sampling.
constexpr unsigned kSide = 2;
// Vectors to a thread of a pixel with averages: their cells take four times the registers.
constexpr int kMostAveraged = 4;

// Whole 16-byte vectors on their boundaries, up to kVectors of them to a thread for each pixel. A
// warp takes several narrow pixels at once, and no branch comes between the loads, so that enough
// of them are in flight.
template <typename T, typename P, int kVectors>
__global__ void __launch_bounds__(kThreads, kResident<T>) vectors_kernel(const Job<T, P> job) {
  using Value = Compute<T>;
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(T));
  constexpr int kPixels = kAtOnce<T, kVectors>;
  const bool like_x = job.residual != nullptr && !job.averages();
  // Past the end of the pixels or of the channels, what is there is read once more.
  int channels[kVectors];
  bool exists[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    channels[k] = (k * kWarp + threadIdx.x % kWarp) * kLanes;
    exists[k] = channels[k] < job.channels;
    channels[k] = exists[k] ? channels[k] : 0;
  }
  const int64_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  for (int64_t first = warp * kPixels; first < job.pixels; first += gridDim.x * kWarps * kPixels) {
    Pixel at[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      at[p] = pixel_of<uint32_t>(job, first + p < job.pixels ? first + p : first);
      at[p].offset = at[p].inside ? at[p].offset : 0;
      at[p].cell = at[p].inside ? at[p].cell : 0;
    }
    uint4 x[kPixels][kVectors], added[kPixels][kVectors];
    auto read = [&](uint4(&to)[kPixels][kVectors], const T* from) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          to[p][k] = *reinterpret_cast<const uint4*>(from + at[p].offset + channels[k]);
        }
      }
    };
    read(x, job.x);
    if (like_x) {
      read(added, job.residual);
    }
    Value held[kPixels][kVectors][kLanes];
    auto at_each = [&](auto&& f) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          f(held[p][k], p, k);
        }
      }
    };
    at_each([&](Value* to, int p, int k) {
      each_lane<T>(x[p][k], [&](int lane, T value) { to[lane] = convert<Value>(value); });
    });
    if (job.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        load<kLanes>(job.bias + channels[k], [&](int lane, P value) {
#pragma unroll
          for (int p = 0; p < kPixels; ++p) {
            held[p][k][lane] += convert<Value>(value);
          }
        });
      }
    }
    if (like_x) {
      at_each([&](Value* to, int p, int k) {
        each_lane<T>(added[p][k], [&](int lane, T value) { to[lane] += convert<Value>(value); });
      });
    } else if (kVectors <= kMostAveraged && job.residual != nullptr && job.t == 1) {
      at_each([&](Value* to, int p, int k) {
        Value mean[kLanes];
        average<kLanes, kSide>(mean, job, at[p], channels[k]);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          to[lane] += mean[lane];
        }
      });
    } else if (kVectors <= kMostAveraged && job.residual != nullptr) {  // t = 2
      at_each([&](Value* to, int p, int k) {
        Value mean[kLanes / 2];
        average<kLanes / 2, kSide>(mean, job, at[p], channels[k]);
#pragma unroll
        for (int lane = 0; lane < kLanes / 2; ++lane) {
          to[2 * lane + 1] += mean[lane];
        }
      });
    }
    if (job.pad) {
      at_each([&](Value* to, int p, int) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          to[lane] = at[p].inside ? to[lane] : Value{0};
        }
      });
    }
    if (job.sum != nullptr) {
      at_each([&](const Value* from, int p, int k) {
        if (exists[k] && first + p < job.pixels) {
          write_sum<kLanes>(from, job, first + p, channels[k]);
        }
      });
    }
    if (job.activated == nullptr) {
      continue;
    }
    Value factor[kPixels] = {};
    at_each([&](const Value* from, int p, int k) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const Value value = exists[k] ? from[lane] : Value{0};
        factor[p] = std::fma(value, value, factor[p]);
      }
    });
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      factor[p] = factor_of(job, factor[p]);
    }
    at_each([&](const Value* from, int p, int k) {
      if (exists[k] && first + p < job.pixels) {
        write_activated<kLanes>(from, job, first + p, channels[k], factor[p]);
      }
    });
  }
}

// Anything, one channel at a time. For the second result it is added up again, of what the first
// reading left in the caches.
template <typename T, typename P>
__global__ void elements_kernel(const Job<T, P> job) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t pixel = blockIdx.x * kWarps + threadIdx.x / kWarp; pixel < job.pixels;
       pixel += gridDim.x * kWarps) {
    const Pixel at = pixel_of<int64_t>(job, pixel);
    Compute<T> squares = 0;
    for (int channel = lane; channel < job.channels; channel += kWarp) {
      const Compute<T> sum = sum_of(job, at, channel);
      squares += sum * sum;
      if (job.sum != nullptr) {
        write_sum<1>(&sum, job, pixel, channel);
      }
    }
    if (job.activated != nullptr) {
      const Compute<T> factor = factor_of(job, squares);
      for (int channel = lane; channel < job.channels; channel += kWarp) {
        const Compute<T> sum = sum_of(job, at, channel);
        write_activated<1>(&sum, job, pixel, channel, factor);
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

// The grid ends at 2^31 - 1, beyond which a block takes further pixels.
template <typename T, typename P>
void run_with(const char* op, void (*kernel)(Job<T, P>), int64_t pixels_of_warp, const Tensor& like,
              const Job<T, P>& job) {
  const int64_t of_block = kWarps * pixels_of_warp;
  const int64_t blocks = std::min((job.pixels + of_block - 1) / of_block, kMostBlocks);
  launch_warps(op, kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
               current_stream(like.get_device_index()), job);
}

// With as few vectors to a thread as the channels need.
template <int kVectors, typename T, typename P>
void run_vectors(const char* op, const Tensor& like, const Job<T, P>& job) {
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(T));
  constexpr int kPixels = kAtOnce<T, kVectors>;
  if constexpr (kPixels > 1) {
    if (job.channels > kVectors * kLanes * kWarp) {
      run_vectors<2 * kVectors>(op, like, job);
      return;
    }
  }
  run_with(op, vectors_kernel<T, P, kVectors>, kPixels, like, job);
}

template <typename T, typename P>
void run(const char* op, const Tensor& like, const Job<T, P>& job) {
  constexpr int kLanes = static_cast<int>(sizeof(uint4) / sizeof(T));
  // Of an image of padding alone there is no pixel to read past the end.
  const bool vectorized =
      job.height * job.width > 0 && job.pixels >> 32 == 0 &&
      (!job.averages() ||
       (job.s == kSide && job.t <= 2 && job.channels <= kMostAveraged * kLanes * kWarp)) &&
      job.channels % kLanes == 0 && job.channels <= kWarp * kHeld<T> && is_aligned(job.x) &&
      is_aligned(job.weight) && is_aligned(job.bias) && is_aligned(job.residual);
  if (vectorized) {
    run_vectors<1>(op, like, job);
  } else {
    run_with(op, elements_kernel<T, P>, 1, like, job);
  }
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
