// What the CPU and the CUDA kernel of cosmos3::transform_frames share: the matrices of Winograd's
// F(2, 3) and F(4, 3), the op's checks, and its tensors as rows of channels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "addends.h"
#include "dtypes.h"

namespace cosmos3 {

// A^T and B^T of F(m, 3), as cosmos3_fast/ops/cook_toom.py derives them.
template <int m>
struct CookToom;

template <>
struct CookToom<2> {
  static constexpr double kInverse[2][4] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
  static constexpr double kInputs[4][4] = {
      {-1, 0, 1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
};

template <>
struct CookToom<4> {
  static constexpr double a = 0.75, b = 1.5, aa = a * a, bb = b * b;
  static constexpr double kInverse[4][6] = {{1, 1, 1, 1, 1, 0},
                                            {0, a, -a, b, -b, 0},
                                            {0, aa, aa, bb, bb, 0},
                                            {0, a * aa, -a * aa, b * bb, -b * bb, 1}};
  static constexpr double kInputs[6][6] = {
      {aa * bb, 0, -aa - bb, 0, 1, 0}, {0, -a * bb, -bb, a, 1, 0}, {0, a * bb, -bb, -a, 1, 0},
      {0, -b * aa, -aa, b, 1, 0},      {0, b * aa, -aa, -b, 1, 0}, {0, aa * bb, 0, -aa - bb, 0, 1}};
};

// Frame i of the m of a block, as a sum over its products.
template <int kProducts>
struct Block {
  static constexpr int m = kProducts - 2;
  static constexpr double factor(int i, int product) {
    return CookToom<m>::kInverse[i][product];
  }
};
// The frame itself, and the sum over its three taps.
template <>
struct Block<1> {
  static constexpr int m = 1;
  static constexpr double factor(int, int) {
    return 1;
  }
};
template <>
struct Block<3> : Block<1> {};

template <int kProducts, int i>
struct FrameRow {
  static constexpr int kSize = kProducts;
  static constexpr double factor(int product) {
    return Block<kProducts>::factor(i, product);
  }
};

// Transformed frame j of a window of m + 2.
template <int m, int j>
struct WindowRow {
  static constexpr int kSize = m + 2;
  static constexpr double factor(int i) {
    return CookToom<m>::kInputs[j][i];
  }
};

// The sum of Row's factors times the terms, in the order of the reference, which leaves out zeros.
template <typename Row, int k = 0, bool started = false, typename Value>
C10_HOST_DEVICE inline __attribute__((always_inline)) Value combine(const Value* terms,
                                                                    Value total = 0) {
  if constexpr (k == Row::kSize) {
    return total;
  } else {
    constexpr double factor = Row::factor(k);
    if constexpr (factor == 0) {
      return combine<Row, k + 1, started>(terms, total);
    } else {
      const Value product = factor == 1 ? terms[k] : static_cast<Value>(factor) * terms[k];
      return combine<Row, k + 1, true>(terms, started ? total + product : product);
    }
  }
}

// F(2, 3) on the points 0, +-point and infinity is that on +-1, of frames j times point^(2 - j);
// frame i of it is then point^i times what comes out.
template <typename Value>
struct Point {
  Value value, square, inverse;

  Point(double point = 1)
      : value(static_cast<Value>(point)),
        square(static_cast<Value>(point * point)),
        inverse(static_cast<Value>(1 / point)) {}
};

template <int m, typename Value>
C10_HOST_DEVICE inline __attribute__((always_inline)) void to_unit_points(
    Value* window, const Point<Value>& point) {
  if constexpr (m == 2) {
    window[0] *= point.square;
    window[1] *= point.value;
    window[3] *= point.inverse;
  }
}

// Frame i of a block.
template <int kProducts, int i, typename Value>
C10_HOST_DEVICE inline __attribute__((always_inline)) Value frame_of(const Value* products,
                                                                     const Point<Value>& point) {
  const Value made = combine<FrameRow<kProducts, i>>(products);
  if constexpr (kProducts == 4 && i == 1) {
    return made * point.value;
  }
  return made;
}

// Frames of a block, of the products that come in or of the frames that go out.
inline int64_t frames_of_block(int64_t products) {
  return products <= 3 ? 1 : products - 2;
}
inline int64_t blocks_of(int64_t frames, int64_t m) {
  return (frames - 1) / m + 1;
}

// In the order in which they are registered.
struct FrameArguments {
  const std::vector<Tensor>& products;
  int64_t frames, to;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& weight;
  bool silu;
  const std::optional<Tensor>& past;
  const std::optional<std::vector<double>>& scales;
  bool keep_sum;
  std::optional<ScalarType> sum_dtype, frames_dtype;
  double point;

  static constexpr const char* op = "transform_frames";

  const Tensor& first() const {
    return products[0];
  }
  int64_t m() const {
    return frames_of_block(products.size());
  }
  int64_t batch() const {
    return first().size(0) / blocks_of(frames, m());
  }
  ScalarType dtype_of_sum() const {
    return sum_dtype.value_or(first().scalar_type());
  }
  ScalarType dtype_of_frames() const {
    return frames_dtype.value_or(first().scalar_type());
  }
};

inline void check_frames_like(const char* argument, const std::optional<Tensor>& given,
                              ScalarType dtype, const char* dtype_name, int64_t leading,
                              const char* shape, const FrameArguments& arguments) {
  if (!given.has_value()) {
    return;
  }
  const char* op = arguments.op;
  check_rank(op, argument, *given, 5, shape);
  if (given->scalar_type() != dtype) {
    fail(op, ": ", argument, " must have ", dtype_name, ", ", name(dtype), ", got ",
         name(given->scalar_type()));
  }
  const Tensor& first = arguments.first();
  check_device(op, argument, *given, "products", first);
  const std::vector<int64_t> wanted = {leading, arguments.batch(), first.size(1), first.size(2),
                                       first.size(3)};
  for (int64_t dim = 0; dim < 5; ++dim) {
    if (given->size(dim) != wanted[dim]) {
      fail(op, ": ", argument, " must have shape ", list(wanted), ", got ", list(given->sizes()));
    }
  }
}

inline void check_transform(const FrameArguments& arguments) {
  const char* op = arguments.op;
  const size_t count = arguments.products.size();
  const int64_t frames = arguments.frames, to = arguments.to;
  if (count != 1 && count != 3 && count != 4 && count != 6) {
    fail(op, ": products must be 1, 3, 4 or 6 tensors, got ", count);
  }
  if (to != 0 && to != 1 && to != 2 && to != 4) {
    fail(op, ": to must be 0, 1, 2 or 4, got ", to);
  }
  if (frames < 1) {
    fail(op, ": frames must be at least 1, got ", frames);
  }
  const Tensor& first = arguments.first();
  check_rank(op, "products", first, 4, "[N, C, H, W]");
  check_dtype(op, "products", first.scalar_type());
  for (const Tensor& each : arguments.products) {
    if (each.scalar_type() != first.scalar_type()) {
      fail(op, ": products must have one dtype, ", name(first.scalar_type()), ", got ",
           name(each.scalar_type()));
    }
    check_device(op, "products", each, "the first of them", first);
    bool fits = each.dim() == first.dim();
    for (int64_t dim = 0; fits && dim < first.dim(); ++dim) {
      fits = each.size(dim) == first.size(dim);
    }
    if (!fits) {
      fail(op, ": products must have one shape, ", list(first.sizes()), ", got ",
           list(each.sizes()));
    }
  }
  if (first.size(1) < 1) {
    fail(op, ": products must have channels, got ", list(first.sizes()));
  }
  const int64_t m = arguments.m(), blocks = blocks_of(frames, m);
  if (first.size(0) % blocks) {
    fail(op, ": products must have N a multiple of ", blocks, ", for ", frames,
         " frames in blocks of ", m, ", got ", list(first.sizes()));
  }
  if (arguments.scales.has_value() && arguments.scales->size() != count) {
    fail(op, ": scales must be ", count, " numbers, got ", arguments.scales->size());
  }
  if (!(arguments.point > 0 && std::isfinite(arguments.point))) {
    fail(op, ": point must be positive and finite, got ", arguments.point);
  }
  auto check_target = [&](const char* argument, ScalarType dtype) {
    check_dtype(op, argument, dtype);
    if ((dtype == ScalarType::Double) != (first.scalar_type() == ScalarType::Double)) {
      fail(op, ": ", argument, " must be float64 where the products are, and only there (",
           name(first.scalar_type()), "), got ", name(dtype));
    }
  };
  check_target("sum_dtype", arguments.dtype_of_sum());
  check_target("frames_dtype", arguments.dtype_of_frames());
  check_channels(op, "bias", arguments.bias, first, "products");
  check_channels(op, "weight", arguments.weight, first, "products");
  check_frames_like("residual", arguments.residual, arguments.dtype_of_sum(), "sum_dtype", frames,
                    "[frames, B, C, H, W]", arguments);
  check_frames_like("past", arguments.past, arguments.dtype_of_frames(), "frames_dtype", 2,
                    "[2, B, C, H, W]", arguments);
}

// A contiguous [..., H, W, C] seen as [..., C, H, W]. Not by torch's ops, each of which costs the
// host a microsecond.
inline Tensor channels_before_image(const Tensor& x) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t dim = i < dims - 3 ? i : i == dims - 3 ? dims - 1 : i - 1;
    sizes.push_back(x.size(dim));
    strides.push_back(x.stride(dim));
  }
  AtenTensorHandle seen = nullptr;
  if (aoti_torch__reinterpret_tensor(x.get(), dims, sizes.data(), strides.data(), 0, &seen)) {
    fail(FrameArguments::op, ": torch did not give a view of a tensor's memory");
  }
  return Tensor(seen);
}

// Whether [..., C, H, W] lies in memory as a contiguous [..., H, W, C].
inline bool has_dense_rows(const Tensor& x) {
  const int64_t dims = x.dim();
  int64_t expected = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t dim = i == 0 ? dims - 3 : i < 3 ? dims - i : dims - 1 - i;
    if (x.size(dim) != 1 && x.stride(dim) != expected) {
      return false;
    }
    expected *= x.size(dim);
  }
  return true;
}

