// What a worker's backward computes in, and where it adds up: the gradients of keys and values of a piece, and the
// tables' of a group of pieces.
#pragma once
#include "keys.h"

namespace hypermlp {

// gradients of keys and values of a piece, from its first key on
struct KeySums {
  real *keys[Keys::MAPS], *values;

  KeySums(Workspace& space, const Call& call, const Sizes& sizes, long tokens) {
    for (long m = 0; m < sizes.maps; ++m) keys[m] = call.dk ? space.take(tokens * sizes.qk_padded) : nullptr;
    values = call.dv ? space.take(tokens * sizes.v_padded) : nullptr;
  }
  void clear(const Sizes& sizes, long tokens) const {
    for (long m = 0; m < sizes.maps; ++m)
      if (keys[m]) zero(keys[m], tokens * sizes.qk_padded);
    if (values) zero(values, tokens * sizes.v_padded);
  }
};

// the tables' of one group and head
struct GroupSums {
  Array<TableSums> maps;  // of its score maps, then of the readout

  GroupSums(Workspace& space, const Call& call, const Sizes& sizes) : maps(call.maps + 1) {
    for (long m = 0; m < call.maps; ++m) maps.add(space, sizes.tables.length, sizes.rank1, call.d_routing);
    maps.add(space, sizes.tables.length, sizes.rank2, call.d_readout);
  }
  // of pieces that see so many columns
  void start(long columns) {
    for (long m = 0; m < maps.count(); ++m) maps[m].start(columns);
  }
  void add_to(const Call& call, const Sizes& sizes, long head) {
    for (long m = 0; m <= call.maps; ++m) {
      const bool first = m < call.maps;
      const MixGrads& grads = first ? call.d_routing : call.d_readout;
      const long index = first ? m * call.heads + head : head, rank = first ? sizes.rank1 : sizes.rank2;
      const long lags = call.lags;
      maps[m].add_to(sizes.tables, head_of(grads.diag, index, lags), head_of(grads.down, index, lags * rank),
                     head_of(grads.up, index, lags * rank));
    }
  }
};

// one piece's to dense gradients
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

constexpr long KEYS_AT_ONCE = 48;  // of a map whose columns are copied side by side: its rows lie pages apart

struct BackwardSpace {  // of one worker
  real *score[Keys::MAPS], *gate_map, *softplus, *slope, *a, *weights;
  real *q, *z, *gate, *gated, *e, *grad_o, *finite_grad_o, *o, *turned, *out;
  Keys keys;
  KeySums key_sums;
  GroupSums tables;
  bool nonfinite = false;

  // tokens: of a whole sequence; seen: by a piece
  BackwardSpace(Workspace& space, const Call& call, const Sizes& sizes, long tokens, long seen)
      : keys(space, sizes, tokens, true), key_sums(space, call, sizes, seen), tables(space, call, sizes) {
    auto map = [&] { return space.take(Layout::map_size(sizes.columns), Layout::MARGIN); };
    for (long m = 0; m < sizes.maps; ++m) score[m] = map();
    gate_map = map(), a = map(), weights = map();
    softplus = sizes.maps == 2 ? map() : nullptr;
    slope = sizes.maps == 2 ? map() : nullptr;
    q = space.take(TILE * sizes.qk_padded);
    z = space.take(TILE * sizes.rank_padded);
    gate = space.take(TILE * sizes.rank_padded);
    gated = space.take(TILE * sizes.rank_padded);
    e = space.take(TILE * sizes.rank_padded);
    grad_o = space.take(TILE * sizes.v_padded);
    finite_grad_o = space.take(TILE * sizes.v_padded);
    o = space.take(TILE * sizes.v_padded);
    turned = space.take(TILE * KEYS_AT_ONCE);
    out = space.take(TILE * sizes.qk_padded);
  }
};

}  // namespace hypermlp
