// CPU kernels of cosmos3::rms_norm_silu, add_rms_norm_silu and add_pad: one pass over channels-last
// pixels. A pixel's channels fit in the first-level cache, so that they are summed, measured and
// scaled without further memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../addends.h"
#include "../channels_last.h"
#include "../dtypes.h"
#include "norms.h"
#include "results.h"
#include "simd.h"

namespace cosmos3 {
namespace {

// Images are [B, H, W, C] in memory. `bias`, `residual`, `sum` and `activated` may be null.
template <typename T>
struct Job {
  const T* x;
  const Compute<T>* bias;
  const T* residual;
  Factors factors;
  const Compute<T>* scale;  // sqrt(C) * weight, or ones
  T* sum;
  T* activated;
  int64_t channels, height, width;
  int64_t pad;  // rows and columns of zeros after those of `sum`
  bool silu;
};

// Adds the averages of the residual's cells, each to the last of `t` channels. They are taken
// behind the channels.
template <typename T>
COSMOS3_INLINE void add_averages(Compute<T>* to, const Job<T>& job, int64_t b, int64_t row,
                                 int64_t column) {
  const int64_t t = job.factors.t, s = job.factors.s, channels = job.channels / t;
  const int64_t pitch = job.width * s * channels;
  const T* cell = job.residual + (b * job.height + row) * s * pitch + column * s * channels;
  Compute<T>* total = to + job.channels;
  for (int64_t c = 0; c < channels; ++c) {
    total[c] = convert<Compute<T>>(cell[c]);
  }
  for (int64_t i = 1; i < s * s; ++i) {
    const T* pixel = cell + i / s * pitch + i % s * channels;
    for (int64_t c = 0; c < channels; ++c) {
      total[c] += convert<Compute<T>>(pixel[c]);
    }
  }
  const Compute<T> area = static_cast<Compute<T>>(s * s);
  for (int64_t c = 0; c < channels; ++c) {
    to[c * t + t - 1] += total[c] / area;
  }
}

// One pixel's x + bias + residual: written to `held`, or where it already lies.
template <typename T>
COSMOS3_INLINE const Compute<T>* add_up(Compute<T>* held, const Job<T>& job, int64_t b, int64_t row,
                                        int64_t column) {
  const int64_t channels = job.channels;
  const int64_t pixel = (b * job.height + row) * job.width + column;
  const T* x = job.x + pixel * channels;
  if constexpr (std::is_same_v<T, Compute<T>>) {
    if (job.bias == nullptr && job.residual == nullptr) {
      return x;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    held[c] = convert<Compute<T>>(x[c]);
  }
  if (job.bias != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      held[c] += job.bias[c];
    }
  }
  if (job.residual != nullptr) {
    if (job.factors.t == 1 && job.factors.s == 1) {
      const T* residual = job.residual + pixel * channels;
      for (int64_t c = 0; c < channels; ++c) {
        held[c] += convert<Compute<T>>(residual[c]);
      }
    } else {
      add_averages(held, job, b, row, column);
    }
  }
  return held;
}

template <typename T>
COSMOS3_INLINE void run_lines(const Job<T>& job, Compute<T>* held, int64_t begin, int64_t end) {
  const int64_t channels = job.channels, lines = job.height + job.pad;
  const int64_t pitch = (job.width + job.pad) * channels;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t b = line / lines, row = line % lines;
    if (row == job.height) {
      std::fill(job.sum + line * pitch, job.sum + (line + 1) * pitch, convert<T>(0.0f));
      continue;
    }
    for (int64_t column = 0; column < job.width; ++column) {
      const Compute<T>* value = add_up(held, job, b, row, column);
      if (job.sum != nullptr) {
        T* sum = job.sum + line * pitch + column * channels;
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] = convert<T>(value[c]);
        }
      }
      if (job.activated == nullptr) {
        continue;
      }
      const Compute<T> inverse = inverse_norm(value, channels);
      T* out = job.activated + line * pitch + column * channels;
      if (job.silu) {
        for (int64_t c = 0; c < channels; ++c) {
          const Compute<T> scaled = value[c] * inverse * job.scale[c];
          out[c] = convert<T>(scaled / (Compute<T>{1} + exponential(-scaled)));
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          out[c] = convert<T>(value[c] * inverse * job.scale[c]);
        }
      }
    }
    if (job.pad) {
      std::fill(job.sum + (line + 1) * pitch - channels, job.sum + (line + 1) * pitch,
                convert<T>(0.0f));
    }
  }
}

