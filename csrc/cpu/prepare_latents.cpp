// CPU kernels of cosmos3::prepare_latents. One row is one (batch, channel, frame) plane of H x W
// elements: a row is either copied from the noise, taken from the conditioning latent, or blended.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "../dtypes.h"
#include "../prepare_latents.h"

namespace cosmos3 {
namespace {

// Bytes below which another thread does not pay for itself.
constexpr int64_t kGrainBytes = 64 * 1024;

// A latent of a dtype known only at run time.
struct Source {
  const char* data;
  ScalarType dtype;
  int64_t element_size;
  Strides strides;
  bool dense;

  Source(const Tensor& x, const Shape& shape)
      : data(static_cast<const char*>(x.const_data_ptr())),
        dtype(x.scalar_type()),
        element_size(x.element_size()),
        strides(strides_of(x)),
        dense(plane_is_dense(shape, strides)) {}

  const char* row(int64_t b, int64_t c, int64_t t) const {
    return data + (b * strides.b + c * strides.c + t * strides.t) * element_size;
  }
};

template <typename To, typename From>
void convert_row(To* out, const From* in, const Source& source, const Shape& shape) {
  if (source.dense) {
    for (int64_t i = 0; i < shape.plane(); ++i) {
      out[i] = convert<To>(in[i]);
    }
    return;
  }
  for (int64_t h = 0; h < shape.h; ++h) {
    for (int64_t w = 0; w < shape.w; ++w) {
      out[h * shape.w + w] = convert<To>(in[h * source.strides.h + w * source.strides.w]);
    }
  }
}

template <typename To>
void read_row(To* out, const char* row, const Source& source, const Shape& shape) {
  dispatch(source.dtype, [&](auto tag) {
    using From = decltype(tag);
    if (std::is_same_v<To, From> && source.dense) {
      std::memcpy(out, row, shape.plane() * sizeof(To));
    } else {
      convert_row(out, reinterpret_cast<const From*>(row), source, shape);
    }
  });
}

std::vector<char> frame_set(const std::vector<int64_t>& frames, int64_t num_frames) {
  std::vector<char> is_condition(num_frames, 0);
  for (int64_t frame : frames) {
    is_condition[frame] = 1;
  }
  return is_condition;
}

Tensor make_velocity_mask(const std::vector<char>& is_condition, const Tensor& noise) {
  const int64_t num_frames = noise.size(2);
  Tensor mask = torch::stable::new_empty(noise, {1, 1, num_frames, 1, 1});
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(mask.mutable_data_ptr());
    for (int64_t t = 0; t < num_frames; ++t) {
      out[t] = static_cast<T>(is_condition[t] ? 0.0f : 1.0f);
    }
  });
  return mask;
}

int64_t grain_rows(const Shape& shape, int64_t element_size) {
  const int64_t row_bytes = shape.plane() * element_size;
  return row_bytes == 0 ? kGrainBytes : std::max<int64_t>(1, kGrainBytes / row_bytes);
}

std::tuple<Tensor, Tensor> select_frames(const Tensor& cond_latent, const Tensor& noise,
                                         const std::vector<int64_t>& condition_frames) {
  const Shape shape = shape_of(noise);
  const std::vector<char> is_condition = frame_set(condition_frames, shape.t);
  Tensor latents = torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w});
  const Source cond(cond_latent, shape);
  const Source base(noise, shape);
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(latents.mutable_data_ptr());
    const int64_t plane = shape.plane();
    torch::stable::parallel_for(
        0, shape.rows(), grain_rows(shape, sizeof(T)), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end;) {
            const int64_t t = row % shape.t;
            const int64_t c = row / shape.t % shape.c;
            const int64_t b = row / shape.t / shape.c;
            if (is_condition[t]) {
              read_row(out + row * plane, cond.row(b, c, t), cond, shape);
              ++row;
              continue;
            }
            // Frames that follow each other in memory go in one copy.
            const char* first = base.row(b, c, t);
            int64_t run = 1;
            if (base.dense && base.strides.t == plane) {
              while (row + run < end && t + run < shape.t && !is_condition[t + run]) {
                ++run;
              }
              std::memcpy(out + row * plane, first, run * plane * sizeof(T));
            } else {
              read_row(out + row * plane, first, base, shape);
            }
            row += run;
          }
        });
  });
  return {latents, make_velocity_mask(is_condition, noise)};
}

// m * cond + (1 - m) * noise with one rounding at the end. The build forbids contraction to
// fused multiply-adds, so that float32 equals the eager formula to the bit.
template <typename T, typename Cond>
void blend_row(T* out, const T* noise, const Cond* cond, Compute<T> m, const Source& base,
               const Source& source, const Shape& shape) {
  const Compute<T> keep = Compute<T>{1} - m;
  auto blend = [&](const Cond& c, const T& n) {
    return convert<T>(m * convert<Compute<T>>(c) + keep * convert<Compute<T>>(n));
  };
  if (base.dense && source.dense) {
    for (int64_t i = 0; i < shape.plane(); ++i) {
      out[i] = blend(cond[i], noise[i]);
    }
    return;
  }
  for (int64_t h = 0; h < shape.h; ++h) {
    for (int64_t w = 0; w < shape.w; ++w) {
      out[h * shape.w + w] = blend(cond[h * source.strides.h + w * source.strides.w],
                                   noise[h * base.strides.h + w * base.strides.w]);
    }
  }
}

