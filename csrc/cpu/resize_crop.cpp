// CPU kernel of cosmos3::resize_crop: Pillow's resize of bytes in two passes, of which the crop
// sees only the rows and columns that it needs.
//
// The pass along rows takes kRows rows at a time, interleaved element by element, so that a vector
// holds one element of every row and each weight serves all of them. What one pass makes for the
// other lies in a buffer of a few rows, which stays in the cache.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../resize_crop.h"
#include "simd.h"

namespace cosmos3 {
namespace {

// Rows that a pass takes, or makes, at a time.
constexpr int64_t kRows = 16;
// Bytes of a pixel of each of them.
constexpr int64_t kPixel = 3 * kRows;
// Source columns that the pass along rows takes at a time, and bytes of a row that the one across
// rows does: what they are widened to stays in the cache.
constexpr int64_t kColumns = 512;
constexpr int64_t kBlock = 64;
constexpr double kProductsOfAStrip = 1 << 20;

// A sum of weighted bytes, rounded and clamped.
COSMOS3_INLINE uint8_t to_byte(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum) >> kFractionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// to[i] = the byte of 1/2 + sum over taps of from[tap * step + i] * weights[tap], for i < length.
// Unsigned, since the sums of a filter that is no Pillow's might wrap.
template <int64_t length>
COSMOS3_INLINE void weighted_bytes(const uint32_t* from, int64_t step, const int32_t* weights,
                                   int64_t taps, uint8_t* __restrict__ to) {
  uint32_t sums[length];
  for (int64_t i = 0; i < length; ++i) {
    sums[i] = kHalf;
  }
  for (int64_t tap = 0; tap < taps; ++tap, from += step) {
    const uint32_t weight = weights[tap];
    for (int64_t i = 0; i < length; ++i) {
      sums[i] += from[i] * weight;
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    to[i] = to_byte(sums[i]);
  }
}

// Units 4 i … 4 i + 3 of `to` are unit i of `a`, `b`, `c` and `d`, for i < length.
template <typename Unit>
COSMOS3_INLINE void zip(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d,
                        int64_t length, uint8_t* __restrict__ to) {
  constexpr int64_t size = sizeof(Unit);
  for (int64_t i = 0; i < length; ++i, to += 4 * size) {
    std::memcpy(to, a + i * size, size);
    std::memcpy(to + size, b + i * size, size);
    std::memcpy(to + 2 * size, c + i * size, size);
    std::memcpy(to + 3 * size, d + i * size, size);
  }
}

template <typename Unit>
COSMOS3_INLINE void unzip(const uint8_t* from, int64_t length, uint8_t* __restrict__ a,
                          uint8_t* __restrict__ b, uint8_t* __restrict__ c,
                          uint8_t* __restrict__ d) {
  constexpr int64_t size = sizeof(Unit);
  for (int64_t i = 0; i < length; ++i, from += 4 * size) {
    std::memcpy(a + i * size, from, size);
    std::memcpy(b + i * size, from + size, size);
    std::memcpy(c + i * size, from + 2 * size, size);
    std::memcpy(d + i * size, from + 3 * size, size);
  }
}

// lanes[(3 * x + c) * kRows + r] = rows[r][pitch * (first + x) + c] for x < pixels and c < 3; `a`
// and `b` hold as many bytes, for c < pitch.
COSMOS3_INLINE void interleave(const uint8_t* const* rows, int64_t pitch, int64_t first,
                               int64_t pixels, uint8_t* a, uint8_t* b, uint32_t* lanes) {
  static_assert(kRows == 16);
  // Not what may follow the last pixel's three bytes, which may be nobody's memory.
  const int64_t length = pitch * (pixels - 1) + 3;
  const int64_t offset = pitch * first, quarter = 4 * length;
  for (int64_t r = 0; r < kRows; r += 4) {
    zip<uint8_t>(rows[r] + offset, rows[r + 1] + offset, rows[r + 2] + offset, rows[r + 3] + offset,
                 length, a + r * length);
  }
  zip<uint32_t>(a, a + quarter, a + 2 * quarter, a + 3 * quarter, length, b);
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t i = 0; i < kPixel; ++i) {
      lanes[kPixel * x + i] = b[pitch * kRows * x + i];
    }
  }
}

// rows[r][offset + i] = a[i * kRows + r] for i < length; `b` holds as many bytes.
COSMOS3_INLINE void deinterleave(const uint8_t* a, uint8_t* b, int64_t length, uint8_t* const* rows,
                                 int64_t offset) {
  const int64_t quarter = 4 * length;
  unzip<uint32_t>(a, length, b, b + quarter, b + 2 * quarter, b + 3 * quarter);
  for (int64_t r = 0; r < kRows; r += 4) {
    unzip<uint8_t>(b + r * length, length, rows[r] + offset, rows[r + 1] + offset,
                   rows[r + 2] + offset, rows[r + 3] + offset);
  }
}

// An Axis as the kernels take it.
struct Windows {
  const int32_t* starts;
  const int32_t* weights;
  int64_t outputs, taps;

