// CPU kernel of cosmos3::transform_frames: one pass over pixels, a few of them at a time through
// all their frames. What is at work of them fits in the second-level cache, so that they are
// summed, normalized and transformed without further memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../transform_frames.h"
#include "norms.h"
#include "results.h"
#include "simd.h"

namespace cosmos3 {
namespace {

constexpr int kMost = 6;  // products, and transformed frames
// Values that go through their frames together: long enough for a core to fetch ahead, and what is
// at work of them, up to 22 times as many, stays in the second-level cache.
constexpr int64_t kRun = 4096;

// A tensor [..., C] in memory; without data it is absent.
struct Rows {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
};

template <typename Value>
struct Job {
  int products, to;
  bool silu;
  int64_t frames, pixels, channels;  // pixels of one frame of the whole batch
  Rows product[kMost];
  Value scales[kMost];
  const Value* bias;    // zeros where there is none
  const Value* weight;  // times sqrt(C); null where nothing is normalized
  Rows residual, past, sum, transformed, last;
  Point<Value> point;

  static constexpr ScalarType dtype() {
    return std::is_same_v<Value, double> ? ScalarType::Double : ScalarType::Float;
  }
};

// A run of pixels that lie side by side in memory, `size` values in all.
struct Run {
  int64_t pixel, size;
};

template <typename T, typename Value>
COSMOS3_INLINE void convert_values(Value* __restrict__ to, const T* __restrict__ from,
                                   int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = convert<Value>(from[i]);
  }
}

// Frame `frame` of `rows`: where it lies, or converted to `held`.
template <typename Value>
COSMOS3_INLINE const Value* read(Value* held, const Rows& rows, const Job<Value>& job,
                                 int64_t frame, Run run) {
  const int64_t offset = (frame * job.pixels + run.pixel) * job.channels;
  if constexpr (std::is_same_v<Value, float>) {
    if (rows.dtype == ScalarType::BFloat16) {
      convert_values(held, static_cast<const BFloat16*>(rows.data) + offset, run.size);
      return held;
    }
    if (rows.dtype == ScalarType::Half) {
      convert_values(held, static_cast<const Half*>(rows.data) + offset, run.size);
      return held;
    }
  }
  return static_cast<const Value*>(rows.data) + offset;
}

template <typename Value>
COSMOS3_INLINE void write(const Rows& rows, const Job<Value>& job, int64_t frame, Run run,
                          const Value* from) {
  const int64_t offset = (frame * job.pixels + run.pixel) * job.channels;
  if constexpr (std::is_same_v<Value, float>) {
    if (rows.dtype == ScalarType::BFloat16) {
      return convert_values(static_cast<BFloat16*>(rows.data) + offset, from, run.size);
    }
    if (rows.dtype == ScalarType::Half) {
      return convert_values(static_cast<Half*>(rows.data) + offset, from, run.size);
    }
  }
  convert_values(static_cast<Value*>(rows.data) + offset, from, run.size);
}

// The values of one run that are at work.
template <typename Value>
struct Held {
  explicit Held(int64_t size) : memory((3 * kMost + 4) * size) {
    Value* next = memory.data();
    for (auto* rows : {read, window, written}) {
      for (int i = 0; i < kMost; ++i, next += size) {
        rows[i] = next;
      }
    }
    sums = next;
  }

  std::vector<Value> memory;
  Value* read[kMost];
  Value* window[kMost];
  Value* written[kMost];
  Value* sums;  // of up to four frames
};

// The frames of a block, without residual.
template <int kProducts, typename Value, size_t... i>
COSMOS3_INLINE void sum_block(Value* __restrict__ sums, const Value* const (&from)[kMost],
                              const Job<Value>& job, int64_t size, std::index_sequence<i...>) {
  const int64_t channels = job.channels;
  for (int64_t start = 0; start < size; start += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      Value terms[kProducts];
      for (int k = 0; k < kProducts; ++k) {
        terms[k] = from[k][start + c] * job.scales[k];
      }
      ((sums[i * size + start + c] = frame_of<kProducts, i>(terms, job.point) + job.bias[c]), ...);
    }
  }
}

