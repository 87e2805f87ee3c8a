// One new token against a cache: everything between reading keys and reading values is a vector of the lags seen.
#include "norm.h"
#include "softplus.h"
#include "streams.h"
#include "work.h"
#include "workspace.h"

namespace hypermlp {

// slots of the cache, side by side for all heads: keys [B * maps, qk, count], values [B * heads, count, v]
struct Segment {
  const void *keys, *values;
  int64_t key_head, key_row, key_slot, value_head, value_row;
  int64_t count;
};

enum Order : int64_t {
  LAG,       // slots run from the oldest token to the newest
  POSITION,  // so too, and table row 0 is slot start[b]
  RING,      // token t is in slot t % slots, of `length` tokens
};

struct StepCall {
  int64_t batch, heads, maps, qk, v, lags, type, norm, threads;
  double eps;
  const Segment* segments;
  int64_t num_segments;
  int64_t order, length;
  const int64_t* start;  // [B]
  const uint8_t* valid;  // [B, slots], or null
  Stream q;              // [B, 1, maps * heads, qk]
  Mix routing, readout;  // gates [B, 1, heads, rank]
  real* o;               // [B, heads, v]
  void* workspace;
  Team team;
};

namespace {

struct Space {  // of one worker
  real *map[2], *slots, *row, *z, *gate, *q, *out;
  Space(Workspace& space, const StepCall& call, long slots_) {
    const long padded = round_up(slots_, BLOCK);
    for (long m = 0; m < call.maps; ++m) map[m] = space.take(padded);
    slots = space.take(padded);
    row = space.take(max(padded, call.v));
    z = space.take(max(call.routing.rank, call.readout.rank));
    gate = space.take(max(call.routing.rank, call.readout.rank));
    q = space.take(call.qk);
    out = space.take(round_up(call.v, BLOCK));
  }
};

// y += sum_i x[i] rows[i], `depth` rows `distance` apart, for `count` columns: four blocks at once, sums in registers
void add_rows(const real* x, const real* rows, long distance, long depth, long count, real* y) {
  constexpr int WIDE = 4 * VECTORS <= 16 ? 4 * VECTORS : VECTORS;
  long c = 0;
  for (; c + WIDE * W <= count; c += WIDE * W) {
    vec acc[WIDE];
    UNROLLED(n, WIDE) acc[n] = load(y + c + n * W);
    for (long i = 0; i < depth; ++i) {
      const vec weight = splat(x[i]);
      UNROLLED(n, WIDE) acc[n] += weight * load(rows + i * distance + c + n * W);
    }
    UNROLLED(n, WIDE) store(y + c + n * W, acc[n]);
  }
  for (; c < count; ++c) {
    real total = y[c];
    for (long i = 0; i < depth; ++i) total += x[i] * rows[i * distance + c];
    y[c] = total;
  }
}

class Step {
 public:
  Step(const StepCall& call, long slots, const Space& space) : call_(call), slots_(slots), s_(space) {}

  void run(long batch, long head) {
    columns(batch);
    for (long m = 0; m < call_.maps; ++m) {
      const long index = m * call_.heads + head;
      scores(batch, index);
      to_columns(s_.slots, s_.map[m]);
      mix(call_.routing, batch, index, s_.map[m]);
    }
    real* a = s_.map[0];
    const real rho = norm(a), unit = call_.norm ? row_unit(rho) : 1;
    for (long c = 0; c < columns_ && unit != 1; ++c) a[c] /= unit;
    select_weights(a);
    mix(call_.readout, batch, head, a);
    to_slots(a, s_.slots);
    read_values(batch, head, rho / unit);
  }