  // Source elements that outputs first … last - 1 take.
  COSMOS3_INLINE int64_t span(int64_t first, int64_t last) const {
    return starts[last - 1] + taps - starts[first];
  }
};

// Memory for one tile of a pass.
struct Tile {
  uint32_t* elements;
  uint8_t *bytes, *more_bytes;
};

// The pass along rows, for kRows of them, each given from its first source column on; `pitch` bytes
// from a source pixel to the next.
COSMOS3_CLONES void along_rows(const uint8_t* const* rows, const int64_t pitch,
                               const Windows columns, const int64_t tile_columns, const Tile tile,
                               uint8_t* const* to) {
  for (int64_t first = 0, last; first < columns.outputs; first = last) {
    last = first + 1;
    while (last < columns.outputs && last - first < tile_columns &&
           columns.span(first, last + 1) <= tile_columns) {
      ++last;
    }
    const int64_t start = columns.starts[first];
    interleave(rows, pitch, start, columns.span(first, last), tile.bytes, tile.more_bytes,
               tile.elements);
    for (int64_t x = first; x < last; ++x) {
      weighted_bytes<kPixel>(tile.elements + kPixel * (columns.starts[x] - start), kPixel,
                             columns.weights + x * columns.taps, columns.taps,
                             tile.bytes + kPixel * (x - first));
    }
    deinterleave(tile.bytes, tile.more_bytes, 3 * (last - first), to, 3 * first);
  }
}

// The pass across rows of `length` bytes, for outputs first … last - 1; rows[0] is the first row
// that they take.
COSMOS3_CLONES void across_rows(const uint8_t* const* rows, const Windows windows, int64_t first,
                                int64_t last, int64_t length, const Tile tile, uint8_t* const* to) {
  const int64_t start = windows.starts[first], span = windows.span(first, last);
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t width = std::min(kBlock, length - begin);
    for (int64_t row = 0; row < span; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        tile.elements[row * kBlock + i] = rows[row][begin + i];
      }
    }
    for (int64_t y = first; y < last; ++y) {
      weighted_bytes<kBlock>(tile.elements + kBlock * (windows.starts[y] - start), kBlock,
                             windows.weights + y * windows.taps, windows.taps, tile.bytes);
      std::memcpy(to[y - first] + begin, tile.bytes, width);
    }
  }
}

