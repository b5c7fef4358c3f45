// Where the elements of a latent [B, C, T, H, W] lie, in elements; plain data, so that it also
// travels as a CUDA kernel argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace cosmos3 {

struct Shape {
  int64_t b, c, t, h, w;

  constexpr int64_t plane() const {
    return h * w;
  }
  // Planes that hold anything.
  constexpr int64_t rows() const {
    return plane() == 0 ? 0 : b * c * t;
  }
};

struct Strides {
  int64_t b, c, t, h, w;
};

inline Shape shape_of(const torch::stable::Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
}

// Stride 0 along a dimension of size 1 is how a single batch entry or frame serves them all.
inline Strides strides_of(const torch::stable::Tensor& x) {
  auto stride = [&](int64_t dim) { return x.size(dim) == 1 ? int64_t{0} : x.stride(dim); };
  return {stride(0), stride(1), stride(2), stride(3), stride(4)};
}

// Whether the H x W plane is one run of memory.
inline bool plane_is_dense(const Shape& shape, const Strides& strides) {
  return (shape.w == 1 || strides.w == 1) && (shape.h == 1 || strides.h == shape.w);
}

}  // namespace cosmos3
