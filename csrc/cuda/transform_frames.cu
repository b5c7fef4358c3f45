// CUDA kernel of cosmos3::transform_frames: a group of threads takes whole pixels of channels-last
// data through all their frames, four at a time. A thread has one vector of channels and keeps in
// registers the sums of four frames and the two activated ones before them, so that every product
// and residual is read once and every result written once; for the norms the group exchanges four
// sums of squares. Blocks of frames follow each other, since each needs the last two of the one
// before, of which no rounded copy will do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../transform_frames.h"
#include "launch.h"

namespace cosmos3 {
namespace {

constexpr int kWarp = 32;
constexpr int kMostProducts = 6;
constexpr int kAtOnce = 4;  // frames; a multiple of those of every block
// Threads of a block: whole pixels' of up to a warp, or one pixel's of up to kMostThreads.
constexpr int kThreads = 128, kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;

// A tensor [..., C] in memory; without data it is absent.
struct Rows {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  C10_HOST_DEVICE explicit operator bool() const {
    return data != nullptr;
  }
  template <typename T>
  C10_HOST_DEVICE const T* at(int64_t offset) const {
    return static_cast<const T*>(data) + offset;
  }
  template <typename T>
  C10_HOST_DEVICE T* to(int64_t offset) const {
    return const_cast<T*>(at<T>(offset));
  }
};

template <typename Value>
struct Job {
  Rows product[kMostProducts];
  Value scale[kMostProducts];
  Value root;  // of the number of channels
  Rows bias, residual, weight, past, sum, transformed, last;
  Point<Value> point;
  int64_t frames, pixels;  // pixels of one frame of the whole batch
  int64_t blocks;          // of `to` frames
  int channels, to;
  int group;  // threads to a pixel
  bool silu;

  // Of row `row` of one pixel's channels.
  C10_HOST_DEVICE int64_t offset(int64_t row, int64_t pixel) const {
    return (row * pixels + pixel) * channels;
  }
};

// Bytes of a value in memory; of two it is bfloat16 or float16, which is asked when it is read.
template <int product_size, int sum_size, int frame_size>
struct Sizes {
  static constexpr int kProduct = product_size, kSum = sum_size, kFrame = frame_size;
  static constexpr int kLeast = std::min(product_size, std::min(sum_size, frame_size));
  static constexpr int kLanes = static_cast<int>(sizeof(uint4)) / kLeast;
  using Value = std::conditional_t<product_size == 8, double, float>;
};

template <typename T>
__device__ T smaller(T a, T b) {
  return a < b ? a : b;
}

// f(integral_constant) for 0 .. n - 1; a device takes only the value of its type.
template <int... i, typename F>
__device__ void each_of(std::integer_sequence<int, i...>, F&& f) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int n, typename F>
__device__ void each_of(F&& f) {
  each_of(std::make_integer_sequence<int, n>{}, f);
}

// kLanes values as they lie in memory.
template <int kSize, int kLanes>
struct Vectors {
  static constexpr int kParts = kSize * kLanes / static_cast<int>(sizeof(uint4));
  uint4 parts[kParts];

  __device__ void load(const void* data, int64_t offset) {
    const uint4* from =
        reinterpret_cast<const uint4*>(static_cast<const char*>(data) + offset * kSize);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      parts[i] = from[i];
    }
  }

  __device__ void store(const Rows& rows, int64_t offset) const {
    uint4* to = reinterpret_cast<uint4*>(rows.to<char>(offset * kSize));
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      to[i] = parts[i];
    }
  }

  template <typename T, typename Value>
  __device__ void unpack_as(Value (&to)[kLanes]) const {
    const T* lanes = reinterpret_cast<const T*>(parts);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = convert<Value>(lanes[lane]);
    }
  }
  template <typename Value>
  __device__ void unpack(Value (&to)[kLanes], ScalarType dtype) const {
    if constexpr (kSize > 2) {
      unpack_as<std::conditional_t<kSize == 8, double, float>>(to);
    } else if (dtype == ScalarType::Half) {
      unpack_as<Half>(to);
    } else {
      unpack_as<BFloat16>(to);
    }
  }

  template <typename T, typename Value>
  __device__ void pack_as(const Value (&from)[kLanes]) {
    T* lanes = reinterpret_cast<T*>(parts);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = convert<T>(from[lane]);
    }
  }
  template <typename Value>
  __device__ void pack(const Value (&from)[kLanes], ScalarType dtype) {
    if constexpr (kSize > 2) {
      pack_as<std::conditional_t<kSize == 8, double, float>>(from);
    } else if (dtype == ScalarType::Half) {
      pack_as<Half>(from);
    } else {
      pack_as<BFloat16>(from);
    }
  }
};