int64_t rounded_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// The passes that one resize takes, and the memory that a thread needs for them.
class Resize {
 public:
  // `pitch`, `pixel_pitch`: bytes from a source row and pixel to the next.
  Resize(const Axis& columns, const Axis& rows, int64_t pitch, int64_t pixel_pitch,
         bool vertical_first)
      : columns_{columns.starts.data(), columns.weights.data(), columns.outputs(), columns.taps},
        rows_{rows.starts.data(), rows.weights.data(), rows.outputs(), rows.taps},
        along_(columns.resized),
        across_(rows.resized || !columns.resized),
        vertical_first_(vertical_first),
        pitch_(pitch),
        pixel_pitch_(pixel_pitch) {
    const int64_t source_columns = columns.end - columns.begin;
    for (int64_t y = 0; y < rows_.outputs; ++y) {
      span_ = std::max(span_, rows_.span(y, std::min(y + kRows, rows_.outputs)));
    }
    tile_columns_ = std::max(columns_.taps, std::min(kColumns, source_columns));
    length_ = 3 * columns_.outputs;
    between_length_ = vertical_first ? 3 * source_columns : length_;
    between_rows_ = vertical_first ? kRows : span_ + kRows;

    int64_t at = 0;
    auto take = [&](int64_t bytes) { return std::exchange(at, at + rounded_up(bytes, 64)); };
    const int64_t tile = pixel_pitch * kRows * tile_columns_;
    pointers_at_ = take(span_ * sizeof(const uint8_t*));
    elements_at_ = take(std::max(kPixel * tile_columns_, kBlock * span_) * sizeof(uint32_t));
    bytes_at_ = take(std::max(tile, kBlock));
    more_bytes_at_ = take(tile);
    between_at_ = take(between_rows_ * between_length_);
    spare_at_ = take(kRows * length_);
    scratch_bytes_ = at;
  }

  int64_t scratch_bytes() const {
    return scratch_bytes_;
  }

  // Rows [first, last) of the crop, whose row 0 is at `to`; `source` is where the first row begins
  // that the outputs take.
  void run(const uint8_t* source, int64_t first, int64_t last, uint8_t* scratch,
           uint8_t* to) const {
    auto source_row = [&](int64_t row) { return source + row * pitch_; };
    // A ring: rows that no output needs any more make room for the next ones.
    auto between_row = [&](int64_t row) {
      return scratch + between_at_ + row % between_rows_ * between_length_;
    };
    const int64_t end = rows_.starts[last - 1] + rows_.taps;
    int64_t made = rows_.starts[first];
    for (int64_t y = first; y < last; y += kRows) {
      const int64_t count = std::min(kRows, last - y);
      uint8_t* wanted[kRows];
      const uint8_t* from[kRows];
      uint8_t* between[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        // What is made of a row again, where kRows are not left, is for nobody.
        wanted[r] = r < count ? to + (y + r) * length_ : scratch + spare_at_ + r * length_;
      }
      if (!along_) {
        across(y, count, length_, source_row, scratch, wanted);
      } else if (!across_ || vertical_first_) {
        for (int64_t r = 0; r < kRows; ++r) {
          between[r] = between_row(r);
          const int64_t taken = std::min(r, count - 1);
          from[r] = across_ ? between_row(taken) : source_row(rows_.starts[y + taken]);
        }
        if (across_) {
          across(y, count, between_length_, source_row, scratch, between);
        }
        along(from, scratch, wanted);
      } else {
        for (; made < rows_.starts[y + count - 1] + rows_.taps; made += kRows) {
          for (int64_t r = 0; r < kRows; ++r) {
            from[r] = source_row(std::min(made + r, end - 1));
            between[r] = between_row(made + r);
          }
          along(from, scratch, between);
        }
        across(y, count, length_, between_row, scratch, wanted);
      }
    }
  }

 private:
  Windows columns_, rows_;
  bool along_, across_, vertical_first_;
  int64_t pitch_, pixel_pitch_;
  int64_t span_ = 0;  // source rows that kRows outputs take
  int64_t tile_columns_;
  int64_t length_;                         // bytes of a row of the crop
  int64_t between_length_, between_rows_;  // what the first pass makes for the second
  // Where the parts of the scratch memory begin.
  int64_t pointers_at_, elements_at_, bytes_at_, more_bytes_at_, between_at_, spare_at_;
  int64_t scratch_bytes_;

  Tile tile(uint8_t* scratch) const {
    return {reinterpret_cast<uint32_t*>(scratch + elements_at_), scratch + bytes_at_,
            scratch + more_bytes_at_};
  }