std::tuple<Tensor, Tensor> blend_frames(const Tensor& cond_latent, const Tensor& noise,
                                        const Tensor& condition_mask) {
  const Shape shape = shape_of(noise);
  Tensor latents = torch::stable::new_empty(noise, {shape.b, shape.c, shape.t, shape.h, shape.w});
  Tensor velocity_mask =
      torch::stable::new_empty(noise, {condition_mask.size(0), 1, shape.t, 1, 1});
  const Source cond(cond_latent, shape);
  const Source base(noise, shape);
  const Source mask(condition_mask, {condition_mask.size(0), 1, shape.t, 1, 1});
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto mask_at = [&](int64_t b, int64_t t) {
      Compute<T> m{};
      dispatch(mask.dtype, [&](auto mask_tag) {
        m = convert<Compute<T>>(*reinterpret_cast<const decltype(mask_tag)*>(mask.row(b, 0, t)));
      });
      return m;
    };
    T* velocity = static_cast<T*>(velocity_mask.mutable_data_ptr());
    for (int64_t b = 0; b < condition_mask.size(0); ++b) {
      for (int64_t t = 0; t < shape.t; ++t) {
        velocity[b * shape.t + t] = convert<T>(Compute<T>{1} - mask_at(b, t));
      }
    }
    T* out = static_cast<T*>(latents.mutable_data_ptr());
    torch::stable::parallel_for(
        0, shape.rows(), grain_rows(shape, sizeof(T)), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const int64_t t = row % shape.t;
            const int64_t c = row / shape.t % shape.c;
            const int64_t b = row / shape.t / shape.c;
            dispatch(cond.dtype, [&](auto cond_tag) {
              blend_row(out + row * shape.plane(), reinterpret_cast<const T*>(base.row(b, c, t)),
                        reinterpret_cast<const decltype(cond_tag)*>(cond.row(b, c, t)),
                        mask_at(b, t), base, cond, shape);
            });
          }
        });
  });
  return {latents, velocity_mask};
}

Tensor write_frames(const Tensor& cond_latent, Tensor& noise,
                    const std::vector<int64_t>& condition_frames) {
  const Shape shape = shape_of(noise);
  const Tensor source = apart(cond_latent, noise);
  const Source cond(source, shape);
  const Strides to = strides_of(noise);
  const bool dense = plane_is_dense(shape, to);
  const int64_t num_condition = condition_frames.size();
  dispatch(noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* data = static_cast<T*>(noise.mutable_data_ptr());
    torch::stable::parallel_for(0, shape.plane() == 0 ? 0 : shape.b * shape.c * num_condition,
                                grain_rows(shape, sizeof(T)), [&](int64_t begin, int64_t end) {
                                  std::vector<T> staged(dense ? 0 : shape.plane());
                                  for (int64_t row = begin; row < end; ++row) {
                                    const int64_t t = condition_frames[row % num_condition];
                                    const int64_t c = row / num_condition % shape.c;
                                    const int64_t b = row / num_condition / shape.c;
                                    T* plane = data + b * to.b + c * to.c + t * to.t;
                                    if (dense) {
                                      read_row(plane, cond.row(b, c, t), cond, shape);
                                      continue;
                                    }
                                    read_row(staged.data(), cond.row(b, c, t), cond, shape);
                                    for (int64_t h = 0; h < shape.h; ++h) {
                                      for (int64_t w = 0; w < shape.w; ++w) {
                                        plane[h * to.h + w * to.w] = staged[h * shape.w + w];
                                      }
                                    }
                                  }
                                });
  });
  return make_velocity_mask(frame_set(condition_frames, shape.t), noise);
}

std::tuple<Tensor, Tensor> prepare_latents(Tensor cond_latent, Tensor noise,
                                           std::vector<int64_t> condition_frames) {
  const char* op = "prepare_latents";
  check_frames(op, cond_latent, noise, condition_frames);
  return allocating(op, [&] { return select_frames(cond_latent, noise, condition_frames); });
}

std::tuple<Tensor, Tensor> prepare_latents_mask(Tensor cond_latent, Tensor noise,
                                                Tensor condition_mask) {
  const char* op = "prepare_latents";
  check_mask(op, cond_latent, noise, condition_mask);
  return allocating(op, [&] { return blend_frames(cond_latent, noise, condition_mask); });
}

Tensor prepare_latents_(Tensor cond_latent, Tensor noise, std::vector<int64_t> condition_frames) {
  const char* op = "prepare_latents_";
  check_frames_in_place(op, cond_latent, noise, condition_frames);
  return allocating(op, [&] { return write_frames(cond_latent, noise, condition_frames); });
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def(
      "prepare_latents(Tensor cond_latent, Tensor noise, int[] condition_frames=[0]) -> "
      "(Tensor latents, Tensor velocity_mask)");
  m.def(
      "prepare_latents.mask(Tensor cond_latent, Tensor noise, Tensor condition_mask) -> "
      "(Tensor latents, Tensor velocity_mask)");
  m.def(
      "prepare_latents_(Tensor cond_latent, Tensor(a!) noise, int[] condition_frames=[0]) -> "
      "Tensor velocity_mask");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("prepare_latents", TORCH_BOX(&cosmos3::prepare_latents));
  m.impl("prepare_latents.mask", TORCH_BOX(&cosmos3::prepare_latents_mask));
  m.impl("prepare_latents_", TORCH_BOX(&cosmos3::prepare_latents_));
}
