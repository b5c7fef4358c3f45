// CPU kernels of cosmos3::winograd_conv3x3: a 3x3 convolution of stride 1 and zero padding 1 on
// channels-last float32, as Winograd's F(4x4, 3x3): 36 instead of 144 products per 4x4 outputs.
//
// With tiles d of 6x6 inputs and kernels g, the outputs are A^T [(G g G^T) . (B^T d B)] A. The
// interpolation points 0, +-3/4, +-3/2 and infinity are those of Lavin & Gray's scheme moved closer
// together; with them the rounding error of the Cosmos3 encoder is that of direct convolution.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "../channels_last.h"
#include "../checks.h"
#include "results.h"
#include "simd.h"
#include "streaming.h"

namespace cosmos3 {
namespace {

void check_winograd_weight(const Tensor& weight) {
  const char* op = "winograd_pack";
  check_rank(op, "weight", weight, 4, "[Cout, Cin, 3, 3]");
  check_float32(op, "weight", weight);
  if (weight.size(0) % 32 || weight.size(1) % 16 || weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op,
         ": weight must have shape [Cout, Cin, 3, 3] with Cout a multiple of 32 and Cin of 16, "
         "got ",
         list(weight.sizes()));
  }
  if (weight.size(1) == 0) {
    fail(op, ": weight must have input channels, got ", list(weight.sizes()));
  }
}

void check_winograd(const Tensor& x, const Tensor& packed_weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual) {
  const char* op = "winograd_conv3x3";
  check_rank(op, "x", x, 4, "[B, Cin, H, W]");
  check_float32(op, "x", x);
  check_rank(op, "packed_weight", packed_weight, 4, "[36, Cout/32, Cin, 32]");
  check_float32(op, "packed_weight", packed_weight);
  check_device(op, "packed_weight", packed_weight, "x", x);
  if (packed_weight.size(0) != 36 || packed_weight.size(2) != x.size(1) ||
      packed_weight.size(3) != 32) {
    fail(op, ": packed_weight must have shape [36, Cout/32, Cin, 32] for x ", list(x.sizes()),
         ", got ", list(packed_weight.sizes()));
  }
  // The kernels take input channels by the vector.
  if (x.size(1) == 0 || x.size(1) % 16) {
    fail(op, ": x must have a positive multiple of 16 channels, got ", x.size(1));
  }
  const int64_t out_channels = packed_weight.size(1) * 32;
  if (bias.has_value()) {
    check_float32(op, "bias", *bias);
    check_device(op, "bias", *bias, "x", x);
    if (bias->dim() != 1 || bias->size(0) != out_channels) {
      fail(op, ": bias must have shape [", out_channels, "], got ", list(bias->sizes()));
    }
  }
  if (residual.has_value()) {
    check_float32(op, "residual", *residual);
    check_device(op, "residual", *residual, "x", x);
    if (residual->dim() != 4 || residual->size(0) != x.size(0) ||
        residual->size(1) != out_channels || residual->size(2) != x.size(2) ||
        residual->size(3) != x.size(3)) {
      fail(op, ": residual must have shape [", x.size(0), ", ", out_channels, ", ", x.size(2), ", ",
           x.size(3), "], got ", list(residual->sizes()));
    }
  }
}

constexpr int kPoints = 36;
constexpr int kTile = 4;        // outputs along each edge of a tile
constexpr int kPatch = 6;       // inputs along each edge
constexpr int64_t kPanel = 32;  // output channels packed side by side
constexpr int64_t kRows = 12;   // tiles that one register block takes
constexpr int64_t kVectorLanes = 16;
constexpr int64_t kSummed = 64;  // products that are summed in a register
// Transformed inputs of one block of tiles: what stays in the last-level cache beside its outputs.
constexpr int64_t kBlockBytes = 4 << 20;
// But at least so many times kRows, among which the kernels' way from memory is shared.
constexpr int64_t kLeastRows = 8;

constexpr double kA = 0.75, kB = 1.5;
constexpr float kAf = kA, kBf = kB;

// Vectors pass between inlined functions only, so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float Vec __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));

// Through memcpy: tensors need not start where a vector may.
template <typename V>
COSMOS3_INLINE V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V>
COSMOS3_INLINE void store(float* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// B^T x, one dimension.
COSMOS3_INLINE void input_transform(const Vec* x, Vec* out, int stride) {
  constexpr float a2 = kA * kA, b2 = kB * kB, a2b2 = kA * kA * kB * kB, sum = kA * kA + kB * kB;
  const Vec even_a = x[4] - b2 * x[2], odd_a = kAf * (x[3] - b2 * x[1]);
  const Vec even_b = x[4] - a2 * x[2], odd_b = kBf * (x[3] - a2 * x[1]);
  out[0 * stride] = a2b2 * x[0] - sum * x[2] + x[4];
  out[1 * stride] = even_a + odd_a;
  out[2 * stride] = even_a - odd_a;
  out[3 * stride] = even_b + odd_b;
  out[4 * stride] = even_b - odd_b;
  out[5 * stride] = a2b2 * x[1] - sum * x[3] + x[5];
}

// A^T x, one dimension.
COSMOS3_INLINE void output_transform(const Vec* x, Vec* out, int stride) {
  constexpr float a2 = kA * kA, b2 = kB * kB, a3 = kA * kA * kA, b3 = kB * kB * kB;
  const Vec even_a = x[1] + x[2], odd_a = x[1] - x[2];
  const Vec even_b = x[3] + x[4], odd_b = x[3] - x[4];
  out[0 * stride] = x[0] + even_a + even_b;
  out[1 * stride] = kAf * odd_a + kBf * odd_b;
  out[2 * stride] = a2 * even_a + b2 * even_b;
  out[3 * stride] = a3 * odd_a + b3 * odd_b + x[5];
}

struct Conv {
  int64_t batch, height, width, in_channels, out_channels;
  int64_t tiles_high, tiles_wide;
  bool streamed;  // the result, see `is_streamed`

  int64_t tiles() const {
    return batch * tiles_high * tiles_wide;
  }
};

// A thread's transformed tiles or products, [point][tile][channel]. Rows and points do not lie a
// power of two apart, where they would all fall into the same few sets of a cache.
struct Tiles {
  Tiles(float* to, int64_t rows, int64_t channels)
      : data(to),
        pitch(channels + kLine),
        point(rows * pitch + (rows * pitch / kLine % 2 ? 0 : kLine)) {}
  static int64_t size(int64_t rows, int64_t channels) {
    return kPoints * (rows * (channels + kLine) + kLine);
  }
  float* at(int64_t of_point, int64_t row) const {
    return data + of_point * point + row * pitch;
  }

  static constexpr int64_t kLine = 16;  // floats of a cache line
  float* data;
  int64_t pitch, point;
};

struct TileOrigin {
  int64_t b, y, x;  // of the tile's first output
};

COSMOS3_INLINE TileOrigin origin_of(const Conv& conv, int64_t tile) {
  const int64_t tx = tile % conv.tiles_wide;
  const int64_t ty = tile / conv.tiles_wide % conv.tiles_high;
  return {tile / conv.tiles_wide / conv.tiles_high, ty * kTile, tx * kTile};
}

// Tiles [first, first + count).
COSMOS3_CLONES void transform_inputs(const Tiles& v, const float* in, const Conv& conv,
                                     int64_t first, int64_t count) {
  for (int64_t local = 0; local < count; ++local) {
    const TileOrigin at = origin_of(conv, first + local);
    for (int64_t c = 0; c < conv.in_channels; c += kVectorLanes) {
      Vec columns[kPoints];
      for (int x = 0; x < kPatch; ++x) {
        const int64_t column = at.x + x - 1;
        Vec patch[kPatch];
        for (int y = 0; y < kPatch; ++y) {
          const int64_t row = at.y + y - 1;
          const bool inside = row >= 0 && row < conv.height && column >= 0 && column < conv.width;
          patch[y] = inside ? load<Vec>(in +
                                        ((at.b * conv.height + row) * conv.width + column) *
                                            conv.in_channels +
                                        c)
                            : Vec{};
        }
        input_transform(patch, columns + x, kPatch);
      }
      for (int y = 0; y < kPatch; ++y) {
        Vec row[kPatch];
        input_transform(columns + y * kPatch, row, 1);
        for (int x = 0; x < kPatch; ++x) {
          store(v.at(y * kPatch + x, local) + c, row[x]);
        }
      }
    }
  }
}

COSMOS3_CLONES void transform_outputs(float* out, const Tiles& m, const float* bias,
                                      const float* residual, const Conv& conv, int64_t first,
                                      int64_t count) {
  for (int64_t local = 0; local < count; ++local) {
    const TileOrigin at = origin_of(conv, first + local);
    for (int64_t c = 0; c < conv.out_channels; c += kVectorLanes) {
      Vec columns[kTile * kPatch];
      for (int x = 0; x < kPatch; ++x) {
        Vec points[kPatch];
        for (int y = 0; y < kPatch; ++y) {
          points[y] = load<Vec>(m.at(y * kPatch + x, local) + c);
        }
        output_transform(points, columns + x, kPatch);
      }
      for (int y = 0; y < kTile && at.y + y < conv.height; ++y) {
        Vec row[kTile];
        output_transform(columns + y * kPatch, row, 1);
        for (int x = 0; x < kTile && at.x + x < conv.width; ++x) {
          const int64_t offset =
              ((at.b * conv.height + at.y + y) * conv.width + at.x + x) * conv.out_channels + c;
          Vec value = row[x];
          if (bias) {
            value += load<Vec>(bias + c);
          }
          if (residual) {
            value += load<Vec>(residual + offset);
          }
          if (conv.streamed) {
            stream(out + offset, reinterpret_cast<const float*>(&value), kVectorLanes);
          } else {
            store(out + offset, value);
          }
        }
      }
    }
  }
}

// m[Rows][kPanel] = v[Rows][depth] * u[depth][kPanel]. Products are summed in registers, kSummed at
// a time, and those sums in m: a sum of a thousand products, one after the other, would round more
// than both transforms. On the way it fetches `lines` cache lines from `ahead`, at most one for
// each of the depth.
template <typename V, int Rows>
COSMOS3_INLINE void multiply_block(float* m, int64_t m_pitch, const float* v, int64_t v_pitch,
                                   const float* u, int64_t depth, const float* ahead,
                                   int64_t lines) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  constexpr int kVectors = kPanel / kLanes;
  for (int64_t begin = 0; begin < depth; begin += kSummed) {
    const int64_t end = std::min(begin + kSummed, depth);
    V sums[Rows][kVectors] = {};
    for (int64_t k = begin; k < end; ++k) {
      if (k < lines) {
        __builtin_prefetch(ahead + k * Tiles::kLine, 0, 2);
      }
      V right[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        right[j] = load<V>(u + k * kPanel + j * kLanes);
      }
      for (int i = 0; i < Rows; ++i) {
        const float left = v[i * v_pitch + k];
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] += left * right[j];
        }
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        float* to = m + i * m_pitch + j * kLanes;
        store(to, begin == 0 ? sums[i][j] : load<V>(to) + sums[i][j]);
      }
    }
  }
}

