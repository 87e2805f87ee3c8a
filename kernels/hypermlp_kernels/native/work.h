// How a call is divided, and the threads that do it.
//
// A piece is a range of rows of one sequence, for one head. Pieces depend on the sizes alone, each has sums of its own,
// and these are added in order: results are the same bits for any number of threads.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>

#include "tiles.h"

namespace hypermlp {

constexpr long TURNS = 20000;  // of waiting, some tenths of a millisecond

struct Piece {
  long sequence, begin, end;  // rows, from the sequence's first token
  long group;                 // pieces of a group are done one after another
  bool whole;                 // every query row of the sequence
};

class Pieces {
 public:
  // About `groups` groups of equal work for each head, cut between tiles; short sequences stay whole.
  Pieces(const Call& call, long groups) {
    data_ = static_cast<Piece*>(std::malloc((call.num_sequences + groups + 1) * sizeof(Piece)));
    double all = 0, done = 0;
    for (long s = 0; s < call.num_sequences; ++s) all += work(call, call.sequences[s]);
    for (long s = 0; s < call.num_sequences; ++s) {
      const Sequence& sequence = call.sequences[s];
      const Layout layout(call, sequence);
      const long first = max(0, call.past - sequence.start);
      const bool divisible = layout.length - first >= LEAST * TILE;
      long begin = first;
      for (long row = first; row < layout.length; row += TILE) {
        const long end = min(row + TILE, layout.length);
        done += tile_work(layout, row, end);
        const bool full = done * groups >= all * (group_ + 1);
        if (end < layout.length && !(full && divisible && end - begin >= LEAST * TILE / 2)) continue;
        data_[count_++] = {s, begin, end, group_, begin == first && end == layout.length};
        begin = end;
        if (full) group_ = min(group_ + 1, groups - 1);
      }
    }
    groups_ = count_ ? data_[count_ - 1].group + 1 : 0;
  }
  ~Pieces() { std::free(data_); }
  Pieces(const Pieces&) = delete;
  Pieces& operator=(const Pieces&) = delete;

  long count() const { return count_; }
  long groups() const { return groups_; }
  bool any_whole() const {
    for (long i = 0; i < count_; ++i)
      if (data_[i].whole) return true;
    return false;
  }
  const Piece& operator[](long i) const { return data_[i]; }

 private:
  static constexpr long LEAST = 8;  // tiles of a sequence that is cut

  static double tile_work(const Layout& layout, long begin, long end) {
    const long columns = layout.by_lag ? min(end, layout.columns) : layout.last_key(end);
    return static_cast<double>(end - begin) * (columns + BLOCK);
  }
  static double work(const Call& call, const Sequence& sequence) {
    const Layout layout(call, sequence);
    double total = 0;
    for (long row = max(0, call.past - sequence.start); row < layout.length; row += TILE)
      total += tile_work(layout, row, min(row + TILE, layout.length));
    return total;
  }

  Piece* data_;
  long count_ = 0, groups_ = 0, group_ = 0;
};

// How a thread rounds, and whether it takes tiny numbers for zero (torch.set_flush_denormal): PyTorch's threads have
// what they were made with, and a call computes by what its caller has.
struct FloatMode {
#if defined(__x86_64__)
  unsigned value = __builtin_ia32_stmxcsr();
  void set() const { __builtin_ia32_ldmxcsr(value); }
#elif defined(__aarch64__)
  uint64_t value;
  FloatMode() { asm volatile("mrs %0, fpcr" : "=r"(value)); }
  void set() const { asm volatile("msr fpcr, %0" ::"r"(value)); }
#else
  void set() const {}
#endif
};

// Until done() holds, which another thread sees to. At first without giving the processor away: beside a thread of
// PyTorch's OpenMP that still turns after its last work, it would be gone for milliseconds.
template <class Done>
void wait_until(Done done) {
  for (long turns = 0; !done(); ++turns) {
    if (turns >= TURNS) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

// Runs `tasks[p]` tasks of each phase p, `run(phase, task, worker)`, every phase after the one before it, on PyTorch's
// threads or, where it has none to lend, on threads made for the call: nothing outlives it that a fork could break, and
// starting one costs some 20 microseconds.
template <int PHASES, class Run>
class Threads {
 public:
  Threads(const long (&tasks)[PHASES], Run run) : tasks_(tasks), run_(run) {}

  // All of a team are asked for, however few have work: OpenMP lets go of those that it did not use.
  void start(long workers, const Team& team) {
    workers_ = min(workers, MOST + 1);
    if (workers_ > 1 && team.parallel)
      team.parallel(join, this, team.threads, 0);
    else
      on_own_threads();
  }

  static constexpr long MOST = 255;

 private:
  struct Worker {
    Threads* threads;
    long number;
  };
  static void join(void* self) {
    Threads& threads = *static_cast<Threads*>(self);
    const long number = threads.joined_.fetch_add(1);
    if (number >= threads.workers_) return;
    const FloatMode own;
    threads.mode_.set();
    threads.work(number);
    own.set();
  }
  void on_own_threads() {
    pthread_t others[MOST];
    long started = 0;
    Worker workers[MOST + 1];
    for (long i = 1; i < workers_; ++i) {
      workers[i] = {this, i};
      // a thread that cannot be had leaves its tasks to the others
      if (pthread_create(&others[started], nullptr, enter, &workers[i]) == 0) ++started;
    }
    work(0);
    for (long i = 0; i < started; ++i) pthread_join(others[i], nullptr);
  }
  static void* enter(void* worker) {
    static_cast<Worker*>(worker)->threads->work(static_cast<Worker*>(worker)->number);
    return nullptr;
  }
  void work(long worker) {
    for (int phase = 0; phase < PHASES; ++phase) {
      for (long task; (task = next_[phase].fetch_add(1)) < tasks_[phase]; done_[phase].fetch_add(1))
        run_(phase, task, worker);
      wait_until([&] { return done_[phase].load() >= tasks_[phase]; });
    }
  }

  const long (&tasks_)[PHASES];
  Run run_;
  const FloatMode mode_;  // the caller's
  long workers_ = 0;
  std::atomic<long> joined_{0}, next_[PHASES] = {}, done_[PHASES] = {};
};

}  // namespace hypermlp
