// The short depthwise causal convolution y[t] = sum_r taps[r] x[t - r] and its gradients. Sums of the taps' gradients
// belong to blocks of rows and are added in order: the same bits for any number of threads.
#include "streams.h"
#include "work.h"
#include "workspace.h"

namespace hypermlp {

struct ConvCall {
  int64_t length, past, channels, size, threads, batch;  // `length` tokens, of which the first `past` are only read
  int64_t type;                                          // of x and grad_y
  const int64_t *starts, *stops;  // [length]: bounds of each token's sequence, or null: one sequence a row
  Stream x;                       // [B, length, channels]
  const real* taps;               // [channels, size], the last one is the current token's
  real* y;                        // [B, length - past, channels]
  Stream grad_y;
  real *dx, *dtaps;  // [B, length, channels], [channels, size]; null where not asked for
  void* workspace;
  Team team;
};

namespace {

constexpr long ROWS_AT_ONCE = 256;
constexpr int MOST = 4;  // taps of one pass over a row

struct Plan {
  long blocks, tasks;  // of rows in a batch row, and in all
  Workspace space;
  real *taps, *sums;  // [size, channels], lag 0 first; [tasks, size, channels]
  real* converted;    // [workers, 2, tokens that a block reads, channels], where inputs are not `real`
  long read;          // of one of the two

  Plan(const ConvCall& call, void* memory)
      : blocks((call.length + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE), tasks(blocks * call.batch), space(memory) {
    taps = space.take(call.size * call.channels);
    sums = space.take(call.dtaps ? tasks * call.size * call.channels : 0);
    read = call.type == REAL ? 0 : min(ROWS_AT_ONCE + call.size - 1, call.length) * call.channels;
    converted = space.take(2 * read * max(1, min(call.threads, tasks)));
    if (!memory) return;
    for (long c = 0; c < call.channels; ++c)
      for (long r = 0; r < call.size; ++r) taps[r * call.channels + c] = call.taps[c * call.size + call.size - 1 - r];
  }
};

// y = sum_r w[r] x[r * step], or y += it, over N rows of x
template <int N>
void weighted(const real* x, long step, const real* w, long channels, bool add, real* y) {
  for (long c = 0; c < channels; ++c) {
    real total = add ? y[c] : 0;
    UNROLLED(r, N) total += w[r * channels + c] * x[r * step + c];
    y[c] = total;
  }
}
void weighted_sum(long count, const real* x, long step, const real* w, long channels, real* y) {
  bool add = false;
  for (; count >= MOST; count -= MOST, x += MOST * step, w += MOST * channels, add = true)
    weighted<MOST>(x, step, w, channels, add, y);
  if (count == 3) weighted<3>(x, step, w, channels, add, y);
  if (count == 2) weighted<2>(x, step, w, channels, add, y);
  if (count == 1) weighted<1>(x, step, w, channels, add, y);
  if (count <= 0 && !add) zero(y, channels);
}

// tokens begin:end of a batch row as `real`, each `distance` after the one before it
struct Tokens {
  const real* data;
  long distance;

  Tokens(const ConvCall& call, const Stream& x, long batch, long begin, long end, real* converted) {
    if (call.type == REAL) {
      data = static_cast<const real*>(x.data) + batch * x.batch;
      distance = x.token;
      return;
    }
    data = converted - begin * call.channels;
    distance = call.channels;
    for (long t = begin; t < end; ++t, converted += call.channels)
      read_row(Type(call.type), x, batch, t, 0, call.channels, converted);
  }
  const real* operator[](long t) const { return data + t * distance; }
};

void forward_rows(const ConvCall& call, const Plan& plan, long batch, long begin, long end, real* converted) {
  begin = max(begin, call.past);
  const Tokens x(call, call.x, batch, max(0, begin - call.size + 1), end, converted);
  for (long t = begin; t < end; ++t) {
    const long start = call.starts ? call.starts[t] : 0;
    weighted_sum(min(call.size, t - start + 1), x[t], -x.distance, plan.taps, call.channels,
                 call.y + (batch * (call.length - call.past) + t - call.past) * call.channels);
  }
}

void backward_rows(const ConvCall& call, const Plan& plan, long batch, long begin, long end, real* sums,
                   real* converted) {
  const Tokens x(call, call.x, batch, begin, sums ? end : begin, converted);
  const Tokens grad(call, call.grad_y, batch, max(0, begin - call.past),
                    min(end + call.size - 1, call.length) - call.past, converted + plan.read);
  if (sums) zero(sums, call.size * call.channels);
  for (long t = begin; t < end; ++t) {
    // the gradients of y that this token has part in: lags first:first + count
    const long stop = call.stops ? call.stops[t] : call.length, first = max(0, call.past - t);
    const long count = max(0, min(call.size, stop - t) - first);
    const real* grads = grad[t + first - call.past];
    if (call.dx)
      weighted_sum(count, grads, grad.distance, plan.taps + first * call.channels, call.channels,
                   call.dx + (batch * call.length + t) * call.channels);
    if (!sums) continue;
    const real* now = x[t];
    for (long r = 0; r < count; ++r) {
      real* sum = sums + (first + r) * call.channels;
      for (long c = 0; c < call.channels; ++c) sum[c] += grads[r * grad.distance + c] * now[c];
    }
  }
}

void add_taps(const ConvCall& call, const Plan& plan) {
  for (long c = 0; c < call.channels; ++c)
    for (long r = 0; r < call.size; ++r) {
      real total = 0;
      for (long task = 0; task < plan.tasks; ++task) total += plan.sums[(task * call.size + r) * call.channels + c];
      call.dtaps[c * call.size + call.size - 1 - r] = total;
    }
}

}  // namespace
}  // namespace hypermlp

using namespace hypermlp;

extern "C" int64_t hypermlp_conv_bytes(const ConvCall* call) { return Plan(*call, nullptr).space.used(); }

extern "C" void hypermlp_conv(ConvCall* call) {
  const Plan plan(*call, call->workspace);
  const long tasks[] = {plan.tasks};
  auto run = [&](int, long task, long worker) {
    const long batch = task / plan.blocks, begin = task % plan.blocks * ROWS_AT_ONCE;
    const long end = min(begin + ROWS_AT_ONCE, call->length);
    real* converted = plan.converted + worker * 2 * plan.read;
    if (call->y)
      forward_rows(*call, plan, batch, begin, end, converted);
    else
      backward_rows(*call, plan, batch, begin, end,
                    call->dtaps ? plan.sums + task * call->size * call->channels : nullptr, converted);
  };
  Threads<1, decltype(run)>(tasks, run).start(min(call->threads, tasks[0]), call->team);
  if (call->dtaps) add_taps(*call, plan);
}
