// Argument checks shared by the compiled backends. The wording and the order are those of
// cosmos3_fast/checks.py, which serves the fake kernels and the Python backends;
// tests/test_op_errors.py compares the two fault by fault.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
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

inline void check_latent(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.dim() != 5) {
    fail(op,
         ": ",
         argument,
         " must have 5 dimensions [B, C, T, H, W], got shape ",
         list(tensor.sizes()));
  }
  if (!is_supported(tensor.scalar_type())) {
    fail(op,
         ": ",
         argument,
         " must be float32, bfloat16, float16 or float64, got ",
         name(tensor.scalar_type()));
  }
}

inline void check_pair(const char* op, const Tensor& cond, const Tensor& noise) {
  check_latent(op, "noise", noise);
  check_latent(op, "cond_latent", cond);
  if (!same_device(cond, noise)) {
    fail(op,
         ": cond_latent must be on the device of noise (",
         device_name(noise),
         "), got ",
         device_name(cond));
  }
  if (cond.size(1) != noise.size(1) || cond.size(3) != noise.size(3) ||
      cond.size(4) != noise.size(4)) {
    fail(op,
         ": cond_latent must agree with noise in C, H and W; got cond_latent ",
         list(cond.sizes()),
         " for noise ",
         list(noise.sizes()));
  }
  if (cond.size(0) != 1 && cond.size(0) != noise.size(0)) {
    fail(op,
         ": cond_latent must have batch size 1 or that of noise (",
         noise.size(0),
         "), got ",
         cond.size(0));
  }
}

inline void check_frames(const char* op,
                         const Tensor& cond,
                         const Tensor& noise,
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
    fail(op,
         ": cond_latent must have 1 frame or more than max(condition_frames) = ",
         last,
         ", got ",
         cond.size(2));
  }
}

inline void check_mask(const char* op,
                       const Tensor& cond,
                       const Tensor& noise,
                       const Tensor& mask) {
  check_pair(op, cond, noise);
  check_latent(op, "condition_mask", mask);
  if (!same_device(mask, noise)) {
    fail(op,
         ": condition_mask must be on the device of noise (",
         device_name(noise),
         "), got ",
         device_name(mask));
  }
  if ((mask.size(0) != 1 && mask.size(0) != noise.size(0)) || mask.size(1) != 1 ||
      mask.size(2) != noise.size(2) || mask.size(3) != 1 || mask.size(4) != 1) {
    fail(op,
         ": condition_mask must have shape [1 or B, 1, T, 1, 1] for noise ",
         list(noise.sizes()),
         ", got ",
         list(mask.sizes()));
  }
  if (cond.size(2) != 1 && cond.size(2) < noise.size(2)) {
    fail(op,
         ": cond_latent must have 1 frame or at least those of noise (",
         noise.size(2),
         "), got ",
         cond.size(2));
  }
}

// A tensor written in place must not hold one element at two indices (torch's own rule).
inline void check_writable(const char* op, const Tensor& noise) {
  for (int64_t dim = 0; dim < 5; ++dim) {
    if (noise.numel() > 0 && noise.size(dim) > 1 && noise.stride(dim) == 0) {
      fail(op,
           ": noise must not be expanded: dimension ",
           dim,
           " has size ",
           noise.size(dim),
           " and stride 0");
    }
  }
}

}  // namespace cosmos3