// What is read, its channels last and without gaps in memory.
inline Tensor dense_rows(const Tensor& x) {
  return has_dense_rows(x) ? x
                           : torch::stable::contiguous(torch::stable::transpose(
                                 torch::stable::transpose(x, -3, -2), -2, -1));
}
inline std::optional<Tensor> dense_rows(const std::optional<Tensor>& x) {
  return x.has_value() ? std::make_optional(dense_rows(*x)) : std::nullopt;
}

struct FrameResults {
  // As they are returned; empty where nothing is wanted.
  Tensor sum, transformed, last;
};

// `empty` gives a contiguous tensor of some sizes and a dtype.
template <typename Empty>
FrameResults empty_results(const FrameArguments& arguments, Empty&& empty) {
  const Tensor& first = arguments.first();
  const int64_t frames = arguments.frames, to = arguments.to;
  auto make = [&](std::vector<int64_t> leading, ScalarType dtype) {
    for (int64_t size : {arguments.batch(), first.size(2), first.size(3), first.size(1)}) {
      leading.push_back(size);
    }
    return channels_before_image(empty(leading, dtype));
  };
  auto nothing = [&](ScalarType dtype) {
    return torch::stable::empty({0}, dtype, std::nullopt, first.device());
  };
  const ScalarType of_sum = arguments.dtype_of_sum(), of_frames = arguments.dtype_of_frames();
  return {arguments.keep_sum ? make({frames}, of_sum) : nothing(of_sum),
          to == 0   ? nothing(of_frames)
          : to == 1 ? make({frames + 2}, of_frames)
                    : make({to + 2, blocks_of(frames, to)}, of_frames),
          to == 0 ? nothing(of_frames) : make({2}, of_frames)};
}

// The op as it is registered, of a backend whose `compute` takes arguments that have been checked.
template <FrameResults (*compute)(const FrameArguments&)>
std::tuple<Tensor, Tensor, Tensor> transform_frames(
    std::vector<Tensor> products, int64_t frames, int64_t to, std::optional<Tensor> bias,
    std::optional<Tensor> residual, std::optional<Tensor> weight, bool silu,
    std::optional<Tensor> past, std::optional<std::vector<double>> scales, bool keep_sum,
    std::optional<ScalarType> sum_dtype, std::optional<ScalarType> frames_dtype, double point) {
  const FrameArguments arguments{products, frames, to,       bias,      residual,     weight, silu,
                                 past,     scales, keep_sum, sum_dtype, frames_dtype, point};
  check_transform(arguments);
  const FrameResults results = compute(arguments);
  return {results.sum, results.transformed, results.last};
}

}  // namespace cosmos3