COSMOS3_CLONES void run(const Job<float>& job, float* held, int64_t begin, int64_t end) {
  run_lines(job, held, begin, end);
}
COSMOS3_CLONES void run(const Job<BFloat16>& job, float* held, int64_t begin, int64_t end) {
  run_lines(job, held, begin, end);
}
COSMOS3_CLONES void run(const Job<Half>& job, float* held, int64_t begin, int64_t end) {
  run_lines(job, held, begin, end);
}
COSMOS3_CLONES void run(const Job<double>& job, double* held, int64_t begin, int64_t end) {
  run_lines(job, held, begin, end);
}

template <typename T>
T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

// Writes what of `sum` and `activated` there is.
void add_and_normalize(const Tensor& x, const std::optional<Tensor>& weight, bool silu,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                       int64_t pad, const std::optional<Tensor>& sum,
                       const std::optional<Tensor>& activated) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  if ((sum.has_value() ? *sum : *activated).numel() == 0) {
    return;
  }
  const Tensor input = channels_last(x);
  const std::optional<Tensor> added =
      residual.has_value() ? std::make_optional(channels_last(*residual)) : std::nullopt;
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using Value = Compute<T>;
    const auto scale = values_of<Value>(weight, std::sqrt(static_cast<Value>(channels)),
                                        std::vector<Value>(channels, 1));
    const auto biases = values_of<Value>(bias, 1, {});
    const Job<T> job{static_cast<const T*>(input.const_data_ptr()),
                     biases.empty() ? nullptr : biases.data(),
                     data_of<T>(added),
                     factors_of(x, residual),
                     scale.data(),
                     data_of<T>(sum),
                     data_of<T>(activated),
                     channels,
                     height,
                     width,
                     pad,
                     silu};
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width * channels));
    torch::stable::parallel_for(0, x.size(0) * (height + pad), grain,
                                [&](int64_t begin, int64_t end) {
                                  std::vector<Value> held(2 * channels);
                                  run(job, held.data(), begin, end);
                                });
  });
}

Tensor empty_like_image(const Tensor& x, int64_t pad = 0) {
  return new_image(x.size(0), x.size(1), x.size(2) + pad, x.size(3) + pad, x.scalar_type());
}

Tensor rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu, std::optional<Tensor> bias,
                     std::optional<Tensor> residual) {
  const char* op = "rms_norm_silu";
  check_addends(op, x, weight, bias, residual);
  return allocating(op, [&] {
    Tensor out = empty_like_image(x);
    add_and_normalize(x, weight, silu, bias, residual, 0, std::nullopt, out);
    return out;
  });
}

std::tuple<Tensor, Tensor> add_rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu,
                                             std::optional<Tensor> bias,
                                             std::optional<Tensor> residual) {
  const char* op = "add_rms_norm_silu";
  check_addends(op, x, weight, bias, residual);
  return allocating(op, [&] {
    Tensor sum = empty_like_image(x), out = empty_like_image(x);
    add_and_normalize(x, weight, silu, bias, residual, 0, sum, out);
    return std::make_tuple(sum, out);
  });
}

Tensor add_pad(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual, bool pad) {
  const char* op = "add_pad";
  check_addends(op, x, std::nullopt, bias, residual);
  return allocating(op, [&] {
    Tensor sum = empty_like_image(x, pad);
    add_and_normalize(x, std::nullopt, false, bias, residual, pad, sum, std::nullopt);
    return sum;
  });
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def(
      "rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
      "Tensor? residual=None) -> Tensor");
  m.def(
      "add_rms_norm_silu(Tensor x, Tensor? weight, bool silu=True, Tensor? bias=None, "
      "Tensor? residual=None) -> (Tensor sum, Tensor activated)");
  m.def("add_pad(Tensor x, Tensor? bias=None, Tensor? residual=None, bool pad=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("rms_norm_silu", TORCH_BOX(&cosmos3::rms_norm_silu));
  m.impl("add_rms_norm_silu", TORCH_BOX(&cosmos3::add_rms_norm_silu));
  m.impl("add_pad", TORCH_BOX(&cosmos3::add_pad));
}