template <int kSize, int kLanes, typename Value>
__device__ void write(const Rows& rows, int64_t offset, const Value (&values)[kLanes]) {
  Vectors<kSize, kLanes> vectors;
  vectors.pack(values, rows.dtype);
  vectors.store(rows, offset);
}

template <typename Value>
__device__ Value element(const Rows& rows, int64_t offset) {
  switch (rows.dtype) {
    case ScalarType::Double:
      return convert<Value>(*rows.at<double>(offset));
    case ScalarType::Float:
      return convert<Value>(*rows.at<float>(offset));
    case ScalarType::Half:
      return convert<Value>(*rows.at<Half>(offset));
    default:
      return convert<Value>(*rows.at<BFloat16>(offset));
  }
}

// kLanes elements of a bias or a weight, of any dtype.
template <int kLanes, typename Value>
__device__ void read_parameters(Value (&to)[kLanes], const Rows& parameter, int channel) {
  auto read = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    if constexpr (kSize * kLanes >= static_cast<int>(sizeof(uint4))) {
      Vectors<kSize, kLanes> vectors;
      vectors.load(parameter.data, channel);
      vectors.unpack(to, parameter.dtype);
    } else {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        to[lane] = element<Value>(parameter, channel + lane);
      }
    }
  };
  if (parameter.dtype == ScalarType::Double) {
    read(std::integral_constant<int, 8>{});
  } else if (parameter.dtype == ScalarType::Float) {
    read(std::integral_constant<int, 4>{});
  } else {
    read(std::integral_constant<int, 2>{});
  }
}

// The sums over the group, of what each of its threads has.
template <int n, typename Value>
__device__ void sum_over_group(Value (&values)[n], int group) {
  for (int offset = smaller(group, kWarp) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    }
  }
  if (group <= kWarp) {
    return;
  }
  Value* of_warps = shared_memory<Value, n * kMostWarps>();
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      of_warps[warp * n + i] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = of_warps[i];
  }
  for (int other = 1; other < group / kWarp; ++other) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] += of_warps[other * n + i];
    }
  }
  __syncthreads();  // before the next four frames' are written
}

// Rounding to 16 bits hides a thousand times the error of the device's quick functions.
template <bool is_quick, typename Value>
__device__ Value silu_of(Value x) {
  if constexpr (is_quick) {
    return x * quick_reciprocal(1 + quick_exp(-x));
  } else {
    return x / (Value{1} + std::exp(-x));
  }
}

// root / max(norm, least).
template <bool is_quick, typename Value>
__device__ Value factor_of(Value squares, Value root) {
  const Value least = static_cast<Value>(kNormEps);
  if constexpr (is_quick) {
    return root * quick_reciprocal_root(squares < least * least ? least * least : squares);
  } else {
    const Value norm = std::sqrt(squares);
    return root / (norm < least ? least : norm);
  }
}

