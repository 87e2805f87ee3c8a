// Where a backward adds up: the gradients of keys and values of a piece, and the tables' of a group of pieces.
#pragma once
#include "keys.h"

namespace hypermlp {

// gradients of keys and values of a piece, from its first key on
struct KeySums {
  real *keys[Keys::MAPS], *values;
  long tokens;

  KeySums(Workspace& space, const Call& call, const Sizes& sizes, long tokens) : tokens(tokens) {
    for (long m = 0; m < sizes.maps; ++m) keys[m] = call.dk ? space.take(tokens * sizes.qk_padded) : nullptr;
    values = call.dv ? space.take(tokens * sizes.v_padded) : nullptr;
  }
  void clear(const Sizes& sizes) const {
    for (long m = 0; m < sizes.maps; ++m)
      if (keys[m]) zero(keys[m], tokens * sizes.qk_padded);
    if (values) zero(values, tokens * sizes.v_padded);
  }
};

// tables' sums of one group and head
struct GroupSums {
  Array<TableSums> maps;  // of its score maps, then of the readout
  GroupSums(Workspace& space, const Call& call, const Sizes& sizes, long length) : maps(call.maps + 1) {
    for (long m = 0; m < call.maps; ++m) maps.add(space, length, sizes.rank1, call.d_routing);
    maps.add(space, length, sizes.rank2, call.d_readout);
  }
};

// sums of one piece into dense gradients
inline void add_keys(const Call& call, const Sizes& sizes, const Piece& piece, long head, const KeySums& sums) {
  const Sequence& s = call.sequences[piece.sequence];
  const Layout layout(call, s);
  const long first = layout.first_key(piece.begin);
  for (long j = first; j < layout.last_key(piece.end); ++j) {
    const long token = s.batch * call.length + s.start + j;
    auto add = [&](real* to, const real* from, long width) {
      for (long c = 0; c < width; ++c) to[c] += from[c];
    };
    for (long m = 0; m < sizes.maps && call.dk; ++m)
      add(call.dk + (token * sizes.maps * call.heads + m * call.heads + head) * sizes.qk,
          sums.keys[m] + (j - first) * sizes.qk_padded, sizes.qk);
    if (call.dv)
      add(call.dv + (token * call.heads + head) * sizes.v, sums.values + (j - first) * sizes.v_padded, sizes.v);
  }
}

}  // namespace hypermlp