// The product of one point: m[rows][out] = v[rows][in] * u, `u` packed in panels. A panel comes
// from beyond the second-level cache, slower than it is multiplied; so while one is, the next one,
// which lies behind it, is fetched there, a part beside each block of rows.
template <typename V, int Rows>
COSMOS3_INLINE void multiply_point(const Tiles& m, const Tiles& v, const float* u, int point,
                                   int64_t rows, int64_t in, int64_t out) {
  const int64_t lines = in * kPanel / Tiles::kLine, blocks = rows / Rows;
  const int64_t each = std::min(in, (lines + blocks - 1) / blocks);
  for (int64_t panel = 0; panel < out / kPanel; ++panel, u += in * kPanel) {
    const float* ahead = u + in * kPanel;
    for (int64_t row = 0; row < rows; row += Rows, ahead += each * Tiles::kLine) {
      multiply_block<V, Rows>(m.at(point, row) + panel * kPanel, m.pitch, v.at(point, row), v.pitch,
                              u, in, ahead, each);
    }
  }
}

using Multiply = void (*)(const Tiles&, const Tiles&, const float*, int, int64_t, int64_t, int64_t);

// Rows x vectors fill the register file of each set: 32 of 64 bytes, 16 of 32, 16 of 16.
#if defined(__x86_64__)
__attribute__((target("avx512f,fma"), optimize("fp-contract=fast"))) void multiply_avx512(
    const Tiles& m, const Tiles& v, const float* u, int point, int64_t rows, int64_t in,
    int64_t out) {
  multiply_point<Vec, 12>(m, v, u, point, rows, in, out);
}
__attribute__((target("avx2,fma"), optimize("fp-contract=fast"))) void multiply_avx2(
    const Tiles& m, const Tiles& v, const float* u, int point, int64_t rows, int64_t in,
    int64_t out) {
  multiply_point<Vec8, 3>(m, v, u, point, rows, in, out);
}
#endif
void multiply_base(const Tiles& m, const Tiles& v, const float* u, int point, int64_t rows,
                   int64_t in, int64_t out) {
  multiply_point<Vec8, 1>(m, v, u, point, rows, in, out);
}

