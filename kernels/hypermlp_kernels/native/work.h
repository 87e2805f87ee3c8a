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

// Runs `tasks[p]` tasks of each phase p, `run(phase, task, worker)`, every phase after the one before it. The threads
// are made for the call: nothing outlives it that a fork could break, and starting one costs some 20 microseconds.
template <int PHASES, class Run>
class Threads {
 public:
  Threads(const long (&tasks)[PHASES], Run run) : tasks_(tasks), run_(run) {}

  void start(long count) {
    pthread_t others[MOST];
    long started = 0;
    Worker workers[MOST + 1];
    for (long i = 0; i < min(count - 1, MOST); ++i) {
      workers[i + 1] = {this, i + 1};
      // a thread that cannot be had leaves its tasks to the others
      if (pthread_create(&others[started], nullptr, enter, &workers[i + 1]) == 0) ++started;
    }
    work(0);
    for (long i = 0; i < started; ++i) pthread_join(others[i], nullptr);
  }

  static constexpr long MOST = 255;

 private:
  struct Worker {
    Threads* threads;
    long number;
  };
  static void* enter(void* worker) {
    static_cast<Worker*>(worker)->threads->work(static_cast<Worker*>(worker)->number);
    return nullptr;
  }
  void work(long worker) {
    for (int phase = 0; phase < PHASES; ++phase) {
      for (long task; (task = next_[phase].fetch_add(1)) < tasks_[phase]; done_[phase].fetch_add(1))
        run_(phase, task, worker);
      while (done_[phase].load() < tasks_[phase]) sched_yield();
    }
  }

  const long (&tasks_)[PHASES];
  Run run_;
  std::atomic<long> next_[PHASES] = {}, done_[PHASES] = {};
};

}  // namespace hypermlp
