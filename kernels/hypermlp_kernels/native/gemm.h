// Matrix products. All twelve of the operator are C[i, j] = sum_k A[i, k] B[k, j] with j side by side in memory and any
// distance between rows: one micro-kernel, whose sums stay in registers.
//
// An element is one chain of multiply-adds in the order of k, cut at places that the caller chooses: how many rows go
// together changes no bit of it.
#pragma once
#include "vectors.h"

namespace hypermlp {

// sums over `depth` for M rows and one block of columns; take(acc) does what is to be done with them
template <int M, class Take>
INLINE void micro(long depth, const real* a, long a_row, long a_step, const real* b, long b_step, Take take) {
  vec acc[M][VECTORS];
  UNROLLED(m, M)
    UNROLLED(n, VECTORS) acc[m][n] = vec{};
  for (long k = 0; k < depth; ++k, a += a_step, b += b_step) {
    vec row[VECTORS];
    UNROLLED(n, VECTORS) row[n] = load(b + n * W);
    UNROLLED(m, M) {
      vec x = splat(a[m * a_row]);
      UNROLLED(n, VECTORS) acc[m][n] += x * row[n];
    }
  }
  take(acc);
}

template <int M, bool ADD>
INLINE void rows_of_product(long depth, const real* a, long a_row, long a_step, const real* b, long b_step, real* c,
                            long c_row) {
  micro<M>(depth, a, a_row, a_step, b, b_step, [&](vec(&acc)[M][VECTORS]) __attribute__((always_inline)) {
    UNROLLED(m, M)
      UNROLLED(n, VECTORS) {
        real* p = c + m * c_row + n * W;
        store(p, ADD ? load(p) + acc[m][n] : acc[m][n]);
      }
  });
}

// C = A B, or C += A B, for `rows` by `columns`; columns are written in whole blocks
template <bool ADD>
__attribute__((noinline)) void product(long rows, long columns, long depth, const real* a, long a_row, long a_step,
                                       const real* b, long b_step, real* c, long c_row) {
  for (long j = 0; j < columns; j += BLOCK, b += BLOCK, c += BLOCK) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      rows_of_product<ROWS, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row);
    for (; i + 3 <= rows; i += 3)
      rows_of_product<3, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row);
    for (; i < rows; ++i) rows_of_product<1, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row);
  }
}

// where a long sum is cut, so that the part of B stays in the first-level cache: at multiples of CUT counted from its
// end (lag 0, whatever the tile's first lag) or from its start (the first token)
constexpr long CUT = 256;
enum class From { START, END };

// C = A B over k in [begin, end); panels of B (one block of columns each) are `panel` apart
inline void long_product(long rows, long columns, long begin, long end, From from, const real* a, long a_row,
                         const real* b, long b_step, long panel, real* c, long c_row) {
  bool first = true;
  for (long k = begin, next; k < end; k = next, first = false) {
    next = from == From::START ? min(end, (k / CUT + 1) * CUT) : end - (end - k - 1) / CUT * CUT;
    for (long j = 0; j < columns; j += BLOCK) {
      const real* part = b + j / BLOCK * panel + k * b_step;
      if (first)
        product<false>(rows, BLOCK, next - k, a + k, a_row, 1, part, b_step, c + j, c_row);
      else
        product<true>(rows, BLOCK, next - k, a + k, a_row, 1, part, b_step, c + j, c_row);
    }
  }
  if (first)
    for (long i = 0; i < rows; ++i) zero(c + i * c_row, columns);
}

}  // namespace hypermlp
