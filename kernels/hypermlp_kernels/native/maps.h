// One map of a tile: scores, the two halves of a sequence mixing, and who is visible in a block of it.
#pragma once
#include "keys.h"

namespace hypermlp {

// y = q k^T of the tile's rows [padded, qk], by key; read next by column
inline void scores(const Tile& t, const Keys& keys, int m, const real* q, long qk, real* map) {
  product<false>(t.padded, t.key_end - t.key_begin, qk, q, qk, 1, keys.turned[m] + t.key_begin - keys.origin,
                 keys.tokens, t.keys(map) + t.key_begin, t.key_pitch);
  t.hide_columns(map);
}

// z [padded, rank] = map table, for an arranged table [length, rank]
inline void gather(const Tile& t, const real* map, const Tables& tables, const real* table, real* z) {
  const long rank = tables.padded;
  long_product(t.padded, rank, t.low(), t.high(), t.by_lag ? From::END : From::START, map, t.pitch,
               table + t.beside(tables.length) * rank, rank, BLOCK, z, rank);
}

// z table^T for a turned table [rank, length]: take(row, column, u) gets GROUP vectors, in registers
template <class Take>
INLINE void expand(const Tile& t, const real* z, const Tables& tables, const real* turned, Take take) {
  turned += tables.rank ? t.beside(tables.length) : 0;
  for (long x = 0; x < t.width; x += BLOCK)
    for (int r = 0; r < t.padded; r += ROWS)
      micro<ROWS>(tables.rank, z + r * tables.padded, tables.padded, 1, turned + x, tables.pitch,
                  [&](vec(&acc)[ROWS][VECTORS]) __attribute__((always_inline)) {
                    UNROLL for (int m = 0; m < ROWS; m += GROUP_ROWS) {
                      vec u[GROUP];
                      UNROLLED(n, GROUP) u[n] = acc[m + n / VECTORS][n % VECTORS];
                      take(r + m, x, u);
                    }
                  });
}

// vector n of a group at row r, column x
INLINE long row_of(int n) { return n / VECTORS; }
INLINE long place(const Tile& t, long r, long x, int n) { return (r + row_of(n)) * t.pitch + x + n % VECTORS * W; }

// zeros in place of what a row does not see
struct Visible {
  const Tile& tile;
  long clear_begin, clear_end;  // columns that every row sees
  const real* valid;            // by column and row, where tokens are masked inside the sequence

  Visible(const Tile& t, const real* valid_tokens)
      : tile(t), clear_begin(t.begin(0)), clear_end(t.end(0)), valid(valid_tokens) {
    if (valid && t.by_lag) valid += t.first - (t.width - 1);
  }
  INLINE vec operator()(vec y, long r, long x, int n) const {
    const long row = r + row_of(n), column = x + n % VECTORS * W;
    if (x < clear_begin || x + BLOCK > clear_end) {
      const ivec at = lanes(column);
      y = select((at >= splat_integer(tile.begin(row))) & (at < splat_integer(tile.end(row))), y, vec{});
    }
    if (valid) y = select(load(valid + column + (tile.by_lag ? row : 0)) > real(0), y, vec{});
    return y;
  }

 private:
  static INLINE ivec splat_integer(long x) { return ivec{} + integer(x); }
};

// z * gate of `rows` rows [rows, padded rank], zero beyond; without a gate z itself
inline void gated(const Tile& t, const real* z, const real* gate, long padded, real* out) {
  for (long i = 0; i < t.padded * padded; ++i) out[i] = gate ? z[i] * gate[i] : z[i];
}

// divides rows by their units, which are 1 for nearly all
inline void divide_rows(const Tile& t, const real* units, real* map) {
  for (int r = 0; r < t.rows; ++r)
    for (long x = 0; x < t.width && units[r] != 1; ++x) map[r * t.pitch + x] /= units[r];
}

// the tile's rows of a stream [padded, row], zero beyond `width` and beyond the last row; whether they are finite
inline bool read_rows(const Call& call, Type type, const Stream& x, const Sequence& s, const Tile& t, long head,
                      long width, long row, real* out) {
  zero(out, t.padded * row);
  for (int r = 0; r < t.rows; ++r)
    read_row(type, x, s.batch, s.start + t.first + r - call.past, head, width, out + r * row);
  return all_finite(out, t.padded * row);
}

// where a tile's rows of a dense [B, length - past, heads, width] begin, and how far apart they are
struct Rows {
  real* data;
  long distance;
  Rows(const Call& call, real* all, const Sequence& s, const Tile& t, long heads, long head, long width)
      : data(all ? all + ((s.batch * (call.length - call.past) + s.start + t.first - call.past) * heads + head) * width
                 : nullptr),
        distance(heads * width) {}
};

inline void copy_rows(const Tile& t, const real* x, long row, long width, Rows to) {
  for (int r = 0; r < t.rows; ++r) std::memcpy(to.data + r * to.distance, x + r * row, width * sizeof(real));
}

}  // namespace hypermlp
