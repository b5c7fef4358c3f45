// Argument checks that several ops share; an op's own stand in its file. The wording and the order
// are those of cosmos3_fast/ops/checks.py and cosmos3_fast/ops/<op>.py, which serve the fake
// kernels and the Python backends; tests/ops/test_errors.py compares the two fault by fault.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace cosmos3 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// What `f` returns, which allocates and whose arguments have passed the checks, so that only a lack
// of memory makes it fail: torch's stable ABI drops the message of an allocation that failed.
template <typename F>
auto allocating(const char* op, F&& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    fail(op, ": not enough memory (", error.what(), ")");
  }
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline std::string name(ScalarType dtype) {
  static constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"},
      {ScalarType::Half, "float16"},
      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Byte, "uint8"},
      {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},
      {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"},
      {ScalarType::Bool, "bool"},
      {ScalarType::ComplexFloat, "complex64"},
      {ScalarType::ComplexDouble, "complex128"},
  };
  for (const auto& [known, name] : kNames) {
    if (known == dtype) {
      return std::string("torch.") + name;
    }
  }
  return "another dtype";
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

inline void check_device(const char* op, const char* argument, const Tensor& tensor,
                         const char* other_argument, const Tensor& other) {
  if (!same_device(tensor, other)) {
    fail(op, ": ", argument, " must be on the device of ", other_argument, " (", device_name(other),
         "), got ", device_name(tensor));
  }
}

inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank,
                       const char* shape) {
  if (tensor.dim() != rank) {
    fail(op, ": ", argument, " must have shape ", shape, ", got ", list(tensor.sizes()));
  }
}

inline void check_patch_size(const char* op, int64_t patch_size) {
  // Above 2^15 the square would not fit every integer type; no image has such patches.
  if (patch_size < 1 || patch_size > 1 << 15) {
    fail(op, ": patch_size must be in 1 … 32768, got ", patch_size);
  }
}

inline void check_float32(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float) {
    fail(op, ": ", argument, " must be float32, got ", name(tensor.scalar_type()));
  }
}

}  // namespace cosmos3