// The frames first .. first + 3 of a pixel: products combined, with bias and residual. Past the
// last frame what is there is read once more.
template <typename S, int kProducts, int kLanes, typename Value>
__device__ void read_sums(Value (&y)[kAtOnce][kLanes], const Job<Value>& job, int64_t first,
                          int64_t pixel, int channel) {
  constexpr int m = Block<kProducts>::m, kBlocks = kAtOnce / m;
  const int64_t last_block = (job.frames - 1) / m, last_frame = job.frames - 1;
  Vectors<S::kProduct, kLanes> products[kBlocks][kProducts];
  Vectors<S::kSum, kLanes> residual[kAtOnce];
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const int64_t block = smaller(first / m + n, last_block);
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      products[n][k].load(job.product[k].data, job.offset(block, pixel) + channel);
    }
  }
  if (job.residual) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      residual[i].load(job.residual.data,
                       job.offset(smaller(first + i, last_frame), pixel) + channel);
    }
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    Value terms[kProducts][kLanes];
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      products[n][k].unpack(terms[k], job.product[k].dtype);
    }
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      Value scaled[kProducts];
#pragma unroll
      for (int k = 0; k < kProducts; ++k) {
        scaled[k] = terms[k][lane] * job.scale[k];
      }
      each_of<m>([&](auto index) {
        constexpr int i = decltype(index)::value;
        y[n * m + i][lane] = frame_of<kProducts, i>(scaled, job.point);
      });
    }
  }
  if (job.bias) {
    Value bias[kLanes];
    read_parameters(bias, job.bias, channel);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        y[i][lane] += bias[lane];
      }
    }
  }
  if (job.residual) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      Value added[kLanes];
      residual[i].unpack(added, job.residual.dtype);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        y[i][lane] += added[lane];
      }
    }
  }
}

// Sums become frames: normalized where there is a weight, zeros from `job.frames` on.
template <typename S, int kLanes, typename Value>
__device__ void activate(Value (&y)[kAtOnce][kLanes], const Job<Value>& job, int64_t first,
                         int channel, bool exists) {
  constexpr bool is_quick = S::kFrame == 2;
  if (job.weight) {
    Value squares[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const Value value = exists ? y[i][lane] : Value{0};
        squares[i] = std::fma(value, value, squares[i]);
      }
    }
    sum_over_group(squares, job.group);
    Value weight[kLanes];
    read_parameters(weight, job.weight, channel);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Value factor = factor_of<is_quick>(squares[i], job.root);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const Value scaled = y[i][lane] * (factor * weight[lane]);
        y[i][lane] = job.silu ? silu_of<is_quick>(scaled) : scaled;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (first + i >= job.frames) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        y[i][lane] = 0;
      }
    }
  }
}

// Whole windows of m frames each, of the two frames before and of these four.
template <int m, int kSize, int kLanes, typename Value>
__device__ void write_windows(const Value (&window)[kAtOnce + 2][kLanes], const Job<Value>& job,
                              int64_t first, int64_t pixel, int channel) {
#pragma unroll
  for (int n = 0; n < kAtOnce / m; ++n) {
    if (first + n * m >= job.frames) {
      break;
    }
    each_of<m + 2>([&](auto index) {
      constexpr int j = decltype(index)::value;
      Value transformed[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        Value terms[m + 2];
#pragma unroll
        for (int i = 0; i < m + 2; ++i) {
          terms[i] = window[n * m + i][lane];
        }
        to_unit_points<m>(terms, job.point);
        transformed[lane] = combine<WindowRow<m, j>>(terms);
      }
      const int64_t row = j * job.blocks + first / m + n;
      write<kSize>(job.transformed, job.offset(row, pixel) + channel, transformed);
    });
  }
}

// Blocks that a multiprocessor has the registers for: eight or twelve products in flight need more
// of them, and so do residuals of twice the size of products.
template <typename S, int kProducts>
constexpr int kResident = kProducts == 3 || kProducts == 4 || S::kSum > S::kProduct ? 1 : 2;

