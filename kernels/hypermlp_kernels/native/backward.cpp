// The operator's backward: its division into pieces, and the sums of their gradients.
#include "backward_tile.h"

namespace hypermlp {
namespace {

struct Plan {
  Sizes sizes;
  Pieces pieces;
  SharedKeys shared;
  Array<Tables> routing, readout;
  Array<GroupSums> groups;  // [groups, heads]
  Array<KeySums> key_sums;  // [pieces, heads]: of the pieces that are no whole sequence
  Array<BackwardSpace> spaces;
  Workspace space;

  Plan(const Call& call, void* memory)
      : sizes(call),
        pieces(call, wanted_groups(call)),
        shared(call, pieces),
        routing(call.maps * call.heads),
        readout(call.heads),
        groups(pieces.groups() * call.heads),
        key_sums(pieces.count() * call.heads),
        spaces(workers(call)),
        space(memory) {
    for (long x = 0; x < call.maps * call.heads; ++x) routing.add(space, sizes.tables, sizes.rank1, true);
    for (long h = 0; h < call.heads; ++h) readout.add(space, sizes.tables, sizes.rank2, true);
    for (long g = 0; g < pieces.groups(); ++g)
      for (long h = 0; h < call.heads; ++h) groups.add(space, call, sizes, columns_of(call, g));
    for (long p = 0; p < pieces.count(); ++p)
      for (long h = 0; h < call.heads; ++h)
        key_sums.add(space, call, sizes, pieces[p].whole ? 0 : tokens_of(call, pieces[p]));
    shared.take(space, sizes, true);
    for (long w = 0; w < workers(call); ++w) spaces.add(space, call, sizes, pieces.any_whole() ? sizes.tokens : 0);
  }

 private:
  // each has sums of its own, as large as the tables: few, where sequences are few and long
  static long wanted_groups(const Call& call) {
    return max((8 + call.heads - 1) / call.heads, min(call.num_sequences, 32));
  }
  static long workers(const Call& call) { return max(1, call.threads); }

  // columns that a group's pieces see
  long columns_of(const Call& call, long group) const {
    long most = 0;
    for (long p = 0; p < pieces.count(); ++p) {
      if (pieces[p].group != group) continue;
      const Layout layout(call, call.sequences[pieces[p].sequence]);
      most = max(most, layout.by_lag ? min(pieces[p].end, layout.columns) : layout.last_key(pieces[p].end));
    }
    return round_up(most, BLOCK);
  }
  static long tokens_of(const Call& call, const Piece& piece) {
    const Layout layout(call, call.sequences[piece.sequence]);
    return layout.last_key(piece.end) - layout.first_key(piece.begin);
  }
};

}  // namespace
}  // namespace hypermlp

using namespace hypermlp;

extern "C" int64_t hypermlp_backward_bytes(const Call* call) { return Plan(*call, nullptr).space.used(); }

// dk, dv and the tables' gradients must come as zeros
extern "C" void hypermlp_backward(Call* call) {
  Plan plan(*call, call->workspace);
  const Sizes& sizes = plan.sizes;
  const long maps = call->maps * call->heads, heads = call->heads;
  const long tables = maps + heads;
  const long tasks[] = {tables + plan.shared.count(), plan.pieces.groups() * heads, tables + heads};

  auto arrange = [&](long x) {
    if (x < maps)
      plan.routing[x].fill(sizes.tables, call->routing, x, call->lags);
    else if (x < tables)
      plan.readout[x - maps].fill(sizes.tables, call->readout, x - maps, call->lags);
    else
      plan.shared.fill(*call, sizes, x - tables);
  };
  auto run_group = [&](long task, long worker) {
    const long group = task / heads, head = task % heads;
    GroupSums& into = plan.groups[task];
    for (long m = 0; m <= call->maps; ++m) into.maps[m].clear();
    BackwardSpace& space = plan.spaces[worker];
    for (long p = 0; p < plan.pieces.count(); ++p) {
      const Piece& piece = plan.pieces[p];
      if (piece.group != group) continue;
      const Keys& keys = plan.shared.of(*call, sizes, piece, head, space.keys);
      const KeySums& sums = piece.whole ? space.sums : plan.key_sums[p * heads + head];
      Backward(*call, sizes, plan.routing.data(), plan.readout.data(), into, keys, space).run(piece, head, sums);
      if (piece.whole) add_keys(*call, sizes, piece, head, sums);
    }
  };
  // sums of the groups and pieces in their order
  auto add_up = [&](long x) {
    if (x >= tables) {
      const long head = x - tables;
      for (long p = 0; p < plan.pieces.count(); ++p)
        if (!plan.pieces[p].whole) add_keys(*call, sizes, plan.pieces[p], head, plan.key_sums[p * heads + head]);
      return;
    }
    const bool first = x < maps;
    const MixGrads& grads = first ? call->d_routing : call->d_readout;
    const long index = first ? x : x - maps, rank = first ? sizes.rank1 : sizes.rank2, lags = call->lags;
    for (long g = 0; g < plan.pieces.groups(); ++g)
      plan.groups[g * heads + index % heads].maps[first ? index / heads : call->maps].add_to(
          sizes.tables, head_of(grads.diag, index, lags), head_of(grads.down, index, lags * rank),
          head_of(grads.up, index, lags * rank));
  };
  auto run = [&](int phase, long task, long worker) {
    phase == 0 ? arrange(task) : phase == 1 ? run_group(task, worker) : add_up(task);
  };
  Threads<3, decltype(run)>(tasks, run).start(min(call->threads, tasks[1]));
  for (long w = 0; w < plan.spaces.count(); ++w) call->nonfinite |= plan.spaces[w].nonfinite;
}
