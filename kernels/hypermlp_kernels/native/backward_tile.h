// The gradients of one piece, tile by tile: each tile's maps are made again from the saved statistics.
// docs/mathematics.md derives the equations. A gradient that was not asked for is not computed.
#pragma once
#include "backward_space.h"
#include "maps.h"
#include "norm.h"
#include "softplus.h"

namespace hypermlp {

inline bool any(const MixGrads& grads) { return grads.diag || grads.down || grads.up || grads.gate; }

struct Needs {
  bool keys, scores, readout;
  Needs(const Call& call)
      : keys(call.dk), scores(call.dq || call.dk || any(call.d_routing)), readout(scores || any(call.d_readout)) {}
};

// of a tile's rows: rho in the row's unit, and for its gradient the row sum of (grad_o / rho) o
struct Norms {
  real rho[TILE], unit[TILE], pull[TILE];
};

class Backward {
 public:
  Backward(const Call& call, const Sizes& sizes, const Tables* routing, const Tables* readout, const Keys& keys,
           BackwardSpace& space)
      : call_(call), sizes_(sizes), needs_(call), routing_(routing), readout_(readout), keys_(keys), s_(space) {}

  void run(const Piece& piece, long head) {
    const Sequence& sequence = call_.sequences[piece.sequence];
    const Layout layout(call_, sequence);
    first_key_ = layout.first_key(piece.begin);
    s_.nonfinite |= keys_.nonfinite;
    s_.key_sums.clear(sizes_, layout.last_key(piece.end) - first_key_);
    for (long first = piece.begin; first < piece.end; first += TILE)
      run_tile(Tile(layout, first, piece.end, Layout::pitch(sizes_.columns)), sequence, head);
  }

 private:
  void run_tile(const Tile& t, const Sequence& s, long head) {
    const KeySums& sums = s_.key_sums;
    Norms norms;
    read_grad_o(t, s, head, norms);
    for (int m = 0; m < sizes_.maps; ++m) {
      const long index = m * call_.heads + head;
      read_queries(t, s, index);
      scores(t, keys_, m, s_.q, sizes_.qk, s_.score[m]);
      restore(t, s, call_.routing, routing_[index], sizes_.maps * call_.heads, index, call_.z1);
      m == 0 ? mix_gate_map(t, s, routing_[index], norms) : mix_scale_map(t, s, routing_[index]);
    }
    restore(t, s, call_.readout, readout_[head], call_.heads, head, call_.z2);
    if (sums.values) values_gradient(t, readout_[head], sums.values);
    if (!needs_.readout) return;
    weights_gradient(t);
    mix_backward(t, s, call_.readout, readout_[head], s_.tables.maps[sizes_.maps], call_.heads, head, s_.a, s_.weights,
                 call_.d_readout.gate);
    if (!needs_.scores) return;
    selection_backward(t, readout_[head], norms);
    for (int m = 0; m < sizes_.maps; ++m) {
      const long index = m * call_.heads + head;
      const Tables& tables = routing_[index];
      real* y = m == 0 ? s_.weights : s_.slope;
      restore(t, s, call_.routing, tables, sizes_.maps * call_.heads, index, call_.z1);
      mix_backward(t, s, call_.routing, tables, s_.tables.maps[m], sizes_.maps * call_.heads, index, s_.score[m], y,
                   call_.d_routing.gate);
      if (!call_.dq && !call_.dk) continue;
      scores_gradient(t, tables, y);
      queries_keys_gradient(t, s, index, m, y, sums.keys[m]);
    }
  }

  void read_queries(const Tile& t, const Sequence& s, long index) const {
    s_.nonfinite |= !read_rows(call_, Type(call_.type), call_.q, s, t, index, sizes_.qk, sizes_.qk, s_.q);
  }