  void along(const uint8_t* const* from, uint8_t* scratch, uint8_t* const* to) const {
    along_rows(from, pixel_pitch_, columns_, tile_columns_, tile(scratch), to);
  }

  // Outputs y … y + count - 1, from rows of `length` bytes of which `row(i)` is the i-th.
  template <typename Row>
  void across(int64_t y, int64_t count, int64_t length, const Row& row, uint8_t* scratch,
              uint8_t* const* to) const {
    auto** taken = reinterpret_cast<const uint8_t**>(scratch + pointers_at_);
    for (int64_t i = 0; i < rows_.span(y, y + count); ++i) {
      taken[i] = row(rows_.starts[y] + i);
    }
    across_rows(taken, rows_, y, y + count, length, tile(scratch), to);
  }
};

Tensor resize_crop(Tensor image, std::vector<int64_t> size, std::vector<int64_t> crop,
                   std::string filter, bool vertical_first) {
  const char* op = "resize_crop";
  const Crop wanted = check_resize_crop(image, size, crop, filter);
  const Filter& chosen = *find_filter(filter);
  const int64_t rank = image.dim();
  const int64_t batch = rank == 4 ? image.size(0) : 1;
  // First of all: a result that no machine holds fails here.
  Tensor out = allocating(op, [&] { return empty_crop(image, wanted); });
  const auto [kept_columns, kept_rows] = allocating(op, [&] {
    return std::make_pair(
        axis_of(image.size(rank - 2), size[1], wanted.left, wanted.width, chosen),
        axis_of(image.size(rank - 3), size[0], wanted.top, wanted.height, chosen));
  });
  const Axis &columns = *kept_columns, &rows = *kept_rows;
  Tensor source = torch::stable::narrow(image, rank - 3, rows.begin, rows.end - rows.begin);
  source = torch::stable::narrow(source, rank - 2, columns.begin, columns.end - columns.begin);
  // Pixels that follow each other, or, where the source is read along rows, with a byte in between
  // as Pillow keeps them.
  const bool along_first = columns.resized && !(vertical_first && rows.resized);
  int64_t pixel_pitch = source.stride(rank - 2);
  if (source.stride(rank - 1) != 1 || !(pixel_pitch == 3 || (pixel_pitch == 4 && along_first))) {
    source = allocating(op, [&] { return torch::stable::contiguous(source); });
    pixel_pitch = 3;
  }
  const Resize resize(columns, rows, source.stride(rank - 3), pixel_pitch, vertical_first);
  // Of a strip, rows that it shares with the one before are made twice: at most one per thread, and
  // none for a picture that takes less time than a thread takes to wake up.
  const int64_t lines = batch * wanted.height;
  const double products =
      3.0 * batch * wanted.width *
      (static_cast<double>(rows.end - rows.begin) * columns.taps + wanted.height * rows.taps);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = static_cast<int64_t>(std::min(products / kProductsOfAStrip, 1e9));
  const int64_t strips = std::clamp<int64_t>(std::min(lines / kRows, worth), 1, threads);
  const int64_t scratch_bytes = resize.scratch_bytes();
  Tensor scratch =
      allocating(op, [&] { return torch::stable::new_empty(image, {strips * scratch_bytes}); });
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  auto* memory = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  const int64_t image_step = rank == 4 ? source.stride(0) : 0;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t last = lines * (strip + 1) / strips;
      for (int64_t line = lines * strip / strips, count; line < last; line += count) {
        const int64_t b = line / wanted.height, first = line % wanted.height;
        count = std::min(last - line, wanted.height - first);
        resize.run(from + b * image_step, first, first + count, memory + strip * scratch_bytes,
                   to + b * wanted.height * wanted.width * 3);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace cosmos3

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos3, m) {
  m.def(
      "resize_crop(Tensor image, int[2] size, int[4] crop, str filter, "
      "bool vertical_first=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos3, CPU, m) {
  m.impl("resize_crop", TORCH_BOX(&cosmos3::resize_crop));
}
