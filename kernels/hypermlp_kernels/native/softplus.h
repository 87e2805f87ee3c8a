// softplus and sigmoid of several vectors side by side, to 1 or 2 units in the last place; NaN stays NaN.
//
// softplus(u) = max(u, 0) + log1p(exp(-|u|)): one formula for every u, so a value depends on nothing beside it.
#pragma once
#include <cmath>

#include "vectors.h"

namespace hypermlp {

#ifdef HYPERMLP_DOUBLE

template <bool SIGMOID, int N>
INLINE void softplus(const vec (&u)[N], vec (&y)[N], vec (&sigmoid)[N]) {
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < W; ++i) {
      real x = u[n][i], e = std::exp(-std::fabs(x));
      y[n][i] = (x < 0 ? 0 : x) + std::log1p(e);
      if (SIGMOID) sigmoid[n][i] = (x < 0 ? e : 1) / (1 + e);
    }
}

#else

// exp(-|u|) is 2^n times a polynomial, log1p on [0, 1] a polynomial. Both are minimax fits, in Estrin's order: chains
// of dependent operations are short, and those of N vectors go side by side.
template <bool SIGMOID, int N>
INLINE void softplus(const vec (&u)[N], vec (&y)[N], vec (&sigmoid)[N]) {
  // clang-format off
#define EACH UNROLLED(n, N)
  constexpr float LOG2_E = 1.44269504088896341f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float ROUND = 12583039.f;   // 1.5 * 2^23 + 127: adding it rounds, and leaves the biased exponent below
  constexpr float LAST = 87.33654f;     // beyond it exp(-x) is no normal number, and is taken for zero
  vec x[N], r[N], f[N], f2[N], t[N], t2[N], t4[N], a[N], b[N], c[N], d[N], e[N];
  EACH x[n] = (vec)((ivec)u[n] & 0x7fffffff);
  EACH r[n] = x[n] * -LOG2_E + ROUND;
  EACH c[n] = r[n] - ROUND;
  EACH f[n] = c[n] * -LN2_HIGH - x[n];
  EACH f[n] = c[n] * -LN2_LOW + f[n];
  EACH f2[n] = f[n] * f[n];
  // exp on [-ln 2 / 2, ln 2 / 2]
  EACH a[n] = f[n] * 1.97902438e-4f + 1.39447581e-3f;
  EACH b[n] = f[n] * 8.33349768e-3f + 4.16662954e-2f;
  EACH c[n] = f[n] * 1.66666657e-1f + 0.5f;
  EACH b[n] = a[n] * f2[n] + b[n];
  EACH d[n] = f[n] + 1.f;
  EACH c[n] = b[n] * f2[n] + c[n];
  EACH t[n] = (c[n] * f2[n] + d[n]) * (vec)((ivec)r[n] << 23);
  EACH t[n] = x[n] > LAST ? vec{} : t[n];
  // log1p on [0, 1]
  EACH t2[n] = t[n] * t[n];
  EACH a[n] = t[n] * -3.24402330e-3f + 1.98514536e-2f;
  EACH b[n] = t[n] * -5.69595173e-2f + 1.06036529e-1f;
  EACH c[n] = t[n] * -1.53055921e-1f + 1.96759388e-1f;
  EACH d[n] = t[n] * -2.49541342e-1f + 3.33299637e-1f;
  EACH e[n] = t[n] * -4.99999017e-1f + 1.f;
  EACH t4[n] = t2[n] * t2[n];
  EACH a[n] = a[n] * t2[n] + b[n];
  EACH c[n] = c[n] * t2[n] + d[n];
  EACH a[n] = a[n] * t4[n] + c[n];
  EACH a[n] = a[n] * t2[n] + e[n];
  EACH y[n] = t[n] * a[n] + (u[n] > 0.f ? u[n] : vec{});
  if (SIGMOID) {
    EACH c[n] = 1.f / (1.f + t[n]);
    EACH sigmoid[n] = u[n] > 0.f ? c[n] : t[n] * c[n];
  }
#undef EACH
  // clang-format on
}

#endif

}  // namespace hypermlp