 private:
  // Table row c stands for slot first_ + step_ * c, around the ring's end in a ring; rows 0 to columns_ - 1 do.
  void columns(long batch) {
    valid_ = call_.valid ? call_.valid + batch * slots_ : nullptr;
    const long newest = call_.order == RING ? (call_.length - 1) % slots_ : slots_ - 1;
    first_ = call_.order == POSITION ? call_.start[batch] : newest;
    step_ = call_.order == POSITION ? 1 : -1;
    columns_ = call_.order == RING       ? min(slots_, call_.length)
               : call_.order == POSITION ? max(0, slots_ - first_)
                                         : slots_;
    padded_ = round_up(columns_, BLOCK);
  }
  long slot(long column) const {
    const long at = first_ + step_ * column;
    return at < 0 ? at + slots_ : at;
  }
  void to_columns(const real* by_slot, real* by_column) const {
    for (long c = 0; c < columns_; ++c) {
      const long at = slot(c);
      by_column[c] = valid_ && !valid_[at] ? 0 : by_slot[at];
    }
    zero(by_column + columns_, padded_ - columns_);
  }
  void to_slots(const real* by_column, real* by_slot) const {
    if (columns_ < slots_) zero(by_slot, slots_);
    for (long c = 0; c < columns_; ++c) {
      const long at = slot(c);
      by_slot[at] = valid_ && !valid_[at] ? 0 : by_column[c];
    }
  }

  // `count` elements `distance` apart as they are or, where they are of another type or apart, in `row`
  const real* read(const void* data, long at, long distance, long count) const {
    if (call_.type == REAL) {
      const real* p = static_cast<const real*>(data) + at;
      if (distance == 1) return p;
      for (long i = 0; i < count; ++i) s_.row[i] = p[i * distance];
    } else {
      const long runs = distance == 1 ? 1 : count;
      for (long i = 0; i < runs; ++i)
        read_row(Type(call_.type), {static_cast<const uint16_t*>(data) + at + i * distance, 0, 0, 0}, 0, 0, 0,
                 count / runs, s_.row + i);
    }
    return s_.row;
  }
  void scores(long batch, long index) const {
    read_row(Type(call_.type), call_.q, batch, 0, index, call_.qk, s_.q);
    zero(s_.slots, slots_);
    real* y = s_.slots;
    for (long n = 0; n < call_.num_segments; y += call_.segments[n++].count) {
      const Segment& part = call_.segments[n];
      const long head = (batch * call_.maps * call_.heads + index) * part.key_head;
      if (call_.type == REAL && part.key_slot == 1) {
        add_rows(s_.q, static_cast<const real*>(part.keys) + head, part.key_row, call_.qk, part.count, y);
        continue;
      }
      for (long k = 0; k < call_.qk; ++k)
        add_rows(s_.q + k, read(part.keys, head + k * part.key_row, part.key_slot, part.count), 0, 1, part.count, y);
    }
  }