// The transformed frames of a window.
template <int m, typename Value, size_t... j>
COSMOS3_INLINE void transform_window(Value* const (&to)[kMost], const Value* const* window,
                                     const Point<Value>& point, int64_t size,
                                     std::index_sequence<j...>) {
#pragma GCC ivdep
  for (int64_t c = 0; c < size; ++c) {
    Value terms[m + 2];
    for (int i = 0; i < m + 2; ++i) {
      terms[i] = window[i][c];
    }
    to_unit_points<m>(terms, point);
    ((to[j][c] = combine<WindowRow<m, j>>(terms)), ...);
  }
}

// Sums of block `block` of a run to held.sums.
template <int kProducts, typename Value>
COSMOS3_INLINE void read_block(const Job<Value>& job, Held<Value>& held, int64_t block, Run run) {
  const Value* from[kMost];
  for (int k = 0; k < kProducts; ++k) {
    from[k] = read(held.read[k], job.product[k], job, block, run);
  }
  sum_block<kProducts>(held.sums, from, job, run.size,
                       std::make_index_sequence<Block<kProducts>::m>());
}

template <int m, typename Value>
COSMOS3_INLINE void write_transformed(const Job<Value>& job, Held<Value>& held, int64_t block,
                                      Run run) {
  const int64_t blocks = blocks_of(job.frames, m);
  Value* to[kMost];
  const bool in_place = job.transformed.dtype == job.dtype();
  for (int j = 0; j < m + 2; ++j) {
    const int64_t offset = ((j * blocks + block) * job.pixels + run.pixel) * job.channels;
    to[j] = in_place ? static_cast<Value*>(job.transformed.data) + offset : held.written[j];
  }
  transform_window<m>(to, held.window, job.point, run.size, std::make_index_sequence<m + 2>());
  for (int j = 0; !in_place && j < m + 2; ++j) {
    write(job.transformed, job, j * blocks + block, run, to[j]);
  }
}

// a = act(y / norm * weight) of every pixel, or y.
template <typename Value>
COSMOS3_INLINE void activate(Value* __restrict__ a, const Value* __restrict__ y,
                             const Job<Value>& job, int64_t size) {
  const int64_t channels = job.channels;
  if (job.weight == nullptr) {
    convert_values(a, y, size);
    return;
  }
  const Value* __restrict__ weight = job.weight;
  for (; size > 0; size -= channels, a += channels, y += channels) {
    const Value inverse = inverse_norm(y, channels);
    if (job.silu) {
      for (int64_t c = 0; c < channels; ++c) {
        const Value scaled = y[c] * inverse * weight[c];
        a[c] = scaled / (Value{1} + exponential(-scaled));
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        a[c] = y[c] * inverse * weight[c];
      }
    }
  }
}

// The window that has `filled` frames behind its first two goes out; the last two become the first.
template <typename Value>
COSMOS3_INLINE void write_window(const Job<Value>& job, Held<Value>& held, int64_t block,
                                 int64_t filled, Run run) {
  for (int64_t i = filled; i < job.to; ++i) {
    std::fill_n(held.window[2 + i], run.size, Value{0});
  }
  if (job.to == 4) {
    write_transformed<4>(job, held, block, run);
  } else if (job.to == 2) {
    write_transformed<2>(job, held, block, run);
  } else {
    write(job.transformed, job, block + 2, run, held.window[2]);
  }
  std::rotate(held.window, held.window + job.to, held.window + job.to + 2);
}

template <typename Value>
COSMOS3_INLINE void run_frames(const Job<Value>& job, Held<Value>& held, Run run) {
  const int64_t frames = job.frames, size = run.size;
  const int64_t m = frames_of_block(job.products);
  for (int i = 0; job.to && i < 2; ++i) {
    if (job.past.data != nullptr) {
      convert_values(held.window[i], read(held.read[0], job.past, job, i, run), size);
    } else {
      std::fill_n(held.window[i], size, Value{0});
    }
    if (job.to == 1) {
      write(job.transformed, job, i, run, held.window[i]);
    }
  }
  if (job.to && frames == 1) {
    write(job.last, job, 0, run, held.window[1]);
  }
  int64_t filled = 0, window = 0;
  for (int64_t first = 0; first < frames; first += m) {
    if (job.products == 6) {
      read_block<6>(job, held, first / m, run);
    } else if (job.products == 4) {
      read_block<4>(job, held, first / m, run);
    } else if (job.products == 3) {
      read_block<3>(job, held, first / m, run);
    } else {
      read_block<1>(job, held, first / m, run);
    }
    for (int64_t t = first; t < std::min(first + m, frames); ++t) {
      Value* y = held.sums + (t - first) * size;
      if (job.residual.data != nullptr) {
        const Value* residual = read(held.read[0], job.residual, job, t, run);
        for (int64_t c = 0; c < size; ++c) {
          y[c] += residual[c];
        }
      }
      if (job.sum.data != nullptr) {
        write(job.sum, job, t, run, y);
      }
      if (job.to == 0) {
        continue;
      }
      Value* a = held.window[2 + filled];
      activate(a, y, job, size);
      if (t >= frames - 2) {
        write(job.last, job, t - (frames - 2), run, a);
      }
      if (++filled == job.to) {
        write_window(job, held, window++, filled, run);
        filled = 0;
      }
    }
  }
  if (filled) {
    write_window(job, held, window, filled, run);
  }
}