template <typename S, int kProducts>
__global__ void __launch_bounds__(kMostThreads, kResident<S, kProducts>)
    transform_kernel(const Job<typename S::Value> job) {
  using Value = typename S::Value;
  constexpr int kLanes = S::kLanes;
  const int of_block = static_cast<int>(blockDim.x) / job.group;
  const int own_channel = static_cast<int>(threadIdx.x) % job.group * kLanes;
  for (int64_t next = int64_t{blockIdx.x} * of_block; next < job.pixels;
       next += int64_t{gridDim.x} * of_block) {
    // Past the last pixel or channel, what is there is read once more, and nothing written.
    const int64_t own_pixel = next + static_cast<int>(threadIdx.x) / job.group;
    const bool exists = own_channel < job.channels, inside = exists && own_pixel < job.pixels;
    const int64_t pixel = own_pixel < job.pixels ? own_pixel : next;
    const int channel = exists ? own_channel : 0;
    Value window[kAtOnce + 2][kLanes] = {};
    if (job.to && job.past) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vectors<S::kFrame, kLanes> past;
        past.load(job.past.data, job.offset(i, pixel) + channel);
        past.unpack(window[i], job.past.dtype);
      }
    }
    if (job.to == 1 && inside) {
      write<S::kFrame>(job.transformed, job.offset(0, pixel) + channel, window[0]);
      write<S::kFrame>(job.transformed, job.offset(1, pixel) + channel, window[1]);
    }
    if (job.to && job.frames == 1 && inside) {
      write<S::kFrame>(job.last, job.offset(0, pixel) + channel, window[1]);
    }
    for (int64_t first = 0; first < job.frames; first += kAtOnce) {
      Value y[kAtOnce][kLanes];
      read_sums<S, kProducts>(y, job, first, pixel, channel);
      if (job.sum && inside) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < job.frames) {
            write<S::kSum>(job.sum, job.offset(first + i, pixel) + channel, y[i]);
          }
        }
      }
      if (job.to == 0) {
        continue;
      }
      activate<S>(y, job, first, channel, exists);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          window[2 + i][lane] = y[i][lane];
        }
      }
      if (inside) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t of_last = first + i - (job.frames - 2);
          if (of_last >= 0 && of_last < 2) {
            write<S::kFrame>(job.last, job.offset(of_last, pixel) + channel, y[i]);
          }
          if (job.to == 1 && first + i < job.frames) {
            write<S::kFrame>(job.transformed, job.offset(first + i + 2, pixel) + channel, y[i]);
          }
        }
        if (job.to == 4) {
          write_windows<4, S::kFrame>(window, job, first, pixel, channel);
        } else if (job.to == 2) {
          write_windows<2, S::kFrame>(window, job, first, pixel, channel);
        }
      }
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        window[0][lane] = window[kAtOnce][lane];
        window[1][lane] = window[kAtOnce + 1][lane];
      }
    }
  }
}

template <typename Value>
__device__ void write_element(const Rows& rows, int64_t offset, Value value) {
  if constexpr (std::is_same_v<Value, double>) {
    *rows.to<double>(offset) = value;
  } else if (rows.dtype == ScalarType::Float) {
    *rows.to<float>(offset) = value;
  } else if (rows.dtype == ScalarType::Half) {
    *rows.to<Half>(offset) = convert<Half>(value);
  } else {
    *rows.to<BFloat16>(offset) = convert<BFloat16>(value);
  }
}

// Of a tensor that is float64 where the others are.
template <typename Value>
__device__ Value frame_element(const Rows& rows, int64_t offset) {
  if constexpr (std::is_same_v<Value, double>) {
    return *rows.at<double>(offset);
  } else {
    return element<Value>(rows, offset);
  }
}

// y of frame t.
template <int kProducts, typename Value>
__device__ Value sum_of(const Job<Value>& job, int64_t t, int64_t pixel, int channel) {
  constexpr int m = Block<kProducts>::m;
  Value terms[kProducts], sum = 0;
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
    terms[k] =
        frame_element<Value>(job.product[k], job.offset(t / m, pixel) + channel) * job.scale[k];
  }
  each_of<m>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if (t % m == i) {
      sum = frame_of<kProducts, i>(terms, job.point);
    }
  });
  if (job.bias) {
    sum += element<Value>(job.bias, channel);
  }
  if (job.residual) {
    sum += frame_element<Value>(job.residual, job.offset(t, pixel) + channel);
  }
  return sum;
}