  // x (Diag(identity + diag) + down Diag(gate) up^T) in place
  void mix(const Mix& mix, long batch, long index, real* x) const {
    const long rank = mix.rank;
    const real* diag = mix.diag ? mix.diag + index * call_.lags : nullptr;
    if (rank) {
      zero(s_.z, rank);
      add_columns(x, mix.down + index * call_.lags * rank, rank, s_.z);
      if (mix.gate.data) {
        read_row(Type(call_.type), mix.gate, batch, 0, index, rank, s_.gate);
        for (long r = 0; r < rank; ++r) s_.z[r] *= s_.gate[r];
      }
    }
    const real* up = rank ? mix.up + index * call_.lags * rank : nullptr;
    const real identity = mix.identity;
    for (long c = 0; c < columns_; ++c) {
      const real u = rank ? dot(up + c * rank, s_.z, rank) : 0;
      x[c] = valid_ && !valid_[slot(c)] ? 0 : x[c] * ((diag ? diag[c] : 0) + identity) + u;
    }
  }
  // z += x table, with four sums so that none waits for the last
  void add_columns(const real* x, const real* table, long rank, real* z) const {
    long r = 0;
    for (; r + W <= rank; r += W) {
      vec acc[4] = {};
      long c = 0;
      for (; c + 4 <= columns_; c += 4)
        UNROLLED(n, 4) acc[n] += splat(x[c + n]) * load(table + (c + n) * rank + r);
      for (; c < columns_; ++c) acc[0] += splat(x[c]) * load(table + c * rank + r);
      store(z + r, (acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
    for (; r < rank; ++r)
      for (long c = 0; c < columns_; ++c) z[r] += x[c] * table[c * rank + r];
  }
  static real dot(const real* x, const real* y, long count) {
    vec acc{};
    long i = 0;
    for (; i + W <= count; i += W) acc += load(x + i) * load(y + i);
    real total = i ? sum(acc) : 0;
    for (; i < count; ++i) total += x[i] * y[i];
    return total;
  }

  real norm(const real* gate) const {
    if (!call_.norm) return 1;
    alignas(64) real squares[BLOCK] = {};
    for (long c = 0; c < padded_; c += W) {
      const vec x = load(gate + c);
      store(squares + c % BLOCK, load(squares + c % BLOCK) + x * x);
    }
    const real found = row_norm(squares, gate, columns_), eps = call_.eps;
    return found < eps ? eps : found;
  }
  // A score of minus infinity selects nothing in relu and softplus: NaN, made of zero times infinity, stays one.
  void select_weights(real* gate) const {
    for (long c = 0; c < padded_; c += BLOCK) {
      vec u[VECTORS], positive[VECTORS], unused[VECTORS];
      UNROLLED(n, VECTORS) u[n] = call_.maps == 2 ? load(s_.map[1] + c + n * W) : vec{};
      if (call_.maps == 2) softplus<false>(u, positive, unused);
      UNROLLED(n, VECTORS) {
        const vec g = load(gate + c + n * W), open = relu(g) + g * real(0);
        store(gate + c + n * W, call_.maps == 2 ? open * (positive[n] + u[n] * real(0)) : open);
      }
    }
  }

  void read_values(long batch, long head, real rho) const {
    zero(s_.out, call_.v);
    const real* w = s_.slots;
    for (long n = 0; n < call_.num_segments; w += call_.segments[n++].count) {
      const Segment& part = call_.segments[n];
      const long first = (batch * call_.heads + head) * part.value_head;
      if (call_.type == REAL) {
        add_rows(w, static_cast<const real*>(part.values) + first, part.value_row, part.count, call_.v, s_.out);
        continue;
      }
      for (long j = 0; j < part.count; ++j)
        add_rows(w + j, read(part.values, first + j * part.value_row, 1, call_.v), 0, 1, call_.v, s_.out);
    }
    real* o = call_.o + (batch * call_.heads + head) * call_.v;
    for (long c = 0; c < call_.v; ++c) o[c] = s_.out[c] / rho;
  }

  const StepCall& call_;
  const long slots_;
  const Space& s_;
  const uint8_t* valid_ = nullptr;
  long first_ = 0, step_ = 0, columns_ = 0, padded_ = 0;
};

struct Plan {
  long slots = 0;
  Array<Space> spaces;
  Workspace space;

  Plan(const StepCall& call, void* memory) : spaces(max(1, call.threads)), space(memory) {
    for (long n = 0; n < call.num_segments; ++n) slots += call.segments[n].count;
    for (long w = 0; w < max(1, call.threads); ++w) spaces.add(space, call, slots);
  }
};

}  // namespace
}  // namespace hypermlp

using namespace hypermlp;

extern "C" int64_t hypermlp_step_bytes(const StepCall* call) { return Plan(*call, nullptr).space.used(); }

extern "C" void hypermlp_step(StepCall* call) {
  Plan plan(*call, call->workspace);
  const long tasks[] = {call->batch * call->heads};
  auto run = [&](int, long task, long worker) {
    Step(*call, plan.slots, plan.spaces[worker]).run(task / call->heads, task % call->heads);
  };
  Threads<1, decltype(run)>(tasks, run).start(min(call->threads, tasks[0]), call->team);
}
