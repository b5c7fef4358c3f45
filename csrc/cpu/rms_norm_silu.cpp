// CPU kernel of cosmos3::rms_norm_silu: one pass over channels-last pixels. A pixel's channels fit
// in the first-level cache, so the second reading (to scale) costs no memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "../checks.h"
#include "channels_last.h"
#include "simd.h"

namespace cosmos3 {
namespace {

using torch::headeronly::Half;

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
        const float value = to_float(in[i + lane]);
        partial[lane] += value * value;
      }
    }
    float squares = 0.0f;
    for (; i < channels; ++i) {
      squares += to_float(in[i]) * to_float(in[i]);
    }
    for (float value : partial) {
      squares += value;
    }
    const float norm = std::sqrt(squares);
    const float inverse = 1.0f / (norm < kNormEps ? kNormEps : norm);
    if (silu) {
      for (int64_t c = 0; c < channels; ++c) {
        const float value = to_float(in[c]) * inverse * scale[c];
        out[c] = from_float<T>(value / (1.0f + exp_approx(-value)));
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = from_float<T>(to_float(in[c]) * inverse * scale[c]);
      }
    }
  }
}

COSMOS3_CLONES void run(float* out, const float* in, const float* scale, int64_t pixels,
                        int64_t channels, bool silu) {
  norm_pixels(out, in, scale, pixels, channels, silu);
}
COSMOS3_CLONES void run(Bf16* out, const Bf16* in, const float* scale, int64_t pixels,
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
    const void* data = weight->const_data_ptr();
    const int64_t stride = channels > 1 ? weight->stride(0) : 0;
    for (int64_t c = 0; c < channels; ++c) {
      switch (weight->scalar_type()) {
        case ScalarType::Float:
          scale[c] = static_cast<const float*>(data)[c * stride] * root;
          break;
        case ScalarType::Double:
          scale[c] = static_cast<const double*>(data)[c * stride] * root;
          break;
        case ScalarType::BFloat16:
          scale[c] = to_float(static_cast<const Bf16*>(data)[c * stride]) * root;
          break;
        default:
          scale[c] = to_float(static_cast<const Half*>(data)[c * stride]) * root;
      }
    }
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

Tensor rms_norm_silu(Tensor x, std::optional<Tensor> weight, bool silu) {
  check_norm(x, weight);
  const Tensor input = channels_last(x);
  Tensor out = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  const int64_t channels = x.size(1);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run_parallel<float>(out, input, scale_of<float>(weight, channels), silu);
      break;
    case ScalarType::Double:
      run_parallel<double>(out, input, scale_of<double>(weight, channels), silu);
      break;
    case ScalarType::BFloat16:
      run_parallel<Bf16>(out, input, scale_of<float>(weight, channels), silu);
      break;
    default:
      run_parallel<Half>(out, input, scale_of<float>(weight, channels), silu);
  }
  return out;
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("rms_norm_silu", TORCH_BOX(&cosmos3::rms_norm_silu));
}