Multiply best_multiply() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return multiply_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return multiply_avx2;
  }
#endif
  return multiply_base;
}

// What a thread works in: 10 MB at 256 channels, 29 at 1024. It is kept from call to call and goes
// with the thread: memory that malloc gives back to the system has its 4 KB pages made and cleared
// again at each call.
class Workspace {
 public:
  float* of(int64_t floats) {
    if (floats > size_) {
      pointer_.reset();
      size_ = 0;
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      pointer_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (pointer_ == nullptr) {
        throw std::bad_alloc();
      }
      size_ = floats;
    }
    return pointer_.get();
  }

 private:
  struct Free {
    void operator()(float* pointer) const {
      std::free(pointer);
    }
  };
  std::unique_ptr<float[], Free> pointer_;
  int64_t size_ = 0;
};

// [Cout, Cin, 3, 3] in memory.
struct Kernels {
  const float* data;
  int64_t strides[4];
};

// G g G^T of the kernels of some panels. By the panel, so that what is written lies side by side.
COSMOS3_CLONES
void pack_panels(float* to, const Kernels& g, int64_t panels, int64_t in, bool streamed,
                 int64_t begin, int64_t end) {
  constexpr double a2 = kA * kA, b2 = kB * kB;
  constexpr double at_zero = a2 * b2, at_a = 2 * a2 * (a2 - b2), at_b = 2 * b2 * (b2 - a2);
  constexpr double transform[kPatch][3] = {{1 / at_zero, 0, 0},
                                           {1 / at_a, kA / at_a, a2 / at_a},
                                           {1 / at_a, -kA / at_a, a2 / at_a},
                                           {1 / at_b, kB / at_b, b2 / at_b},
                                           {1 / at_b, -kB / at_b, b2 / at_b},
                                           {0, 0, 1}};
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < in; ++i) {
      double taps[3][3][kPanel], half[kPatch][3][kPanel];
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const float* kernel = g.data + (panel * kPanel + lane) * g.strides[0] + i * g.strides[1];
        for (int tap = 0; tap < 9; ++tap) {
          taps[tap / 3][tap % 3][lane] = kernel[tap / 3 * g.strides[2] + tap % 3 * g.strides[3]];
        }
      }
      for (int p = 0; p < kPatch; ++p) {
        const double* row = transform[p];
        for (int x = 0; x < 3; ++x) {
          for (int64_t lane = 0; lane < kPanel; ++lane) {
            half[p][x][lane] =
                row[0] * taps[0][x][lane] + row[1] * taps[1][x][lane] + row[2] * taps[2][x][lane];
          }
        }
      }
      for (int point = 0; point < kPoints; ++point) {
        const auto& values = half[point / kPatch];
        const double* column = transform[point % kPatch];
        float* place = to + ((point * panels + panel) * in + i) * kPanel;
        float made[kPanel];
        for (int64_t lane = 0; lane < kPanel; ++lane) {
          made[lane] =
              static_cast<float>(values[0][lane] * column[0] + values[1][lane] * column[1] +
                                 values[2][lane] * column[2]);
        }
        if (streamed) {
          stream(place, made, kPanel);
        } else {
          std::memcpy(place, made, sizeof(made));
        }
      }
    }
  }
}

