// The operator's backward: its division into pieces, and the order in which their sums are added.
#include "backward_tile.h"

namespace hypermlp {
namespace {

// What has been added to the gradients. Whoever waits waits for work that has begun, so that the wait ends.
class Added {
 public:
  explicit Added(long count) : flags_(count) {
    for (long i = 0; i < count; ++i) flags_.add(0);
  }
  void wait_for(long i) {
    wait_until([&] { return flags_[i].load(std::memory_order_acquire) != 0; });
  }
  void note(long i) { flags_[i].store(1, std::memory_order_release); }

 private:
  Array<std::atomic<char>> flags_;
};

struct Plan {
  Sizes sizes;
  Pieces pieces;
  SharedKeys shared;
  Array<Tables> routing, readout;
  Array<BackwardSpace> spaces;
  Workspace space;

  Plan(const Call& call, void* memory)
      : sizes(call),
        pieces(call, wanted_groups(call)),
        shared(call, pieces),
        routing(call.maps * call.heads),
        readout(call.heads),
        spaces(workers(call)),
        space(memory) {
    for (long x = 0; x < call.maps * call.heads; ++x) routing.add(space, sizes.tables, sizes.rank1, true);
    for (long h = 0; h < call.heads; ++h) readout.add(space, sizes.tables, sizes.rank2, true);
    shared.take(space, sizes, true);
    for (long w = 0; w < workers(call); ++w)
      spaces.add(space, call, sizes, pieces.any_whole() ? sizes.tokens : 0, seen_tokens(call));
  }

  long workers(const Call& call) const { return max(1, min(call.threads, pieces.groups() * call.heads)); }

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

 private:
  // each adds sums as large as the tables to the gradients: few, where sequences are few and long
  static long wanted_groups(const Call& call) {
    return max((8 + call.heads - 1) / call.heads, min(call.num_sequences, 32));
  }
  // keys that a piece sees, at most
  long seen_tokens(const Call& call) const {
    long most = 0;
    for (long p = 0; p < pieces.count(); ++p) {
      const Layout layout(call, call.sequences[pieces[p].sequence]);
      most = max(most, layout.last_key(pieces[p].end) - layout.first_key(pieces[p].begin));
    }
    return most;
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
  const Pieces& pieces = plan.pieces;
  const long maps = call->maps * call->heads, heads = call->heads;
  const long tables = maps + heads;
  const long tasks[] = {tables + plan.shared.count(), pieces.groups() * heads};
  Added keys_added(pieces.count() * heads), tables_added(tasks[1]);

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
    BackwardSpace& space = plan.spaces[worker];
    space.tables.start(plan.columns_of(*call, group));
    // the last piece first: the next group's first may wait for it
    for (long p = pieces.count() - 1; p >= 0; --p) {
      const Piece& piece = pieces[p];
      if (piece.group != group) continue;
      const Keys& keys = plan.shared.of(*call, sizes, piece, head, space.keys);
      Backward(*call, sizes, plan.routing.data(), plan.readout.data(), keys, space).run(piece, head);
      if (p > 0 && pieces[p - 1].sequence == piece.sequence) keys_added.wait_for((p - 1) * heads + head);
      add_keys(*call, sizes, piece, head, space.key_sums);
      keys_added.note(p * heads + head);
    }
    if (group > 0) tables_added.wait_for(task - heads);
    space.tables.add_to(*call, sizes, head);
    tables_added.note(task);
  };
  auto run = [&](int phase, long task, long worker) { phase == 0 ? arrange(task) : run_group(task, worker); };
  Threads<2, decltype(run)>(tasks, run).start(plan.workers(*call), call->team);
  for (long w = 0; w < plan.spaces.count(); ++w) call->nonfinite |= plan.spaces[w].nonfinite;
}
