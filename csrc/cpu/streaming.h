// Writing results that are larger than the caches.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace cosmos3 {

// From here a result is no longer in the caches when the next operation reads it.
constexpr int64_t kStreamedBytes = 8 << 20;

// Whether rows of `row_bytes` at `data`, `bytes` in all, are written by `stream`.
inline bool is_streamed(const void* data, int64_t row_bytes, int64_t bytes) {
#if defined(__SSE2__)
  return bytes >= kStreamedBytes && row_bytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(data) % 16 == 0;
#else
  return false;
#endif
}

// to[0 … count) = from[0 … count), past the caches: a plain store fetches the line that it is about
// to overwrite, half of what writing costs in memory traffic. `to` and `count` as `is_streamed`
// wants them; by the 16 bytes that every x86-64 has, of which a core joins four to a line.
COSMOS3_INLINE void stream(float* to, const float* from, int64_t count) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < count; i += 4) {
    _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
  }
#else
  std::memcpy(to, from, count * sizeof(float));
#endif
}

// After the last `stream` of a thread: other threads see what was written.
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace cosmos3