Tensor pack(const Tensor& weight) {
  const int64_t panels = weight.size(0) / kPanel, in = weight.size(1);
  Tensor packed = new_result({kPoints, panels, in, kPanel}, ScalarType::Float);
  const Kernels g{static_cast<const float*>(weight.const_data_ptr()),
                  {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const bool streamed = is_streamed(to, kPanel * sizeof(float), packed.numel() * sizeof(float));
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    pack_panels(to, g, panels, in, streamed, begin, end);
    end_streaming();
  });
  return packed;
}

Tensor convolve(const Tensor& x, const Tensor& packed_weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual) {
  Conv conv{x.size(0),
            x.size(2),
            x.size(3),
            x.size(1),
            packed_weight.size(1) * kPanel,
            (x.size(2) + kTile - 1) / kTile,
            (x.size(3) + kTile - 1) / kTile,
            false};
  const Tensor input = channels_last(x);
  const Tensor weight = torch::stable::contiguous(packed_weight);
  std::optional<Tensor> dense_bias, dense_residual;
  if (bias.has_value()) {
    dense_bias = torch::stable::contiguous(*bias);
  }
  if (residual.has_value()) {
    dense_residual = channels_last(*residual);
  }
  Tensor out = new_image(conv.batch, conv.out_channels, conv.height, conv.width, ScalarType::Float);
  if (out.numel() == 0) {
    return out;
  }
  auto data = [](const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
  };
  const float* in = data(input);
  const float* u = data(weight);
  const float* bias_data = dense_bias ? data(*dense_bias) : nullptr;
  const float* residual_data = dense_residual ? data(*dense_residual) : nullptr;
  float* to = static_cast<float*>(out.mutable_data_ptr());
  conv.streamed = is_streamed(to, conv.out_channels * sizeof(float), out.numel() * sizeof(float));
  static const Multiply multiply = best_multiply();

  // Threads share the tiles in units of one register block; each walks its share in blocks.
  const int64_t tiles = conv.tiles();
  const int64_t units = (tiles + kRows - 1) / kRows;
  const int64_t row_bytes = kPoints * conv.in_channels * sizeof(float);
  const int64_t block = std::max(kLeastRows, kBlockBytes / row_bytes / kRows) * kRows;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kRows, tiles);
    const int64_t held = std::min(block, (end - begin) * kRows);
    thread_local Workspace workspace;
    float* memory =
        workspace.of(Tiles::size(held, conv.in_channels) + Tiles::size(held, conv.out_channels));
    const Tiles v(memory, held, conv.in_channels);
    const Tiles m(memory + Tiles::size(held, conv.in_channels), held, conv.out_channels);
    for (int64_t first = begin * kRows; first < last; first += block) {
      const int64_t count = std::min(block, last - first);
      // Rows past the last tile are multiplied too and never read.
      const int64_t rows = (count + kRows - 1) / kRows * kRows;
      for (int point = 0; point < kPoints; ++point) {
        for (int64_t row = count; row < rows; ++row) {
          std::fill_n(v.at(point, row), conv.in_channels, 0.0f);
        }
      }
      transform_inputs(v, in, conv, first, count);
      for (int point = 0; point < kPoints; ++point) {
        multiply(m, v, u + point * conv.in_channels * conv.out_channels, point, rows,
                 conv.in_channels, conv.out_channels);
      }
      transform_outputs(to, m, bias_data, residual_data, conv, first, count);
    }
    end_streaming();
  });
  return out;
}

Tensor winograd_pack(Tensor weight) {
  check_winograd_weight(weight);
  return allocating("winograd_pack", [&] { return pack(weight); });
}

Tensor winograd_conv3x3(Tensor x, Tensor packed_weight, std::optional<Tensor> bias,
                        std::optional<Tensor> residual) {
  check_winograd(x, packed_weight, bias, residual);
  return allocating("winograd_conv3x3", [&] { return convolve(x, packed_weight, bias, residual); });
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def("winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "winograd_conv3x3(Tensor x, Tensor packed_weight, Tensor? bias=None, Tensor? residual=None) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&cosmos3::winograd_pack));
  m.impl("winograd_conv3x3", TORCH_BOX(&cosmos3::winograd_conv3x3));
}
