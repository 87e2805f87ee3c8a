// Vectors of the machine's own width, by the extensions that GCC and Clang share, and the sizes that follow from it.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
// a loop over a constant number of vectors or rows, which are to stay in registers
#define UNROLLED(i, count) UNROLL for (int i = 0; i < (count); ++i)

namespace hypermlp {

#ifdef HYPERMLP_DOUBLE
using real = double;
using integer = int64_t;
#else
using real = float;
using integer = int32_t;
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

constexpr int W = VECTOR_BYTES / sizeof(real);  // lanes of a vector
constexpr int BLOCK = 16;                       // columns of a block: everything is padded to whole ones
constexpr int VECTORS = BLOCK / W;              // vectors of a block

// rows of a block whose sums stay in registers, beside one row of the other factor and one broadcast element
constexpr int fit_rows() {
  int most = (REGISTERS - VECTORS - 1) / VECTORS;
  return most >= 12 ? 12 : most >= 6 ? 6 : most >= 2 ? 2 : 1;
}
constexpr int ROWS = fit_rows();

// elementwise work takes two vectors or more at once, since one alone leaves a core waiting for its own results
constexpr int GROUP_ROWS = VECTORS < 2 && ROWS % 2 == 0 ? 2 : 1;
constexpr int GROUP = GROUP_ROWS * VECTORS;

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

INLINE vec load(const real* p) { return *reinterpret_cast<const vec*>(p); }
INLINE void store(real* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
INLINE vec splat(real x) { return x - vec{}; }
INLINE vec select(ivec mask, vec a, vec b) { return mask ? a : b; }
INLINE vec relu(vec x) { return x < real(0) ? vec{} : x; }  // a NaN stays one
INLINE ivec lanes(integer first) {
  ivec x;
  UNROLLED(i, W) x[i] = first + i;
  return x;
}
INLINE real sum(vec x) {
  real total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
INLINE bool finite(real x) { return x - x == real(0); }

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }
INLINE void zero(real* p, long count) {
  if (count > 0) std::memset(p, 0, count * sizeof(real));
}

}  // namespace hypermlp
