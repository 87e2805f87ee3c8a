// The operator's forward. Equations: docs/mathematics.md; 1 / rho is applied last.
#include "maps.h"
#include "norm.h"
#include "softplus.h"

namespace hypermlp {
namespace {

struct Space {  // of one worker
  real* map[Keys::MAPS];
  real *q, *z, *gate, *gated, *norms, *out;
  Keys keys;
  bool nonfinite = false;

  Space(Workspace& space, const Sizes& sizes, long tokens) : keys(space, sizes, tokens, false) {
    for (long m = 0; m < sizes.maps; ++m) map[m] = space.take(Layout::map_size(sizes.columns), Layout::MARGIN);
    q = space.take(TILE * sizes.qk);
    z = space.take(TILE * sizes.rank_padded);
    gate = space.take(TILE * sizes.rank_padded);
    gated = space.take(TILE * sizes.rank_padded);
    norms = space.take(TILE * BLOCK);
    out = space.take(TILE * sizes.v_padded);
  }
};

class Forward {
 public:
  Forward(const Call& call, const Sizes& sizes, const Tables* routing, const Tables* readout, const Keys& keys,
          Space& space)
      : call_(call), sizes_(sizes), routing_(routing), readout_(readout), keys_(keys), space_(space) {}

  void run(const Piece& piece, long head) {
    const Sequence& sequence = call_.sequences[piece.sequence];
    const Layout layout(call_, sequence);
    space_.nonfinite |= keys_.nonfinite;
    for (long first = piece.begin; first < piece.end; first += TILE)
      run_tile(Tile(layout, first, piece.end, Layout::pitch(sizes_.columns)), sequence, head);
  }

 private:
  void run_tile(const Tile& t, const Sequence& s, long head) {
    real rho[TILE], units[TILE];
    for (int m = 0; m < sizes_.maps; ++m) {
      const long index = m * call_.heads + head;
      space_.nonfinite |= !read_rows(call_, Type(call_.type), call_.q, s, t, index, sizes_.qk, sizes_.qk, space_.q);
      scores(t, keys_, m, space_.q, sizes_.qk, space_.map[m]);
      statistic(t, s, space_.map[m], call_.routing, routing_[index], sizes_.maps * call_.heads, index, call_.z1);
      if (m == 0) {
        mix_gate_map(t, s, routing_[index]);
        norms(t, rho, units);
        divide_rows(t, units, space_.map[0]);
      } else {
        mix_scale_map(t, s, routing_[index]);
      }
    }
    if (sizes_.maps == 1) rectify(t);
    statistic(t, s, space_.map[0], call_.readout, readout_[head], call_.heads, head, call_.z2);
    mix_readout(t, readout_[head]);
    read_out(t, s, head, rho, units);
  }

  // z of a map, kept for the backward, and gate * z
  void statistic(const Tile& t, const Sequence& s, const real* map, const Mix& mix, const Tables& tables, long heads,
                 long head, real* kept) {
    if (!tables.rank) return;
    gather(t, map, tables, tables.down, space_.z);
    copy_rows(t, space_.z, tables.padded, tables.rank, Rows(call_, kept, s, t, heads, head, tables.rank));
    if (mix.gate.data)
      space_.nonfinite |=
          !read_rows(call_, Type(call_.type), mix.gate, s, t, head, tables.rank, tables.padded, space_.gate);
    gated(t, space_.z, mix.gate.data ? space_.gate : nullptr, tables.padded, space_.gated);
  }

  // y = s * scale + gated up^T in place of the scores, and the sums of its squares
  void mix_gate_map(const Tile& t, const Sequence& s, const Tables& tables) {
    real *map = space_.map[0], *norms = space_.norms;
    const real* scale = tables.scale + t.beside(tables.length);
    const Visible visible(t, s.holes ? keys_.valid : nullptr);
    zero(norms, t.padded * BLOCK);
    expand(t, space_.gated, tables, tables.up_turned,
           [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
             UNROLLED(n, GROUP) {
               real *p = map + place(t, r, x, n), *square = norms + (r + row_of(n)) * BLOCK + n % VECTORS * W;
               const vec y = visible(load(p) * load(scale + x + n % VECTORS * W) + u[n], r, x, n);
               store(square, load(square) + y * y);
               store(p, y);
             }
           });
  }
  void norms(const Tile& t, real* rho, real* units) const {
    for (int r = 0; r < t.padded; ++r) {
      const real eps = call_.eps;
      rho[r] = units[r] = 1;
      if (!call_.norm || r >= t.rows) continue;
      const real norm = row_norm(space_.norms + r * BLOCK, space_.map[0] + r * t.pitch, t.width);
      rho[r] = norm < eps ? eps : norm;
      units[r] = row_unit(rho[r]);
    }
  }

