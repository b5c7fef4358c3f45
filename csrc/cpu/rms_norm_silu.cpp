// CPU kernel of cosmos3::rms_norm_silu: one pass over channels-last pixels. A pixel's channels fit
// in the first-level cache, so the second reading (to scale) costs no memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "../checks.h"
#include "../dtypes.h"
#include "channels_last.h"
#include "simd.h"

namespace cosmos3 {
namespace {

void check_norm(const Tensor& x, const std::optional<Tensor>& weight) {
  const char* op = "rms_norm_silu";
  check_rank(op, "x", x, 4, "[B, C, H, W]");
  check_dtype(op, "x", x.scalar_type());
  if (weight.has_value()) {
    check_rank(op, "weight", *weight, 1, "[C]");
    check_dtype(op, "weight", weight->scalar_type());
    check_device(op, "weight", *weight, "x", x);
    if (weight->size(0) != x.size(1)) {
      fail(op, ": weight must have the C = ", x.size(1), " elements of x, got ", weight->size(0));
    }
  }
}

constexpr float kNormEps = 1e-12f;  // that of torch.nn.functional.normalize
constexpr int kLanes = 16;

template <typename T>
COSMOS3_INLINE void norm_pixels(T* out, const T* in, const float* scale, int64_t pixels,
                                int64_t channels, bool silu) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, in += channels, out += channels) {
    float partial[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = convert<float>(in[i + lane]);
        partial[lane] += value * value;
      }
    }
    float squares = 0.0f;
    for (; i < channels; ++i) {
      squares += convert<float>(in[i]) * convert<float>(in[i]);
    }
    for (float value : partial) {
      squares += value;
    }
    const float norm = std::sqrt(squares);
    const float inverse = 1.0f / (norm < kNormEps ? kNormEps : norm);
    if (silu) {
      for (int64_t c = 0; c < channels; ++c) {
        const float value = convert<float>(in[c]) * inverse * scale[c];
        out[c] = convert<T>(value / (1.0f + exp_approx(-value)));
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = convert<T>(convert<float>(in[c]) * inverse * scale[c]);
      }
    }
  }
}

COSMOS3_CLONES void run(float* out, const float* in, const float* scale, int64_t pixels,
                        int64_t channels, bool silu) {
  norm_pixels(out, in, scale, pixels, channels, silu);
}
COSMOS3_CLONES void run(BFloat16* out, const BFloat16* in, const float* scale, int64_t pixels,
                        int64_t channels, bool silu) {
  norm_pixels(out, in, scale, pixels, channels, silu);
}
COSMOS3_CLONES void run(Half* out, const Half* in, const float* scale, int64_t pixels,
                        int64_t channels, bool silu) {
  norm_pixels(out, in, scale, pixels, channels, silu);
}

void run(double* out, const double* in, const double* scale, int64_t pixels, int64_t channels,
         bool silu) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, in += channels, out += channels) {
    double squares = 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      squares += in[c] * in[c];
    }
    const double inverse = 1.0 / std::max(std::sqrt(squares), 1e-12);
    for (int64_t c = 0; c < channels; ++c) {
      const double value = in[c] * inverse * scale[c];
      out[c] = silu ? value / (1.0 + std::exp(-value)) : value;
    }
  }
}

// sqrt(C) * weight, or ones.
template <typename Scale>
std::vector<Scale> scale_of(const std::optional<Tensor>& weight, int64_t channels) {
  std::vector<Scale> scale(channels, Scale{1});
  if (weight.has_value()) {
    const Scale root = std::sqrt(static_cast<Scale>(channels));
    const int64_t stride = channels > 1 ? weight->stride(0) : 0;
    dispatch(weight->scalar_type(), [&](auto tag) {
      const auto* data = static_cast<const decltype(tag)*>(weight->const_data_ptr());
      for (int64_t c = 0; c < channels; ++c) {
        scale[c] = data[c * stride] * root;
      }
    });
  }
  return scale;
}

template <typename T, typename Scale>
void run_parallel(Tensor& out, const Tensor& x, const std::vector<Scale>& scale, bool silu) {
  const int64_t channels = x.size(1);
  const int64_t pixels = channels == 0 ? 0 : x.numel() / channels;
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, channels));
  torch::stable::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
    run(to + begin * channels, in + begin * channels, scale.data(), end - begin, channels, silu);
  });
}

Tensor normalize(const Tensor& x, const std::optional<Tensor>& weight, bool silu) {
  const Tensor input = channels_last(x);
  Tensor out = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  const int64_t channels = x.size(1);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    run_parallel<T>(out, input, scale_of<Compute<T>>(weight, channels), silu);
  });
  return out;
}

Tensor rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu) {
  check_norm(x, weight);
  return allocating("rms_norm_silu", [&] { return normalize(x, weight, silu); });
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("rms_norm_silu", TORCH_BOX(&cosmos3::rms_norm_silu));
}
