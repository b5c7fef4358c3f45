// What the CPU and CUDA kernels of cosmos3::resize_crop share: the checks of the arguments, and
// which source elements each output takes with which integer weights, as Pillow has them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace cosmos3 {

// Weights have this many fractional bits: beside a byte's 8, two are left for the sign and for
// filters that overshoot.
constexpr int kFractionBits = 32 - 8 - 2;
// What a sum of weighted bytes starts with, so that the shift by kFractionBits rounds.
constexpr int32_t kHalf = int32_t{1} << (kFractionBits - 1);
// Pillow keeps an image's extent in float32, which holds integers up to this.
constexpr int64_t kLargestSide = int64_t{1} << 24;
constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;

struct Filter {
  const char* name;
  double support;  // it is 0 from there on
  double (*weight)(double);
};

inline double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic convolution with a = -1/2.
inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

inline double sinc(double x) {
  constexpr double pi = 3.14159265358979323846;
  return x == 0.0 ? 1.0 : std::sin(x * pi) / (x * pi);
}

inline double lanczos(double x) {
  return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
}

inline const Filter* find_filter(const std::string& name) {
  static const Filter filters[] = {
      {"lanczos", 3.0, lanczos}, {"bicubic", 2.0, bicubic}, {"bilinear", 1.0, bilinear}};
  const auto found = std::find_if(std::begin(filters), std::end(filters),
                                  [&](const Filter& filter) { return name == filter.name; });
  return found == std::end(filters) ? nullptr : found;
}

// One direction of a resize: output i is the weighted sum of source elements
// begin + starts[i] + (0 … taps - 1).
struct Axis {
  bool resized;  // Pillow leaves out the pass of a size that stays; a weight of 1 keeps the bytes
  int64_t begin, end;  // the source elements that the outputs take
  int64_t taps;
  std::vector<int32_t> starts;
  std::vector<int32_t> weights;  // [outputs, taps]

  int64_t outputs() const {
    return static_cast<int64_t>(starts.size());
  }
};

// Of outputs first … first + count - 1 when `in` elements become `out`. Formulas and their order of
// operations are those of Pillow, so that every weight is its weight to the bit.
inline Axis make_axis(int64_t in, int64_t out, int64_t first, int64_t count, const Filter& filter) {
  Axis axis{in != out, 0, 0, 1, std::vector<int32_t>(count), {}};
  if (!axis.resized) {
    for (int64_t i = 0; i < count; ++i) {
      axis.starts[i] = static_cast<int32_t>(i);
    }
    axis.weights.assign(count, int32_t{1} << kFractionBits);
    axis.begin = first;
    axis.end = first + count;
    return axis;
  }
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double filter_scale = std::max(scale, 1.0);
  const double support = filter.support * filter_scale;
  auto center = [&](int64_t i) { return (static_cast<double>(first + i) + 0.5) * scale; };
  auto window_begin = [&](int64_t i) {
    return std::max<int64_t>(static_cast<int64_t>(center(i) - support + 0.5), 0);
  };
  auto window_end = [&](int64_t i) {
    return std::min(static_cast<int64_t>(center(i) + support + 0.5), in);
  };
  axis.begin = window_begin(0);
  axis.end = window_end(count - 1);
  for (int64_t i = 0; i < count; ++i) {
    axis.taps = std::max(axis.taps, window_end(i) - window_begin(i));
  }
  axis.weights.resize(count * axis.taps);
  const int64_t worth_a_thread = 1 + 8192 / axis.taps;
  torch::stable::parallel_for(0, count, worth_a_thread, [&](int64_t from, int64_t to) {
    std::vector<double> shares(axis.taps);
    for (int64_t i = from; i < to; ++i) {
      const int64_t begin = window_begin(i), size = window_end(i) - begin;
      double sum = 0.0;
      for (int64_t tap = 0; tap < size; ++tap) {
        const double x = static_cast<double>(begin + tap) - center(i) + 0.5;
        shares[tap] = filter.weight(x * (1.0 / filter_scale));
        sum += shares[tap];
      }
      // A window shorter than the others, as at the image's end, is filled up by zeros in front.
      const int64_t start = std::min(begin, axis.end - axis.taps);
      axis.starts[i] = static_cast<int32_t>(start - axis.begin);
      int32_t* weights = axis.weights.data() + i * axis.taps + begin - start;
      for (int64_t tap = 0; tap < size; ++tap) {
        const double share = sum != 0.0 ? shares[tap] / sum : shares[tap];
        weights[tap] = static_cast<int32_t>(share * (int32_t{1} << kFractionBits) +
                                            (share < 0.0 ? -0.5 : 0.5));
      }
    }
  });
  return axis;
}