// Anything, one channel at a time: a warp takes a pixel's window of `to` frames, and adds up what
// belongs to the two frames before once more.
template <typename Value, int kProducts>
__global__ void __launch_bounds__(kThreads, 2) transform_elements_kernel(const Job<Value> job) {
  constexpr int64_t kWarps = kThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, to = job.to ? job.to : 1;
  for (int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
       unit < job.pixels * job.blocks; unit += int64_t{gridDim.x} * kWarps) {
    const int64_t pixel = unit % job.pixels, block = unit / job.pixels, begin = block * to - 2;
    Value squares[kAtOnce + 2] = {};
    for (int channel = lane; channel < job.channels; channel += kWarp) {
#pragma unroll
      for (int i = 0; i < kAtOnce + 2; ++i) {
        const int64_t t = begin + i;
        if (i < (job.to ? 0 : 2) || i >= to + 2 || t < 0 || t >= job.frames) {
          continue;
        }
        const Value sum = sum_of<kProducts>(job, t, pixel, channel);
        squares[i] += sum * sum;
        if (i >= 2 && job.sum) {
          write_element(job.sum, job.offset(t, pixel) + channel, sum);
        }
      }
    }
    if (job.to == 0) {
      continue;
    }
    sum_over_group(squares, kWarp);
    for (int channel = lane; channel < job.channels; channel += kWarp) {
      Value window[kAtOnce + 2] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce + 2; ++i) {
        const int64_t t = begin + i;
        if (i >= to + 2) {
          break;
        }
        if (t < 0) {
          window[i] =
              job.past ? frame_element<Value>(job.past, job.offset(t + 2, pixel) + channel) : 0;
        } else if (t < job.frames) {
          window[i] = sum_of<kProducts>(job, t, pixel, channel);
          if (job.weight) {
            const Value weight = element<Value>(job.weight, channel);
            const Value scaled = window[i] * (factor_of<false>(squares[i], job.root) * weight);
            window[i] = job.silu ? silu_of<false>(scaled) : scaled;
          }
        }
        // The last two of past and frames, by the unit that the frame is new to.
        const int64_t of_last = t - (job.frames - 2);
        if (of_last >= 0 && of_last < 2 && (i >= 2 || t < 0)) {
          write_element(job.last, job.offset(of_last, pixel) + channel, window[i]);
        }
      }
      if (job.to == 1) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i == 2 || block == 0) {
            write_element(job.transformed, job.offset(block + i, pixel) + channel, window[i]);
          }
        }
      }
      auto transform = [&](auto outputs) {
        constexpr int m = decltype(outputs)::value;
        to_unit_points<m>(window, job.point);
        each_of<m + 2>([&](auto index) {
          constexpr int j = decltype(index)::value;
          write_element(job.transformed, job.offset(j * job.blocks + block, pixel) + channel,
                        combine<WindowRow<m, j>>(window));
        });
      };
      if (job.to == 2) {
        transform(std::integral_constant<int, 2>{});
      } else if (job.to == 4) {
        transform(std::integral_constant<int, 4>{});
      }
    }
  }
}

constexpr int64_t kMostChannels = int64_t{1} << 30, kMostBlocks = (int64_t{1} << 31) - 1;

// The grid ends at 2^31 - 1, beyond which a block takes further pixels.
unsigned blocks_for(int64_t units, int64_t of_block) {
  return static_cast<unsigned>(std::min((units + of_block - 1) / of_block, kMostBlocks));
}