  // grad_o / rho, and the norms
  void read_grad_o(const Tile& t, const Sequence& s, long head, Norms& norms) const {
    const long row = sizes_.v_padded, count = sizes_.v, o_rows = call_.length - call_.past;
    read_rows(call_, REAL, call_.grad_o, s, t, head, count, row, s_.grad_o);
    read_rows(call_, REAL, {call_.o, o_rows * call_.heads * count, call_.heads * count, count}, s, t, head, count, row,
              s_.o);
    const Rows all_rho(call_, call_.rho, s, t, call_.heads, head, 1);
    for (int r = 0; r < t.padded; ++r) {
      norms.pull[r] = 0, norms.rho[r] = norms.unit[r] = 1;
      if (r >= t.rows) continue;
      const real whole = all_rho.data[r * all_rho.distance], unit = row_unit(whole), rho = whole / unit;
      norms.rho[r] = rho, norms.unit[r] = unit;
      real *grad = s_.grad_o + r * row, *o = s_.o + r * row;
      vec total[VECTORS] = {};
      for (long c = 0; c < row; c += BLOCK)
        UNROLLED(n, VECTORS) {
          const vec scaled = load(grad + c + n * W) / rho;
          store(grad + c + n * W, scaled);
          total[n] += scaled * load(o + c + n * W);
        }
      for (int n = 0; n < VECTORS && call_.norm && whole > real(call_.eps); ++n) norms.pull[r] += sum(total[n]);
    }
    std::memcpy(s_.finite_grad_o, s_.grad_o, t.padded * row * sizeof(real));
    make_finite(s_.finite_grad_o, t.padded * row);
  }

  // the saved statistic, its gate, and both multiplied
  void restore(const Tile& t, const Sequence& s, const Mix& mix, const Tables& tables, long heads, long index,
               real* kept) const {
    if (!tables.rank) return;
    const Rows from(call_, kept, s, t, heads, index, tables.rank);
    zero(s_.z, t.padded * tables.padded);
    for (int r = 0; r < t.rows; ++r)
      std::memcpy(s_.z + r * tables.padded, from.data + r * from.distance, tables.rank * sizeof(real));
    if (mix.gate.data)
      s_.nonfinite |= !read_rows(call_, Type(call_.type), mix.gate, s, t, index, tables.rank, tables.padded, s_.gate);
    gated(t, s_.z, mix.gate.data ? s_.gate : nullptr, tables.padded, s_.gated);
  }

  // g in the row's unit, and for one map a = relu(g)
  void mix_gate_map(const Tile& t, const Sequence& s, const Tables& tables, const Norms& norms) const {
    const real *map = s_.score[0], *scale = tables.scale + t.beside(tables.length);
    real *gate = s_.gate_map, *a = sizes_.maps == 1 ? s_.a : nullptr;
    const Visible visible(t, s.holes ? keys_.valid : nullptr);
    expand(t, s_.gated, tables, tables.up_turned, [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
      UNROLLED(n, GROUP) {
        const long at = place(t, r, x, n);
        const vec y = visible(load(map + at) * load(scale + x + n % VECTORS * W) + u[n], r, x, n);
        store(gate + at, y);
        if (a) store(a + at, relu(y));
      }
    });
    divide_rows(t, norms.unit, gate);
    if (a) divide_rows(t, norms.unit, a);
  }

  // softplus(u), the slope sigmoid(u) relu(g), and a = softplus(u) relu(g)
  void mix_scale_map(const Tile& t, const Sequence& s, const Tables& tables) const {
    const real *map = s_.score[1], *gate = s_.gate_map, *scale = tables.scale + t.beside(tables.length);
    real *softplus_map = s_.softplus, *slope = s_.slope, *a = s_.a;
    const Visible visible(t, s.holes ? keys_.valid : nullptr);
    expand(t, s_.gated, tables, tables.up_turned, [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
      vec y[GROUP], positive[GROUP], sigmoid[GROUP];
      UNROLLED(n, GROUP) y[n] = load(map + place(t, r, x, n)) * load(scale + x + n % VECTORS * W) + u[n];
      softplus<true>(y, positive, sigmoid);
      UNROLLED(n, GROUP) {
        const long at = place(t, r, x, n);
        const vec open = relu(load(gate + at));
        store(softplus_map + at, visible(positive[n], r, x, n));
        store(slope + at, visible(sigmoid[n] * open, r, x, n));
        store(a + at, visible(positive[n] * open, r, x, n));
      }
    });
  }