// As make_axis. The last few of a thread are kept: pictures of one size come one after the other,
// and the sines of a small one take longer than its bytes.
inline std::shared_ptr<const Axis> axis_of(int64_t in, int64_t out, int64_t first, int64_t count,
                                           const Filter& filter) {
  constexpr size_t kKept = 4, kLargestKept = size_t{1} << 18;
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, const Filter*>;
  static thread_local std::vector<std::pair<Key, std::shared_ptr<const Axis>>> kept;
  const Key key{in, out, first, count, &filter};
  for (const auto& [each, axis] : kept) {
    if (each == key) {
      return axis;
    }
  }
  auto axis = std::make_shared<const Axis>(make_axis(in, out, first, count, filter));
  if (axis->resized && axis->weights.size() <= kLargestKept) {
    if (kept.size() == kKept) {
      kept.erase(kept.begin());
    }
    kept.emplace_back(key, axis);
  }
  return axis;
}

// What is wanted of the resized image.
struct Crop {
  int64_t top, left, height, width;
};

inline Crop check_resize_crop(const Tensor& image, const std::vector<int64_t>& size,
                              const std::vector<int64_t>& crop, const std::string& filter) {
  const char* op = "resize_crop";
  if (image.scalar_type() != ScalarType::Byte) {
    fail(op, ": image must be uint8, got ", name(image.scalar_type()));
  }
  const int64_t rank = image.dim();
  if ((rank != 3 && rank != 4) || image.size(rank - 1) != 3) {
    fail(op, ": image must have shape [H, W, 3] or [B, H, W, 3], got ", list(image.sizes()));
  }
  for (int64_t dim : {rank - 3, rank - 2}) {
    if (image.size(dim) < 1 || image.size(dim) > kLargestSide) {
      fail(op, ": image must have height and width in 1 … ", kLargestSide, ", got ",
           list(image.sizes()));
    }
  }
  if (size.size() != 2 || std::min(size[0], size[1]) < 1 ||
      std::max(size[0], size[1]) > kLargestSize) {
    fail(op, ": size must be [height, width] in 1 … ", kLargestSize, ", got ", list(size));
  }
  const bool fits = crop.size() == 4 && [&] {
    for (int i : {0, 1}) {
      // By subtraction, which does not overflow.
      if (crop[i] < 0 || crop[i] > size[i] || crop[i + 2] < 1 || crop[i + 2] > size[i] - crop[i]) {
        return false;
      }
    }
    return true;
  }();
  if (!fits) {
    fail(op, ": crop must be [top, left, height, width] inside size ", list(size), ", got ",
         list(crop));
  }
  if (find_filter(filter) == nullptr) {
    fail(op, ": filter must be 'lanczos', 'bicubic' or 'bilinear', got '", filter, "'");
  }
  return {crop[0], crop[1], crop[2], crop[3]};
}

inline Tensor empty_crop(const Tensor& image, const Crop& crop) {
  std::vector<int64_t> sizes{crop.height, crop.width, 3};
  if (image.dim() == 4) {
    sizes.insert(sizes.begin(), image.size(0));
  }
  return torch::stable::new_empty(image, sizes);
}

}  // namespace cosmos3