  // relu(gate map) * softplus(scale map) in place of the gate map
  void mix_scale_map(const Tile& t, const Sequence& s, const Tables& tables) {
    const real *map = space_.map[1], *scale = tables.scale + t.beside(tables.length);
    real* a = space_.map[0];
    const Visible visible(t, s.holes ? keys_.valid : nullptr);
    expand(t, space_.gated, tables, tables.up_turned,
           [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
             vec y[GROUP], positive[GROUP], unused[GROUP];
             UNROLLED(n, GROUP) y[n] = load(map + place(t, r, x, n)) * load(scale + x + n % VECTORS * W) + u[n];
             softplus<false>(y, positive, unused);
             UNROLLED(n, GROUP) {
               real* p = a + place(t, r, x, n);
               store(p, visible(relu(load(p)) * positive[n], r, x, n));
             }
           });
  }
  void rectify(const Tile& t) const {
    real* row = space_.map[0];
    for (int r = 0; r < t.padded; ++r, row += t.pitch)
      for (long x = 0; x < t.width; x += W) store(row + x, relu(load(row + x)));
  }

  void mix_readout(const Tile& t, const Tables& tables) {
    real* map = space_.map[0];
    const real* scale = tables.scale + t.beside(tables.length);
    expand(t, space_.gated, tables, tables.up_turned,
           [&](long r, long x, vec(&u)[GROUP]) __attribute__((always_inline)) {
             UNROLLED(n, GROUP) {
               real* p = map + place(t, r, x, n);
               store(p, load(p) * load(scale + x + n % VECTORS * W) + u[n]);
             }
           });
    t.hide(map);
  }

  // o = w v / rho, in the row's unit
  void read_out(const Tile& t, const Sequence& s, long head, const real* rho, const real* units) {
    const long row = sizes_.v_padded;
    long_product(t.padded, row, t.key_begin - keys_.origin, t.key_end - keys_.origin, From::START,
                 t.keys(space_.map[0]) + keys_.origin, t.key_pitch, keys_.panels, BLOCK, keys_.tokens * BLOCK,
                 space_.out, row);
    const Rows o(call_, call_.o, s, t, call_.heads, head, sizes_.v),
        all_rho(call_, call_.rho, s, t, call_.heads, head, 1);
    for (int r = 0; r < t.rows; ++r) {
      const real norm = rho[r] / units[r];
      for (long c = 0; c < sizes_.v; ++c) o.data[r * o.distance + c] = space_.out[r * row + c] / norm;
      all_rho.data[r * all_rho.distance] = rho[r];
    }
  }

  const Call& call_;
  const Sizes& sizes_;
  const Tables *routing_, *readout_;
  const Keys& keys_;
  Space& space_;
};

// everything a forward needs, found in (or, without memory, counted as) one workspace
struct Plan {
  Sizes sizes;
  Pieces pieces;
  SharedKeys shared;
  Array<Tables> routing, readout;
  Array<Space> spaces;
  Workspace space;

  explicit Plan(const Call& call, void* memory)
      : sizes(call),
        pieces(call, groups(call)),
        shared(call, pieces),
        routing(call.maps * call.heads),
        readout(call.heads),
        spaces(workers(call)),
        space(memory) {
    for (long x = 0; x < call.maps * call.heads; ++x) routing.add(space, sizes.tables, sizes.rank1, false);
    for (long h = 0; h < call.heads; ++h) readout.add(space, sizes.tables, sizes.rank2, false);
    shared.take(space, sizes, false);
    for (long w = 0; w < workers(call); ++w) spaces.add(space, sizes, pieces.any_whole() ? sizes.tokens : 0);
  }

  static long groups(const Call& call) { return max(32 / call.heads, min(call.num_sequences, 64)); }
  static long workers(const Call& call) { return max(1, call.threads); }
};

}  // namespace
}  // namespace hypermlp

using namespace hypermlp;

extern "C" int64_t hypermlp_forward_bytes(const Call* call) { return Plan(*call, nullptr).space.used(); }

extern "C" void hypermlp_forward(Call* call) {
  Plan plan(*call, call->workspace);
  const long maps = call->maps * call->heads, tables = maps + call->heads;
  const long tasks[] = {tables + plan.shared.count(), plan.pieces.count() * call->heads};
  auto run = [&](int phase, long task, long worker) {
    if (phase == 1) {
      const Piece& piece = plan.pieces[task / call->heads];
      const long head = task % call->heads;
      Space& space = plan.spaces[worker];
      const Keys& keys = plan.shared.of(*call, plan.sizes, piece, head, space.keys);
      Forward(*call, plan.sizes, plan.routing.data(), plan.readout.data(), keys, space).run(piece, head);
    } else if (task < maps) {
      plan.routing[task].fill(plan.sizes.tables, call->routing, task, call->lags);
    } else if (task < tables) {
      plan.readout[task - maps].fill(plan.sizes.tables, call->readout, task - maps, call->lags);
    } else {
      plan.shared.fill(*call, plan.sizes, task - tables);
    }
  };
  Threads<2, decltype(run)>(tasks, run).start(min(call->threads, tasks[1]), call->team);
  for (long w = 0; w < plan.spaces.count(); ++w) call->nonfinite |= plan.spaces[w].nonfinite;
}
