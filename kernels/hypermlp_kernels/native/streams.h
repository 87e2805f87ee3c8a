// Rows of the inputs as `real`, whatever their type.
#pragma once
#include "call.h"

namespace hypermlp {

INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE float from_bfloat16(uint16_t x) { return from_bits((uint32_t)x << 16); }
INLINE float from_float16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13, exponent = rest & 0x0f800000;
  // the exponent's bias grows by 112; once more for infinity and NaN; a subnormal loses the leading bit it does not
  // have
  float normal = from_bits(rest + (112u << 23)), special = from_bits(rest + (224u << 23));
  float subnormal = from_bits(rest + (113u << 23)) - from_bits(113u << 23);
  float magnitude = exponent == 0 ? subnormal : exponent == 0x0f800000 ? special : normal;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  return from_bits(bits | sign);
}

// `count` elements of token t into y
inline void read_row(Type type, const Stream& x, long batch, long t, long head, long count, real* y) {
  const long at = batch * x.batch + t * x.token + head * x.head;
  if (type == REAL) {
    std::memcpy(y, static_cast<const real*>(x.data) + at, count * sizeof(real));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
    if (type == BFLOAT16)
      for (long i = 0; i < count; ++i) y[i] = from_bfloat16(p[i]);
    else
      for (long i = 0; i < count; ++i) y[i] = from_float16(p[i]);
  }
}

inline bool all_finite(const real* x, long count) {
  vec bad[VECTORS] = {};
  real total = 0;
  long i = 0;
  for (; i + BLOCK <= count; i += BLOCK)
    UNROLLED(n, VECTORS) {
      const vec y = load(x + i + n * W);
      bad[n] += y - y;
    }
  for (; i < count; ++i) total += x[i] - x[i];
  for (int n = 0; n < VECTORS; ++n) total += sum(bad[n]);
  return total == 0;
}

// zero in place of what is not finite
inline void make_finite(real* x, long count) {
  if (all_finite(x, count)) return;
  for (long i = 0; i < count; ++i)
    if (!finite(x[i])) x[i] = 0;
}

}  // namespace hypermlp