  // dv += w^T (grad_o / rho)
  void values_gradient(const Tile& t, const Tables& tables, real* sums) const {
    const real *a = s_.a, *scale = tables.scale + t.beside(tables.length);
    real* w = s_.weights;
    expand(t, s_.gated, tables, tables.up_turned, [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
      UNROLLED(n, GROUP) {
        const long at = place(t, r, x, n);
        store(w + at, load(a + at) * load(scale + x + n % VECTORS * W) + u[n]);
      }
    });
    t.hide(w);
    const long row = sizes_.v_padded;
    for (long j = t.key_begin; j < t.key_end; j += KEYS_AT_ONCE) {
      const long count = min(KEYS_AT_ONCE, t.key_end - j);
      for (int r = 0; r < t.rows; ++r)
        std::memcpy(s_.turned + r * KEYS_AT_ONCE, t.keys(w) + r * t.key_pitch + j, count * sizeof(real));
      product<true>(count, row, t.rows, s_.turned, 1, KEYS_AT_ONCE, s_.finite_grad_o, row,
                    sums + (j - first_key_) * row, row);
    }
    mark(t, sums);
  }
  // a gradient that is not finite was taken for zero: what it would have reached is not a number
  void mark(const Tile& t, real* sums) const {
    const long row = sizes_.v_padded;
    for (long i = 0; i < t.rows * row; ++i) {
      if (finite(s_.grad_o[i])) continue;
      const long r = i / row, shift = t.by_lag ? t.first + r - (t.width - 1) : 0;
      for (long x = t.begin(r); x < t.end(r); ++x) sums[(x + shift - first_key_) * row + i % row] = NAN;
    }
  }

  // dw = (grad_o / rho) v^T
  void weights_gradient(const Tile& t) const {
    const long skipped = (t.key_begin - keys_.origin) / BLOCK * BLOCK, row = sizes_.v_padded;
    for (long j = skipped + keys_.origin; j < t.key_end; j += BLOCK)
      product<false>(t.padded, BLOCK, sizes_.v, s_.grad_o, row, 1, keys_.turned_values + (j - keys_.origin) * sizes_.v,
                     BLOCK, t.keys(s_.weights) + j, t.key_pitch);
    t.hide_columns(s_.weights);
  }

  // With y = x * scale + (gate * z) up^T and z = x down: gradients of gate and tables from x and dy. Leaves gate * dz
  // in `gated`, from which the gradient of x is dy * scale + gated down^T.
  void mix_backward(const Tile& t, const Sequence& s, const Mix& mix, const Tables& tables, const TableSums& into,
                    long heads, long index, const real* x, const real* dy, real* d_gate) const {
    const long skipped = t.by_lag ? into.length - t.width : 0;
    if (into.scale) add_scale(t, x, dy, into.scale + skipped);
    if (!tables.rank) return;
    gather(t, dy, tables, tables.up, s_.e);
    if (into.up) add_table(t, dy, s_.gated, tables.padded, into.up + skipped * tables.padded);
    if (d_gate) {
      const Rows to(call_, d_gate, s, t, heads, index, tables.rank);
      for (int r = 0; r < t.rows; ++r)
        for (long c = 0; c < tables.rank; ++c)
          to.data[r * to.distance + c] = s_.z[r * tables.padded + c] * s_.e[r * tables.padded + c];
    }
    gated(t, s_.e, mix.gate.data ? s_.gate : nullptr, tables.padded, s_.gated);
    if (into.down) add_table(t, x, s_.gated, tables.padded, into.down + skipped * tables.padded);
  }
  // table [columns, padded] += x^T z
  static void add_table(const Tile& t, const real* x, const real* z, long padded, real* table) {
    const long low = t.low();
    product<true>(t.high() - low, padded, t.rows, x + low, 1, t.pitch, z, padded, table + low * padded, padded);
  }
  static void add_scale(const Tile& t, const real* x, const real* y, real* scale) {
    for (long c = 0; c < t.width; c += BLOCK) {
      vec acc[VECTORS];
      UNROLLED(n, VECTORS) acc[n] = load(scale + c + n * W);
      for (int r = 0; r < t.rows; ++r)
        UNROLLED(n, VECTORS) acc[n] += load(x + r * t.pitch + c + n * W) * load(y + r * t.pitch + c + n * W);
      UNROLLED(n, VECTORS) store(scale + c + n * W, acc[n]);
    }
  }