// f(integral_constant) for the number of products.
template <typename F>
void with_products(size_t count, F&& f) {
  if (count == 6) {
    f(std::integral_constant<int, 6>{});
  } else if (count == 4) {
    f(std::integral_constant<int, 4>{});
  } else if (count == 3) {
    f(std::integral_constant<int, 3>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

template <typename S>
bool fits(const FrameArguments& arguments) {
  auto has = [](ScalarType dtype, int size) {
    return (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2) == size;
  };
  return has(arguments.first().scalar_type(), S::kProduct) &&
         has(arguments.dtype_of_sum(), S::kSum) && has(arguments.dtype_of_frames(), S::kFrame);
}

// Launches the kernel of vectors, if it takes these dtypes and channels.
template <typename S>
bool run_vectors(const FrameArguments& arguments, Job<typename S::Value> job, cudaStream_t stream) {
  if (!fits<S>(arguments) || job.channels % S::kLanes || job.channels > kMostThreads * S::kLanes) {
    return false;
  }
  for (const Rows& rows :
       {job.product[0], job.product[1], job.product[2], job.product[3], job.product[4],
        job.product[5], job.bias, job.residual, job.weight, job.past}) {
    if (reinterpret_cast<uintptr_t>(rows.data) % sizeof(uint4)) {
      return false;
    }
  }
  const int needed = job.channels / S::kLanes;
  if (needed > kWarp) {
    job.group = (needed + kWarp - 1) / kWarp * kWarp;
  } else {
    for (job.group = 1; job.group < needed; job.group *= 2) {
    }
  }
  const int threads = job.group > kWarp ? job.group : kThreads;
  with_products(arguments.products.size(), [&](auto count) {
    launch_blocks(arguments.op, transform_kernel<S, decltype(count)::value>,
                  dim3(blocks_for(job.pixels, threads / job.group)), threads, stream, job);
  });
  return true;
}

template <typename Value>
void run_elements(const FrameArguments& arguments, const Job<Value>& job, cudaStream_t stream) {
  with_products(arguments.products.size(), [&](auto count) {
    launch_warps(arguments.op, transform_elements_kernel<Value, decltype(count)::value>,
                 dim3(blocks_for(job.pixels * job.blocks, kThreads / kWarp)), kThreads, stream,
                 job);
  });
}

Rows rows_of(const std::optional<Tensor>& x) {
  if (!x.has_value() || x->numel() == 0) {
    return {};
  }
  return {x->const_data_ptr(), x->scalar_type()};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& parameter) {
  return parameter.has_value() ? std::make_optional(torch::stable::contiguous(*parameter))
                               : std::nullopt;
}

template <typename Value>
void transform_all(const FrameArguments& arguments, const FrameResults& results) {
  const Tensor& first = arguments.first();
  if (first.size(1) > kMostChannels) {
    fail(arguments.op, ": products must have at most ", kMostChannels, " channels on CUDA, got ",
         first.size(1));
  }
  Job<Value> job{};
  std::vector<Tensor> products;
  for (size_t k = 0; k < arguments.products.size(); ++k) {
    products.push_back(dense_rows(arguments.products[k]));
    job.product[k] = rows_of(products[k]);
    job.scale[k] = arguments.scales.has_value() ? static_cast<Value>((*arguments.scales)[k]) : 1;
  }
  const auto bias = contiguous(arguments.bias), weight = contiguous(arguments.weight);
  const auto residual = dense_rows(arguments.residual), past = dense_rows(arguments.past);
  job.bias = rows_of(bias);
  job.residual = rows_of(residual);
  job.weight = rows_of(weight);
  job.past = rows_of(past);
  job.sum = rows_of(results.sum);
  job.transformed = rows_of(results.transformed);
  job.last = rows_of(results.last);
  job.point = Point<Value>(arguments.point);
  job.frames = arguments.frames;
  job.pixels = arguments.batch() * first.size(2) * first.size(3);
  job.blocks = blocks_of(arguments.frames, std::max<int64_t>(arguments.to, 1));
  job.channels = static_cast<int>(first.size(1));
  job.root = std::sqrt(static_cast<Value>(first.size(1)));
  job.to = static_cast<int>(arguments.to);
  job.silu = arguments.silu;
  const cudaStream_t stream = current_stream(first.get_device_index());
  bool done;
  if constexpr (std::is_same_v<Value, double>) {
    done = run_vectors<Sizes<8, 8, 8>>(arguments, job, stream);
  } else {
    done = run_vectors<Sizes<2, 2, 2>>(arguments, job, stream) ||
           run_vectors<Sizes<2, 4, 2>>(arguments, job, stream) ||
           run_vectors<Sizes<4, 4, 2>>(arguments, job, stream) ||
           run_vectors<Sizes<4, 4, 4>>(arguments, job, stream);
  }
  if (!done) {
    run_elements(arguments, job, stream);
  }
}

FrameResults compute(const FrameArguments& arguments) {
  const Tensor& first = arguments.first();
  const DeviceGuard guard(first.get_device_index());
  const FrameResults results = allocating(arguments.op, [&] {
    return empty_results(arguments, [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
      return torch::stable::empty(sizes, dtype, std::nullopt, first.device());
    });
  });
  if (first.numel() > 0 && (arguments.keep_sum || arguments.to)) {
    if (first.scalar_type() == ScalarType::Double) {
      transform_all<double>(arguments, results);
    } else {
      transform_all<float>(arguments, results);
    }
  }
  return results;
}

}  // namespace
}  // namespace cosmos3

COSMOS3_CUDA_KERNELS(m) {
  m.impl("transform_frames", TORCH_BOX(&cosmos3::transform_frames<cosmos3::compute>));
}
