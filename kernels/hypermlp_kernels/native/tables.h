// A mixing's tables in the order and padding of the columns: [length] and [length, rank], `length` whole blocks, the
// rank padded to whole blocks; by lag in reverse, lag 0 last. Beside them the same turned, [rank, pitch].
#pragma once
#include "call.h"
#include "workspace.h"

namespace hypermlp {

INLINE const real* head_of(const real* table, long head, long size) { return table ? table + head * size : nullptr; }
INLINE real* head_of(real* table, long head, long size) { return table ? table + head * size : nullptr; }

// y[c, r] = x[r, c]
inline void transpose(const real* x, long x_row, long rows, long columns, real* y, long y_row) {
  for (long begin = 0; begin < rows; begin += BLOCK)
    for (long c = 0; c < columns; ++c)
      for (long r = begin; r < min(rows, begin + BLOCK); ++r) y[c * y_row + r] = x[r * x_row + c];
}

// sizes that all mixings of a call share
struct TableSizes {
  long lags;    // table rows in use: the most that any sequence sees
  long length;  // in whole blocks
  long pitch;   // rows of the turned tables are no power of two apart
  bool by_lag;

  TableSizes(const Call& call) : lags(0), by_lag(call.by_lag) {
    for (long s = 0; s < call.num_sequences; ++s) lags = max(lags, call.sequences[s].stop - call.sequences[s].start);
    if (by_lag) lags = min(lags, call.window);
    length = round_up(lags, BLOCK);
    pitch = length + BLOCK;
  }
  long place(long lag) const { return by_lag ? length - 1 - lag : lag; }
};

struct Tables {
  real *scale, *down, *up;  // identity + diag
  real *down_turned, *up_turned;
  long rank, padded, length, pitch;

  // the forward multiplies by `down` and expands by `up`; the backward does it the other way round too
  Tables(Workspace& space, const TableSizes& sizes, long rank, bool backward)
      : rank(rank), padded(round_up(rank, BLOCK)), length(sizes.length), pitch(sizes.pitch) {
    scale = space.take(length);
    up_turned = space.take(padded * pitch);
    down = backward ? nullptr : space.take(length * padded);
    up = backward ? space.take(length * padded) : nullptr;
    down_turned = backward ? space.take(padded * pitch) : nullptr;
  }

  void fill(const TableSizes& sizes, const Mix& mix, long head, long all_lags) const {
    const real* diag = head_of(mix.diag, head, all_lags);
    zero(scale, length);
    for (long lag = 0; lag < sizes.lags; ++lag)
      scale[sizes.place(lag)] = (diag ? diag[lag] : real(0)) + real(mix.identity);
    if (!rank) return;
    const real *a = head_of(mix.down, head, all_lags * rank), *b = head_of(mix.up, head, all_lags * rank);
    if (down) arrange(sizes, a, down);
    if (up) arrange(sizes, b, up);
    if (down_turned) turn(sizes, a, down_turned);
    turn(sizes, b, up_turned);
  }

 private:
  void arrange(const TableSizes& sizes, const real* table, real* out) const {
    zero(out, length * padded);
    for (long lag = 0; lag < sizes.lags; ++lag)
      std::memcpy(out + sizes.place(lag) * padded, table + lag * rank, rank * sizeof(real));
  }
  void turn(const TableSizes& sizes, const real* table, real* out) const {
    zero(out, padded * pitch);
    for (long begin = 0; begin < sizes.lags; begin += BLOCK)
      for (long c = 0; c < rank; ++c)
        for (long lag = begin; lag < min(sizes.lags, begin + BLOCK); ++lag)
          out[c * pitch + sizes.place(lag)] = table[lag * rank + c];
  }
};

// sums of gradients of the last `length` rows of arranged tables
struct TableSums {
  real *scale, *down, *up;
  long rank, padded, length;

  TableSums(Workspace& space, long length, long rank, const MixGrads& wanted)
      : rank(rank), padded(round_up(rank, BLOCK)), length(length) {
    scale = wanted.diag ? space.take(length) : nullptr;
    down = wanted.down ? space.take(length * padded) : nullptr;
    up = wanted.up ? space.take(length * padded) : nullptr;
  }
  void start(long columns) {
    length = columns;
    if (scale) zero(scale, length);
    if (down) zero(down, length * padded);
    if (up) zero(up, length * padded);
  }
  // add to dense gradients of one head, [lags] and [lags, rank]
  void add_to(const TableSizes& sizes, real* d_diag, real* d_down, real* d_up) const {
    const long skipped = sizes.by_lag ? sizes.length - length : 0;
    for (long lag = 0; lag < sizes.lags; ++lag) {
      const long row = sizes.place(lag) - skipped;
      if (row < 0 || row >= length) continue;
      if (d_diag) d_diag[lag] += scale[row];
      for (long c = 0; c < rank; ++c) {
        if (d_down) d_down[lag * rank + c] += down[row * padded + c];
        if (d_up) d_up[lag * rank + c] += up[row * padded + c];
      }
    }
  }
};

}  // namespace hypermlp