  // From dw: da = dw * scale + gated down^T; du = da sigmoid(u) relu(g) in place of the slope, and in place of dw
  // dg = da softplus(u) where g > 0, less rho's pull, g / rho times the row sum; g and rho are in the row's unit.
  void selection_backward(const Tile& t, const Tables& tables, const Norms& norms) const {
    const real *gate = s_.gate_map, *softplus_map = s_.softplus, *scale = tables.scale + t.beside(tables.length);
    real *dw = s_.weights, *slope = s_.slope;
    real inverse[TILE];
    for (int r = 0; r < t.padded; ++r) inverse[r] = 1 / norms.rho[r];
    expand(t, s_.gated, tables, tables.down_turned, [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
      UNROLLED(n, GROUP) {
        const long at = place(t, r, x, n);
        const vec da = load(dw + at) * load(scale + x + n % VECTORS * W) + u[n], g = load(gate + at);
        vec dg = da;
        if (slope) {
          // a gate of zero hides da, whatever it holds where nothing is visible
          store(slope + at, select(g == real(0), vec{}, da * load(slope + at)));
          dg = da * load(softplus_map + at);
        }
        // as PyTorch's own: a gate that is not a number passes it on
        dg = select(g <= real(0), vec{}, dg);
        store(dw + at, dg - g * inverse[r + row_of(n)] * norms.pull[r + row_of(n)]);
      }
    });
    divide_rows(t, norms.unit, dw);
  }

  // ds = dy * scale + gated down^T, in place
  void scores_gradient(const Tile& t, const Tables& tables, real* y) const {
    const real* scale = tables.scale + t.beside(tables.length);
    expand(t, s_.gated, tables, tables.down_turned, [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
      UNROLLED(n, GROUP) {
        real* p = y + place(t, r, x, n);
        store(p, load(p) * load(scale + x + n % VECTORS * W) + u[n]);
      }
    });
    t.hide(y);
  }

  // dq = ds k, dk += ds^T q
  void queries_keys_gradient(const Tile& t, const Sequence& s, long index, int m, real* ds, real* sums) const {
    const long row = sizes_.qk_padded;
    if (call_.dq) {
      long_product(t.padded, row, t.key_begin - keys_.origin, t.key_end - keys_.origin, From::START,
                   t.keys(ds) + keys_.origin, t.key_pitch, keys_.rows[m], row, BLOCK, s_.out, row);
      copy_rows(t, s_.out, row, sizes_.qk, Rows(call_, call_.dq, s, t, sizes_.maps * call_.heads, index, sizes_.qk));
    }
    if (!sums) return;
    read_rows(call_, Type(call_.type), call_.q, s, t, index, sizes_.qk, row, s_.q);
    product<true>(t.key_end - t.key_begin, row, t.rows, t.keys(ds) + t.key_begin, 1, t.key_pitch, s_.q, row,
                  sums + (t.key_begin - first_key_) * row, row);
  }

  const Call& call_;
  const Sizes& sizes_;
  const Needs needs_;
  const Tables *routing_, *readout_;
  const Keys& keys_;
  BackwardSpace& s_;
  long first_key_ = 0;
};

}  // namespace hypermlp
