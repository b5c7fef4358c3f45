// Argument checks shared by the compiled backends. The wording and the order are those of
// cosmos3_fast/checks.py, which serves the fake kernels and the Python backends;
// tests/ops/test_errors.py compares the two fault by fault.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cosmos3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline std::string name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return "another dtype";
  }
}

template <typename Sizes>
std::string list(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "") << sizes[i];
  }
  text << "]";
  return text.str();
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return "cpu";
  }
  if (tensor.is_cuda()) {
    return "cuda:" + std::to_string(tensor.get_device_index());
  }
  return "another device";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu()
                    : a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_dtype(const char* op, const char* argument, ScalarType dtype) {
  if (!is_supported(dtype)) {
    fail(op, ": ", argument, " must be float32, bfloat16, float16 or float64, got ", name(dtype));
  }
}

inline void check_on_device_of(const char* op, const char* argument, const Tensor& tensor,
                               const char* other_argument, const Tensor& other) {
  if (!same_device(tensor, other)) {
    fail(op, ": ", argument, " must be on the device of ", other_argument, " (", device_name(other),
         "), got ", device_name(tensor));
  }
}

inline void check_latent(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.dim() != 5) {
    fail(op, ": ", argument, " must have 5 dimensions [B, C, T, H, W], got shape ",
         list(tensor.sizes()));
  }
  check_dtype(op, argument, tensor.scalar_type());
}

inline void check_pair(const char* op, const Tensor& cond, const Tensor& noise) {
  check_latent(op, "noise", noise);
  check_latent(op, "cond_latent", cond);
  check_on_device_of(op, "cond_latent", cond, "noise", noise);
  if (cond.size(1) != noise.size(1) || cond.size(3) != noise.size(3) ||
      cond.size(4) != noise.size(4)) {
    fail(op, ": cond_latent must agree with noise in C, H and W; got cond_latent ",
         list(cond.sizes()), " for noise ", list(noise.sizes()));
  }
  if (cond.size(0) != 1 && cond.size(0) != noise.size(0)) {
    fail(op, ": cond_latent must have batch size 1 or that of noise (", noise.size(0), "), got ",
         cond.size(0));
  }
}

inline void check_frames(const char* op, const Tensor& cond, const Tensor& noise,
                         const std::vector<int64_t>& frames) {
  check_pair(op, cond, noise);
  const int64_t num_frames = noise.size(2);
  int64_t last = -1;
  for (size_t i = 0; i < frames.size(); ++i) {
    const int64_t frame = frames[i];
    if (frame < 0 || frame >= num_frames) {
      fail(op, ": condition_frames must lie in [0, ", num_frames, "), got ", list(frames));
    }
    if (std::find(frames.begin(), frames.begin() + i, frame) != frames.begin() + i) {
      fail(op, ": condition_frames must not repeat a frame, got ", list(frames));
    }
    last = std::max(last, frame);
  }
  if (cond.size(2) != 1 && cond.size(2) <= last) {
    fail(op, ": cond_latent must have 1 frame or more than max(condition_frames) = ", last,
         ", got ", cond.size(2));
  }
}

inline void check_mask(const char* op, const Tensor& cond, const Tensor& noise,
                       const Tensor& mask) {
  check_pair(op, cond, noise);
  check_latent(op, "condition_mask", mask);
  check_on_device_of(op, "condition_mask", mask, "noise", noise);
  if ((mask.size(0) != 1 && mask.size(0) != noise.size(0)) || mask.size(1) != 1 ||
      mask.size(2) != noise.size(2) || mask.size(3) != 1 || mask.size(4) != 1) {
    fail(op, ": condition_mask must have shape [1 or B, 1, T, 1, 1] for noise ",
         list(noise.sizes()), ", got ", list(mask.sizes()));
  }
  if (cond.size(2) != 1 && cond.size(2) < noise.size(2)) {
    fail(op, ": cond_latent must have 1 frame or at least those of noise (", noise.size(2),
         "), got ", cond.size(2));
  }
}

// A tensor written in place must not hold one element at two indices (torch's own rule).
inline void check_writable(const char* op, const Tensor& noise) {
  for (int64_t dim = 0; dim < 5; ++dim) {
    if (noise.numel() > 0 && noise.size(dim) > 1 && noise.stride(dim) == 0) {
      fail(op, ": noise must not be expanded: dimension ", dim, " has size ", noise.size(dim),
           " and stride 0");
    }
  }
}

inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank,
                       const char* shape) {
  if (tensor.dim() != rank) {
    fail(op, ": ", argument, " must have shape ", shape, ", got ", list(tensor.sizes()));
  }
}

inline void check_norm(const Tensor& x, const std::optional<Tensor>& weight) {
  const char* op = "rms_norm_silu";
  check_rank(op, "x", x, 4, "[B, C, H, W]");
  check_dtype(op, "x", x.scalar_type());
  if (weight.has_value()) {
    check_rank(op, "weight", *weight, 1, "[C]");
    check_dtype(op, "weight", weight->scalar_type());
    check_on_device_of(op, "weight", *weight, "x", x);
    if (weight->size(0) != x.size(1)) {
      fail(op, ": weight must have the C = ", x.size(1), " elements of x, got ", weight->size(0));
    }
  }
}

inline void check_pixels(const Tensor& pixels, int64_t patch_size, ScalarType dtype) {
  const char* op = "pack_pixels";
  const bool bytes = pixels.scalar_type() == ScalarType::Byte;
  check_rank(op, "pixels", pixels, 4, "[B, 3, H, W], or [B, H, W, 3] in uint8");
  if (!bytes && !is_supported(pixels.scalar_type())) {
    fail(op, ": pixels must be uint8, float32, bfloat16, float16 or float64, got ",
         name(pixels.scalar_type()));
  }
  if (pixels.size(bytes ? 3 : 1) != 3) {
    fail(op, ": pixels must have 3 colours in shape [B, 3, H, W], or [B, H, W, 3] in uint8, got ",
         list(pixels.sizes()));
  }
  check_dtype(op, "dtype", dtype);
  if (patch_size < 1) {
    fail(op, ": patch_size must be at least 1, got ", patch_size);
  }
  if (pixels.size(bytes ? 1 : 2) % patch_size || pixels.size(bytes ? 2 : 3) % patch_size) {
    fail(op, ": pixels must have height and width divisible by patch_size = ", patch_size, ", got ",
         list(pixels.sizes()));
  }
}

inline void check_float32(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float) {
    fail(op, ": ", argument, " must be float32, got ", name(tensor.scalar_type()));
  }
}

inline void check_winograd_weight(const Tensor& weight) {
  const char* op = "winograd_pack";
  check_rank(op, "weight", weight, 4, "[Cout, Cin, 3, 3]");
  check_float32(op, "weight", weight);
  if (weight.size(0) % 32 || weight.size(1) % 16 || weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op,
         ": weight must have shape [Cout, Cin, 3, 3] with Cout a multiple of 32 and Cin of 16, "
         "got ",
         list(weight.sizes()));
  }
}

inline void check_winograd(const Tensor& x, const Tensor& packed_weight,
                           const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual) {
  const char* op = "winograd_conv3x3";
  check_rank(op, "x", x, 4, "[B, Cin, H, W]");
  check_float32(op, "x", x);
  check_rank(op, "packed_weight", packed_weight, 4, "[36, Cout/32, Cin, 32]");
  check_float32(op, "packed_weight", packed_weight);
  check_on_device_of(op, "packed_weight", packed_weight, "x", x);
  if (packed_weight.size(0) != 36 || packed_weight.size(2) != x.size(1) ||
      packed_weight.size(3) != 32) {
    fail(op, ": packed_weight must have shape [36, Cout/32, Cin, 32] for x ", list(x.sizes()),
         ", got ", list(packed_weight.sizes()));
  }
  const int64_t out_channels = packed_weight.size(1) * 32;
  if (bias.has_value()) {
    check_float32(op, "bias", *bias);
    check_on_device_of(op, "bias", *bias, "x", x);
    if (bias->dim() != 1 || bias->size(0) != out_channels) {
      fail(op, ": bias must have shape [", out_channels, "], got ", list(bias->sizes()));
    }
  }
  if (residual.has_value()) {
    check_float32(op, "residual", *residual);
    check_on_device_of(op, "residual", *residual, "x", x);
    if (residual->dim() != 4 || residual->size(0) != x.size(0) ||
        residual->size(1) != out_channels || residual->size(2) != x.size(2) ||
        residual->size(3) != x.size(3)) {
      fail(op, ": residual must have shape [", x.size(0), ", ", out_channels, ", ", x.size(2), ", ",
           x.size(3), "], got ", list(residual->sizes()));
    }
  }
}

}  // namespace cosmos3
