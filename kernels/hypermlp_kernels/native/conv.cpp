// The short depthwise causal convolution y[t] = sum_r taps[r] x[t - r] and its gradients. Sums of the taps' gradients
// belong to blocks of rows and are added in order: the same bits for any number of threads.
#include "streams.h"
#include "work.h"
#include "workspace.h"

namespace hypermlp {

struct ConvCall {
  int64_t length, past, channels, size, threads, batch;  // `length` tokens, of which the first `past` are only read
  const int64_t *starts, *stops;  // [length]: bounds of each token's sequence, or null: one sequence a row
  Stream x;                       // [B, length, channels]
  const real* taps;               // [channels, size], the last one is the current token's
  real* y;                        // [B, length - past, channels]
  Stream grad_y;
  real *dx, *dtaps;  // [B, length, channels], [channels, size]; null where not asked for
  void* workspace;
};

namespace {

constexpr long ROWS_AT_ONCE = 256;
constexpr int MOST = 4;  // taps of one pass over a row

struct Plan {
  long blocks, tasks;  // of rows in a batch row, and in all
  Workspace space;
  real *taps, *sums;  // [size, channels], lag 0 first; [tasks, size, channels]

  Plan(const ConvCall& call, void* memory)
      : blocks((call.length + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE), tasks(blocks * call.batch), space(memory) {
    taps = space.take(call.size * call.channels);
    sums = space.take(call.dtaps ? tasks * call.size * call.channels : 0);
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

const real* row(const Stream& x, long batch, long t) {
  return static_cast<const real*>(x.data) + batch * x.batch + t * x.token;
}

void forward_rows(const ConvCall& call, const Plan& plan, long batch, long begin, long end) {
  for (long t = max(begin, call.past); t < end; ++t) {
    const long start = call.starts ? call.starts[t] : 0;
    weighted_sum(min(call.size, t - start + 1), row(call.x, batch, t), -call.x.token, plan.taps, call.channels,
                 call.y + (batch * (call.length - call.past) + t - call.past) * call.channels);
  }
}

void backward_rows(const ConvCall& call, const Plan& plan, long batch, long begin, long end, real* sums) {
  if (sums) zero(sums, call.size * call.channels);
  for (long t = begin; t < end; ++t) {
    // the gradients of y that this token has part in: lags first:first + count
    const long stop = call.stops ? call.stops[t] : call.length, first = max(0, call.past - t);
    const long count = max(0, min(call.size, stop - t) - first);
    const real* grad = row(call.grad_y, batch, t + first - call.past);
    if (call.dx)
      weighted_sum(count, grad, call.grad_y.token, plan.taps + first * call.channels, call.channels,
                   call.dx + (batch * call.length + t) * call.channels);
    if (!sums) continue;
    const real* x = row(call.x, batch, t);
    for (long r = 0; r < count; ++r) {
      real* sum = sums + (first + r) * call.channels;
      for (long c = 0; c < call.channels; ++c) sum[c] += grad[r * call.grad_y.token + c] * x[c];
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
  auto run = [&](int, long task, long) {
    const long batch = task / plan.blocks, begin = task % plan.blocks * ROWS_AT_ONCE;
    const long end = min(begin + ROWS_AT_ONCE, call->length);
    if (call->y)
      forward_rows(*call, plan, batch, begin, end);
    else
      backward_rows(*call, plan, batch, begin, end,
                    call->dtaps ? plan.sums + task * call->size * call->channels : nullptr);
  };
  Threads<1, decltype(run)>(tasks, run).start(min(call->threads, tasks[0]));
  if (call->dtaps) add_taps(*call, plan);
}
