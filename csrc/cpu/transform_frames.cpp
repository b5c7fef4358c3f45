// CPU kernel of cosmos3::transform_frames: one pass over pixels, each through all its frames. Its
// channels of a few frames fit in the first-level cache, so that they are summed, normalized and
// transformed without further memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../transform_frames.h"
#include "huge_pages.h"
#include "norms.h"
#include "simd.h"

namespace cosmos3 {
namespace {

constexpr int kMost = 6;  // products, and transformed frames

// A tensor [..., C] in memory, seen as rows of one pixel's channels; without data it is absent.
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

  static constexpr ScalarType dtype() {
    return std::is_same_v<Value, double> ? ScalarType::Double : ScalarType::Float;
  }
};

template <typename T, typename Value>
COSMOS3_INLINE void convert_row(Value* __restrict__ to, const T* __restrict__ from,
                                int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = convert<Value>(from[c]);
  }
}

// Row `row` of `rows`: where it lies, or converted to `held`.
template <typename Value>
COSMOS3_INLINE const Value* read_row(Value* held, const Rows& rows, int64_t row, int64_t channels) {
  if constexpr (std::is_same_v<Value, float>) {
    if (rows.dtype == ScalarType::BFloat16) {
      convert_row(held, static_cast<const BFloat16*>(rows.data) + row * channels, channels);
      return held;
    }
    if (rows.dtype == ScalarType::Half) {
      convert_row(held, static_cast<const Half*>(rows.data) + row * channels, channels);
      return held;
    }
  }
  return static_cast<const Value*>(rows.data) + row * channels;
}

template <typename Value>
COSMOS3_INLINE void write_row(const Rows& rows, int64_t row, const Value* from, int64_t channels) {
  if constexpr (std::is_same_v<Value, float>) {
    if (rows.dtype == ScalarType::BFloat16) {
      return convert_row(static_cast<BFloat16*>(rows.data) + row * channels, from, channels);
    }
    if (rows.dtype == ScalarType::Half) {
      return convert_row(static_cast<Half*>(rows.data) + row * channels, from, channels);
    }
  }
  convert_row(static_cast<Value*>(rows.data) + row * channels, from, channels);
}

