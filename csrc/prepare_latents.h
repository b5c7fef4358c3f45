// What the CPU and CUDA kernels of cosmos3::prepare_latents share: where the elements of a latent
// [B, C, T, H, W] lie, and the checks of the arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace cosmos3 {

// In elements; plain data, so that it also travels as a CUDA kernel argument.
struct Shape {
  int64_t b, c, t, h, w;

  C10_HOST_DEVICE int64_t plane() const {
    return h * w;
  }
  // Planes that hold anything.
  C10_HOST_DEVICE int64_t rows() const {
    return plane() == 0 ? 0 : b * c * t;
  }
};

struct Strides {
  int64_t b, c, t, h, w;
};

inline Shape shape_of(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
}

// Stride 0 along a dimension of size 1 is how a single batch entry or frame serves them all.
inline Strides strides_of(const Tensor& x) {
  auto stride = [&](int64_t dim) { return x.size(dim) == 1 ? int64_t{0} : x.stride(dim); };
  return {stride(0), stride(1), stride(2), stride(3), stride(4)};
}

// Whether the H x W plane is one run of memory.
inline bool plane_is_dense(const Shape& shape, const Strides& strides) {
  return (shape.w == 1 || strides.w == 1) && (shape.h == 1 || strides.h == shape.w);
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
  check_device(op, "cond_latent", cond, "noise", noise);
  if (cond.size(1) != noise.size(1) || cond.size(3) != noise.size(3) ||
      cond.size(4) != noise.size(4)) {
    fail(op, ": cond_latent must have C, H and W of noise ", list(noise.sizes()), ", got ",
         list(cond.sizes()));
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
  check_device(op, "condition_mask", mask, "noise", noise);
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

// The bytes [begin, end) that hold the elements of `x`, which has some.
struct Extent {
  uintptr_t begin, end;

  explicit Extent(const Tensor& x) : begin(reinterpret_cast<uintptr_t>(x.const_data_ptr())) {
    int64_t elements = 1;
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
      elements += (x.size(dim) - 1) * x.stride(dim);
    }
    end = begin + elements * x.element_size();
  }
  bool is_full(const Tensor& x) const {
    return end - begin == static_cast<uintptr_t>(x.numel() * x.element_size());
  }
};

// Whether the memory of the two is interleaved or shared.
inline bool may_overlap(const Tensor& cond, const Tensor& noise) {
  if (cond.numel() == 0 || noise.numel() == 0) {
    return false;
  }
  const Extent ours(cond), theirs(noise);
  return ours.begin < theirs.end && theirs.begin < ours.end;
}

inline bool is_same_view(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
         std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin()) &&
         std::equal(a.strides().begin(), a.strides().end(), b.strides().begin());
}

// As check_frames; and, as torch's own copy_ has it, `noise` must not hold one element at two
// indices nor overlap `cond` in part.
inline void check_frames_in_place(const char* op, const Tensor& cond, const Tensor& noise,
                                  const std::vector<int64_t>& frames) {
  check_frames(op, cond, noise, frames);
  for (int64_t dim = 0; dim < 5; ++dim) {
    if (noise.numel() > 0 && noise.size(dim) > 1 && noise.stride(dim) == 0) {
      fail(op, ": noise must not be expanded, got stride 0 in dimension ", dim, " of size ",
           noise.size(dim));
    }
  }
  if (may_overlap(cond, noise) && !is_same_view(cond, noise) && Extent(cond).is_full(cond) &&
      Extent(noise).is_full(noise)) {
    fail(op, ": cond_latent must not overlap noise in memory; clone it");
  }
}

// What is read while `noise` is written: where views of one buffer interleave, a copy, so that the
// result does not depend on the order of the writes.
inline Tensor apart(const Tensor& cond, const Tensor& noise) {
  return may_overlap(cond, noise) ? torch::stable::clone(cond) : cond;
}

}  // namespace cosmos3
