// Loads and stores bfloat16 and float16 in host memory, with rounding to nearest even.
#pragma once

#include <cstdint>

#include "../update_math.h"
#include "compiler.h"

namespace samkernels::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

static inline float ToFloat(float x) { return x; }
static inline float ToFloat(BFloat16 x) { return FromBits(uint32_t{x.bits} << 16); }

static inline void FromFloat(float x, BFloat16* out) {
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

#ifdef __F16C__

static inline float ToFloat(Float16 x) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
}

static inline void FromFloat(float x, Float16* out) {
  const __m128i half = _mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT);
  out->bits = static_cast<uint16_t>(_mm_cvtsi128_si32(half));
}

#else

static inline float ToFloat(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return FromBits(sign | 0x7f800000u | (magnitude & 0x03ffu) << 13);
  // A float whose exponent field is that of the half; the product corrects the bias, and is exact
  // for subnormal halves too.
  const float scaled = FromBits(magnitude << 13) * FromBits(0x77800000u);  // 2^112
  return FromBits(sign | BitsOf(scaled));
}

static inline void FromFloat(float x, Float16* out) {
  const uint32_t bits = BitsOf(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the bit of 2^-24
    half = BitsOf(FromBits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#endif

}  // namespace samkernels::cpu
