// Position and lag, as in `hypermlp/ops/lag_layout.py`: a map's rows are `pitch` apart. Read with rows `pitch - 1`
// apart it stands by key instead of by lag, without a copy. By position both readings are the same.
//
// A tile's columns run from its largest lag to lag 0, which is the last column of the last whole block, so that a row's
// sums do not depend on the tile that it is in.
#pragma once
#include "call.h"

namespace hypermlp {

constexpr int TILE = 24;  // rows, a multiple of every ROWS; the maps of a backward tile are then 1.4 MB at 2048 columns

// how the columns of maps over a sequence of `length` tokens stand for keys
struct Layout {
  long length, columns;
  bool by_lag, causal;

  Layout(const Call& call, const Sequence& s)
      : length(s.stop - s.start),
        columns(call.by_lag ? min(length, call.window) : length),
        by_lag(call.by_lag),
        causal(call.causal) {}

  // a map's row has room for what the reading by key writes and reads beside its columns, and for whole blocks
  static long pitch(long columns) { return round_up(columns, BLOCK) + round_up(TILE + 2 * BLOCK, BLOCK) + BLOCK; }
  static long map_size(long columns) { return TILE * pitch(columns); }
  static constexpr long MARGIN = 2 * BLOCK;  // what a block of keys may write before the first row

  // keys that rows begin:end see together
  long first_key(long begin) const { return by_lag ? max(0, begin - columns + 1) : 0; }
  long last_key(long end) const { return causal ? end : length; }
};

// query rows first:first + rows of a sequence; everything counts from the sequence's first token
struct Tile {
  long first;
  int rows, padded;  // padded: whole groups of ROWS, the rows too many are zero
  long columns, width, pitch, key_pitch, key_begin, key_end;
  bool by_lag, causal;

  Tile(const Layout& layout, long first, long end, long pitch)
      : first(first),
        rows(min(TILE, end - first)),
        padded(round_up(rows, ROWS)),
        columns(layout.columns),
        width(round_up(layout.by_lag ? min(first + rows, layout.columns) : layout.last_key(first + rows), BLOCK)),
        pitch(pitch),
        key_pitch(layout.by_lag ? pitch - 1 : pitch),
        key_begin(layout.first_key(first)),
        key_end(layout.last_key(first + rows)),
        by_lag(layout.by_lag),
        causal(layout.causal) {}

  // row r's visible columns
  long begin(int r) const { return by_lag ? width - min(first + r + 1, columns) : 0; }
  long end(int r) const { return by_lag ? width : causal ? min(first + r + 1, key_end) : key_end; }
  // columns that any row sees
  long low() const { return begin(rows - 1); }
  long high() const { return end(rows - 1); }

  // element of row r and key j: keys(map)[r * key_pitch + j]
  real* keys(real* map) const { return map + (by_lag ? width - 1 - first : 0); }
  // row of an arranged table (`length` rows) beside column 0
  long beside(long length) const { return by_lag ? length - width : 0; }

  // zero where a row sees nothing, as columns are read
  void hide_columns(real* map) const {
    for (int r = 0; r < padded; ++r, map += pitch) {
      zero(map, begin(r));
      zero(map + end(r), width - end(r));
    }
  }
  // and as keys are read: row r reaches r elements before its columns, and the other way
  void hide(real* map) const {
    hide_columns(map);
    if (!by_lag) return;
    for (int r = 0; r < padded; ++r, map += pitch) {
      zero(map + width, padded);
      zero(map + pitch - padded, padded);
    }
  }
};

}  // namespace hypermlp