// The rows of one pixel that are at work.
template <typename Value>
struct Held {
  explicit Held(int64_t channels) : memory((3 * kMost + 4) * channels) {
    Value* next = memory.data();
    for (auto* rows : {read, window, written}) {
      for (int i = 0; i < kMost; ++i, next += channels) {
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

// The frames of a block, without bias and residual.
template <int kProducts, typename Value, size_t... i>
COSMOS3_INLINE void sum_block(Value* __restrict__ sums, const Value* const (&from)[kMost],
                              const Job<Value>& job, std::index_sequence<i...>) {
  const int64_t channels = job.channels;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    Value terms[kProducts];
    for (int k = 0; k < kProducts; ++k) {
      terms[k] = from[k][c] * job.scales[k];
    }
    ((sums[i * channels + c] = combine<FrameRow<kProducts, i>>(terms) + job.bias[c]), ...);
  }
}

// The transformed frames of a window.
template <int m, typename Value, size_t... j>
COSMOS3_INLINE void transform_window(Value* const (&to)[kMost], const Value* const* window,
                                     int64_t channels, std::index_sequence<j...>) {
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    Value terms[m + 2];
    for (int i = 0; i < m + 2; ++i) {
      terms[i] = window[i][c];
    }
    ((to[j][c] = combine<WindowRow<m, j>>(terms)), ...);
  }
}

// Sums of block `block` of one pixel to held.sums.
template <int kProducts, typename Value>
COSMOS3_INLINE void read_block(const Job<Value>& job, Held<Value>& held, int64_t block,
                               int64_t pixel) {
  const Value* from[kMost];
  for (int k = 0; k < kProducts; ++k) {
    from[k] = read_row(held.read[k], job.product[k], block * job.pixels + pixel, job.channels);
  }
  sum_block<kProducts>(held.sums, from, job, std::make_index_sequence<Block<kProducts>::m>());
}

template <int m, typename Value>
COSMOS3_INLINE void write_transformed(const Job<Value>& job, Held<Value>& held, int64_t block,
                                      int64_t pixel) {
  const int64_t blocks = blocks_of(job.frames, m), size = job.channels;
  constexpr auto rows = std::make_index_sequence<m + 2>();
  Value* to[kMost];
  const bool in_place = job.transformed.dtype == job.dtype();
  for (int j = 0; j < m + 2; ++j) {
    const int64_t row = (j * blocks + block) * job.pixels + pixel;
    to[j] = in_place ? static_cast<Value*>(job.transformed.data) + row * size : held.written[j];
  }
  transform_window<m>(to, held.window, size, rows);
  for (int j = 0; !in_place && j < m + 2; ++j) {
    write_row(job.transformed, (j * blocks + block) * job.pixels + pixel, to[j], size);
  }
}

// a = act(y / norm * weight), or y.
template <typename Value>
COSMOS3_INLINE void activate(Value* __restrict__ a, const Value* __restrict__ y,
                             const Job<Value>& job) {
  const int64_t channels = job.channels;
  if (job.weight == nullptr) {
    convert_row(a, y, channels);
    return;
  }
  const Value inverse = inverse_norm(y, channels);
  const Value* __restrict__ weight = job.weight;
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

// The window that has `filled` frames behind its first two goes out; the last two become the first.
template <typename Value>
COSMOS3_INLINE void write_window(const Job<Value>& job, Held<Value>& held, int64_t block,
                                 int64_t filled, int64_t pixel) {
  for (int64_t i = filled; i < job.to; ++i) {
    std::fill_n(held.window[2 + i], job.channels, Value{0});
  }
  if (job.to == 4) {
    write_transformed<4>(job, held, block, pixel);
  } else if (job.to == 2) {
    write_transformed<2>(job, held, block, pixel);
  } else {
    write_row(job.transformed, (block + 2) * job.pixels + pixel, held.window[2], job.channels);
  }
  std::rotate(held.window, held.window + job.to, held.window + job.to + 2);
}

template <typename Value>
COSMOS3_INLINE void run_pixel(const Job<Value>& job, Held<Value>& held, int64_t pixel) {
  const int64_t frames = job.frames, pixels = job.pixels, channels = job.channels;
  const int64_t m = frames_of_block(job.products);
  for (int i = 0; job.to && i < 2; ++i) {
    if (job.past.data != nullptr) {
      convert_row(held.window[i], read_row(held.read[0], job.past, i * pixels + pixel, channels),
                  channels);
    } else {
      std::fill_n(held.window[i], channels, Value{0});
    }
    if (job.to == 1) {
      write_row(job.transformed, i * pixels + pixel, held.window[i], channels);
    }
  }
  if (job.to && frames == 1) {
    write_row(job.last, pixel, held.window[1], channels);
  }
  int64_t filled = 0, window = 0;
  for (int64_t first = 0; first < frames; first += m) {
    if (job.products == 6) {
      read_block<6>(job, held, first / m, pixel);
    } else if (job.products == 4) {
      read_block<4>(job, held, first / m, pixel);
    } else if (job.products == 3) {
      read_block<3>(job, held, first / m, pixel);
    } else {
      read_block<1>(job, held, first / m, pixel);
    }
    for (int64_t t = first; t < std::min(first + m, frames); ++t) {
      Value* y = held.sums + (t - first) * channels;
      if (job.residual.data != nullptr) {
        const Value* residual = read_row(held.read[0], job.residual, t * pixels + pixel, channels);
        for (int64_t c = 0; c < channels; ++c) {
          y[c] += residual[c];
        }
      }
      if (job.sum.data != nullptr) {
        write_row(job.sum, t * pixels + pixel, y, channels);
      }
      if (job.to == 0) {
        continue;
      }
      Value* a = held.window[2 + filled];
      activate(a, y, job);
      if (t >= frames - 2) {
        write_row(job.last, (t - (frames - 2)) * pixels + pixel, a, channels);
      }
      if (++filled == job.to) {
        write_window(job, held, window++, filled, pixel);
        filled = 0;
      }
    }
  }
  if (filled) {
    write_window(job, held, window, filled, pixel);
  }
}

COSMOS3_CLONES void run(const Job<float>& job, Held<float>& held, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    run_pixel(job, held, pixel);
  }
}
COSMOS3_CLONES void run(const Job<double>& job, Held<double>& held, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    run_pixel(job, held, pixel);
  }
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
  const int64_t grain =
      std::max<int64_t>(1, 16384 / (channels * std::min<int64_t>(job.frames, 16384)));
  torch::stable::parallel_for(0, job.pixels, grain, [&](int64_t begin, int64_t end) {
    Held<Value> held(channels);
    run(job, held, begin, end);
  });
}

FrameResults compute(const FrameArguments& arguments) {
  return allocating(arguments.op, [&] {
    const FrameResults results = empty_results(arguments);
    for (const Tensor* each : {&results.sum, &results.transformed, &results.last}) {
      prefer_huge_pages(*each);
    }
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
      "ScalarType? frames_dtype=None) -> (Tensor sum, Tensor transformed, Tensor last)");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("transform_frames", TORCH_BOX(&cosmos3::transform_frames<cosmos3::compute>));
}