template <typename Value>
COSMOS3_INLINE void run_pixels(const Job<Value>& job, int64_t at_once, int64_t begin, int64_t end) {
  Held<Value> held(at_once * job.channels);
  for (int64_t pixel = begin; pixel < end; pixel += at_once) {
    run_frames(job, held, {pixel, std::min(at_once, end - pixel) * job.channels});
  }
}

COSMOS3_CLONES void run(const Job<float>& job, int64_t at_once, int64_t begin, int64_t end) {
  run_pixels(job, at_once, begin, end);
}
COSMOS3_CLONES void run(const Job<double>& job, int64_t at_once, int64_t begin, int64_t end) {
  run_pixels(job, at_once, begin, end);
}

Rows rows_of(const std::optional<Tensor>& x) {
  if (!x.has_value() || x->numel() == 0) {
    return {};
  }
  return {x->mutable_data_ptr(), x->scalar_type()};
}

template <typename Value>
void transform_all(const FrameArguments& arguments, const FrameResults& results) {
  const Tensor& first = arguments.first();
  const int64_t channels = first.size(1);
  Job<Value> job{};
  job.products = static_cast<int>(arguments.products.size());
  job.to = static_cast<int>(arguments.to);
  job.silu = arguments.silu;
  job.frames = arguments.frames;
  job.pixels = arguments.batch() * first.size(2) * first.size(3);
  job.channels = channels;
  std::vector<Tensor> products;
  for (int k = 0; k < job.products; ++k) {
    products.push_back(dense_rows(arguments.products[k]));
    job.product[k] = rows_of(products[k]);
    job.scales[k] = arguments.scales.has_value() ? static_cast<Value>((*arguments.scales)[k]) : 1;
  }
  const auto bias = values_of<Value>(arguments.bias, 1, std::vector<Value>(channels, 0));
  const auto weight =
      values_of<Value>(arguments.weight, std::sqrt(static_cast<Value>(channels)), {});
  job.bias = bias.data();
  job.weight = weight.empty() ? nullptr : weight.data();
  const auto residual = dense_rows(arguments.residual), past = dense_rows(arguments.past);
  job.residual = rows_of(residual);
  job.past = rows_of(past);
  job.sum = rows_of(results.sum);
  job.transformed = rows_of(results.transformed);
  job.last = rows_of(results.last);
  job.point = Point<Value>(arguments.point);
  const int64_t at_once = std::max<int64_t>(1, std::min(kRun / channels, job.pixels));
  const int64_t grain =
      std::max<int64_t>(1, 16384 / (channels * std::min<int64_t>(job.frames, 16384)));
  torch::stable::parallel_for(0, job.pixels, grain,
                              [&](int64_t begin, int64_t end) { run(job, at_once, begin, end); });
}

FrameResults compute(const FrameArguments& arguments) {
  return allocating(arguments.op, [&] {
    const FrameResults results = empty_results(arguments, new_result);
    if (arguments.first().numel() > 0) {
      if (arguments.first().scalar_type() == ScalarType::Double) {
        transform_all<double>(arguments, results);
      } else {
        transform_all<float>(arguments, results);
      }
    }
    return results;
  });
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def(
      "transform_frames(Tensor[] products, int frames, int to=0, Tensor? bias=None, "
      "Tensor? residual=None, Tensor? weight=None, bool silu=True, Tensor? past=None, "
      "float[]? scales=None, bool keep_sum=True, ScalarType? sum_dtype=None, "
      "ScalarType? frames_dtype=None, float point=1.) -> (Tensor sum, Tensor transformed, Tensor "
      "last)");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("transform_frames", TORCH_BOX(&cosmos3::transform_frames<cosmos3::compute>));
}
