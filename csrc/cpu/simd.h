// Compiling one loop for several instruction sets, and the arithmetic those loops share.
#pragma once

#include <cstdint>
#include <cstring>

// GCC compiles the function once per set and picks at load time; elsewhere the base set serves.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define COSMOS3_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COSMOS3_CLONES
#endif
// What is called from such a function has to be inlined into it to be compiled for its set.
#define COSMOS3_INLINE inline __attribute__((always_inline))

namespace cosmos3 {

template <typename To, typename From>
COSMOS3_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

// e^x for x >= -86 (clamped to it), within 2 units in the last place, infinite where it is too
// large: 2^n by the exponent's bits times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes' expf).
COSMOS3_INLINE float exp_approx(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -86.0f ? -86.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Half of it, since 2^128 has no bits of its own.
  return 2.0f * bits_as<float>(bits_as<uint32_t>(p) + ((bits_as<uint32_t>(shifted) - 1) << 23));
}

}  // namespace cosmos3
