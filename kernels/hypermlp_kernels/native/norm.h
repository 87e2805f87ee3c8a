// The L2 norm of a row from the sums of its squares, and where these leave the range of numbers from the row itself.
#pragma once
#include <cmath>

#include "vectors.h"

namespace hypermlp {

// with squares that neither overflow nor vanish: everything is scaled by a power of two, which is exact
inline real scaled_norm(const real* row, long columns) {
  constexpr int LEAST = sizeof(real) == 4 ? -120 : -1000;  // 2 to minus this is a number still
  real most = 0;
  for (long x = 0; x < columns; ++x) most = std::fabs(row[x]) > most ? std::fabs(row[x]) : most;
  if (most == 0 || !finite(most)) return most;
  int exponent;
  std::frexp(most, &exponent);
  exponent = exponent < LEAST ? LEAST : exponent;
  const real scale = std::ldexp(real(1), -exponent);
  real total = 0;
  for (long x = 0; x < columns; ++x) total += row[x] * scale * (row[x] * scale);
  return std::ldexp(std::sqrt(total), exponent);
}

// squares: BLOCK partial sums
INLINE real row_norm(const real* squares, const real* row, long columns) {
  constexpr real LEAST = sizeof(real) == 4 ? 0x1p-100 : 0x1p-900;
  real total = 0;
  for (int i = 0; i < BLOCK; ++i) total += squares[i];
  if (total >= LEAST && finite(total)) return std::sqrt(total);
  return total == total ? scaled_norm(row, columns) : total;
}

// The unit of a row of this norm, as in `hypermlp/ops/row_norm.py`: a power of two, so that a row in it keeps its
// digits, and 1 for nearly all. In it an extreme norm is between 1 and 2, and the gate leaves room for the scale map.
INLINE real row_unit(real norm) {
  if ((norm >= real(0x1p-40) && norm <= real(0x1p40)) || !finite(norm)) return 1;
  int exponent;
  std::frexp(norm, &exponent);
  return std::ldexp(real(1), exponent - 1);
}

}  // namespace hypermlp
