// Keys and values of a sequence's head in the orders that its products read, padded with zeros to whole blocks. Tokens
// count from `origin`, the first that is seen or up to CUT - 1 tokens before it, so that long sums are cut at the same
// tokens always.
#pragma once
#include "gemm.h"
#include "streams.h"
#include "tables.h"
#include "work.h"

namespace hypermlp {

// the sizes of a call that its spaces are made from
struct Sizes {
  long maps, qk, v, rank1, rank2;
  long qk_padded, v_padded, rank_padded;
  long columns, tokens;  // the widest map, and the longest sequence in whole blocks with room to read beyond it
  TableSizes tables;

  Sizes(const Call& call)
      : maps(call.maps),
        qk(call.qk),
        v(call.v),
        rank1(call.routing.rank),
        rank2(call.readout.rank),
        qk_padded(round_up(qk, BLOCK)),
        v_padded(round_up(v, BLOCK)),
        rank_padded(round_up(max(rank1, rank2), BLOCK)),
        columns(0),
        tokens(0),
        tables(call) {
    for (long s = 0; s < call.num_sequences; ++s) {
      const Layout layout(call, call.sequences[s]);
      columns = max(columns, layout.columns);
      tokens = max(tokens, layout.length);
    }
    tokens = round_up(tokens, BLOCK) + BLOCK;
  }
};

struct Keys {
  static constexpr int MAPS = 2;
  real* turned[MAPS];   // [qk, tokens]
  real* rows[MAPS];     // [tokens, qk_padded]
  real* panels;         // values: blocks of columns [v_padded / BLOCK, tokens, BLOCK]
  real* turned_values;  // values too: blocks of tokens [tokens / BLOCK, v, BLOCK]
  real* valid;          // 1 or 0 for each token, with room before the first
  real* scratch;        // [BLOCK, max(qk, v) padded]
  long tokens, origin;
  bool nonfinite;  // whether a key or a value that was read is

  Keys(Workspace& space, const Sizes& sizes, long tokens, bool backward) : tokens(tokens), origin(0), nonfinite(false) {
    for (long m = 0; m < sizes.maps; ++m) {
      turned[m] = space.take(sizes.qk * tokens);
      rows[m] = backward ? space.take(tokens * sizes.qk_padded) : nullptr;
    }
    panels = backward ? nullptr : space.take(sizes.v_padded * tokens);
    turned_values = backward ? space.take(tokens * sizes.v) : nullptr;
    valid = space.take(tokens + BLOCK, 2 * BLOCK + TILE);
    scratch = space.take(BLOCK * max(sizes.qk_padded, sizes.v_padded));
  }

  // for one head of a sequence
  void fill(const Call& call, const Sizes& sizes, const Sequence& s, long head) {
    const Layout layout(call, s);
    // the first row's first key: earlier ones, if any, are beyond every window
    origin = layout.first_key(max(0, call.past - s.start)) / CUT * CUT;
    const long end = layout.length;
    nonfinite = false;
    // one block beyond the end too: products read whole blocks
    for (long begin = origin; begin < end + BLOCK && begin - origin < tokens; begin += BLOCK) {
      const long count = max(0, min(BLOCK, end - begin));
      for (long m = 0; m < sizes.maps; ++m) fill_keys(call, sizes, s, m, m * call.heads + head, begin, count);
      fill_values(call, sizes, s, head, begin, count);
    }
    if (s.holes) {
      zero(valid - 2 * BLOCK - TILE, tokens + 3 * BLOCK + TILE);
      const uint8_t* mask = call.mask + s.batch * call.length + s.start;
      for (long j = 0; j < layout.length; ++j) valid[j] = mask[j] ? 1 : 0;
    }
  }

 private:
  void read(const Call& call, const Stream& x, const Sequence& s, long head, long begin, long count, long width,
            long row) {
    if (count < BLOCK || width < row) zero(scratch, BLOCK * row);
    for (long j = 0; j < count; ++j)
      read_row(Type(call.type), x, s.batch, s.start + begin + j, head, width, scratch + j * row);
    nonfinite |= !all_finite(scratch, BLOCK * row);
  }
  void fill_keys(const Call& call, const Sizes& sizes, const Sequence& s, long m, long head, long begin, long count) {
    const long row = sizes.qk_padded, at = begin - origin;
    read(call, call.k, s, head, begin, count, sizes.qk, row);
    transpose(scratch, row, BLOCK, sizes.qk, turned[m] + at, tokens);
    if (rows[m]) std::memcpy(rows[m] + at * row, scratch, BLOCK * row * sizeof(real));
  }
  void fill_values(const Call& call, const Sizes& sizes, const Sequence& s, long head, long begin, long count) {
    const long row = sizes.v_padded, at = begin - origin;
    read(call, call.values, s, head, begin, count, sizes.v, row);
    if (turned_values) transpose(scratch, row, BLOCK, sizes.v, turned_values + at * sizes.v, BLOCK);
    if (!panels) return;
    for (long c = 0; c < row; c += BLOCK)
      for (long j = 0; j < BLOCK; ++j)
        UNROLLED(n, VECTORS) store(panels + c * tokens + (at + j) * BLOCK + n * W, load(scratch + j * row + c + n * W));
  }
};

// Those of the sequences that are cut into pieces, which share them. A whole sequence's are made by who needs them.
class SharedKeys {
 public:
  SharedKeys(const Call& call, const Pieces& pieces)
      : heads_(call.heads), cut_(pieces.count()), keys_(pieces.count() * heads_) {
    for (long p = 0; p < pieces.count(); ++p)
      if (!pieces[p].whole && (p == 0 || pieces[p].sequence != pieces[p - 1].sequence)) cut_.add(pieces[p].sequence);
  }
  void take(Workspace& space, const Sizes& sizes, bool backward) {
    for (long i = 0; i < count(); ++i) keys_.add(space, sizes, sizes.tokens, backward);
  }
  long count() const { return cut_.count() * heads_; }
  void fill(const Call& call, const Sizes& sizes, long i) {
    keys_[i].fill(call, sizes, call.sequences[cut_[i / heads_]], i % heads_);
  }
  // a piece's, in `own` if it is a whole sequence
  const Keys& of(const Call& call, const Sizes& sizes, const Piece& piece, long head, Keys& own) {
    for (long i = 0; i < cut_.count(); ++i)
      if (cut_[i] == piece.sequence) return keys_[i * heads_ + head];
    own.fill(call, sizes, call.sequences[piece.sequence], head);
    return own;
  }

 private:
  long heads_;
  Array<long> cut_;
  Array<Keys> keys_;
};

}  // namespace hypermlp
