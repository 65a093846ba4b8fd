// What the forward and the backward scan share: where the rows of a step lie, and which part of the
// work is a thread's own.
#pragma once

#include "scan.h"
#include "multiply.h"
#include "schedule.h"
#include "team.h"
#include "workspace.h"

namespace fastrnn::FASTRNN_VARIANT {

struct Cpu {
  int threads;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// Steps of ragged rows; see scan.h for the layout.
class Steps {
 public:
  template <class Args>
  Steps(const Args& args, Workspace& workspace)
      : steps_(args.steps),
        batch_(args.batch),
        batch_sizes_(args.batch_sizes),
        resets_(args.resets),
        reverse_(args.reverse) {
    if (batch_sizes_ == nullptr) return;
    offsets_ = workspace.take<int64_t>(steps_);
    int64_t sum = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      offsets_[t] = sum;
      sum += batch_sizes_[t];
    }
  }

  int64_t count() const { return steps_; }

  // N
  int64_t total() const { return steps_ == 0 ? 0 : offset(steps_ - 1) + rows(steps_ - 1); }

  int64_t mean_rows() const {
    if (batch_sizes_ == nullptr || steps_ == 0) return batch_;
    return (total() + steps_ - 1) / steps_;
  }

  // Rows alive at step t; none before the first step and after the last.
  int64_t rows(int64_t t) const {
    if (t < 0 || t >= steps_) return 0;
    return batch_sizes_ == nullptr ? batch_ : batch_sizes_[t];
  }

  // The buffer row at which step t begins.
  int64_t offset(int64_t t) const { return batch_sizes_ == nullptr ? t * batch_ : offsets_[t]; }

  // Whether a direction goes from each row's last step to its first.
  bool runs_back(int direction) const { return direction == 1 || reverse_; }

  // Whether a row's state before step t, in the order of the direction, does not go into it: the
  // initial state or that of another step.
  bool cut_before(int direction, int64_t t, int64_t row) const {
    return resets(runs_back(direction) ? t + 1 : t, row);
  }
  // The same of its state after step t; never of its final state.
  bool cut_after(int direction, int64_t t, int64_t row) const {
    return runs_back(direction) ? t > 0 && resets(t, row) : resets(t + 1, row);
  }

 private:
  bool resets(int64_t t, int64_t row) const {
    return resets_ != nullptr && row < rows(t) && resets_[offset(t) + row];
  }

  int64_t steps_, batch_;
  const int64_t* batch_sizes_;
  const bool* resets_;
  bool reverse_;
  int64_t* offsets_ = nullptr;
};

// A thread's own part of one direction.
struct Part {
  Range rows, blocks;
  Barrier* barrier;
  int rank, size;
  bool meets_each_step;
  void meet() const { barrier->wait(size); }
};

// One parallel region: every thread runs its part of one direction or of each.
template <class Scan, class Args>
void run_scan(const Args& args, const Work& work, int threads, const Scan& scan) {
  struct Context {
    const Args& args;
    const Work& work;
    const Scan& scan;
    Plan plan;
    Barrier barriers[kMaxDirections];
  } context{args, work, scan, make_plan(work, present_threads(threads)), {}};

  const auto body = [](void* pointer, int rank, int size) {
    Context& c = *static_cast<Context*>(pointer);
    // The runtime may send fewer threads than were asked for.
    const Plan plan = size == c.plan.threads ? c.plan : make_plan(c.work, size);
    if (rank >= plan.threads) return;
    const int team = plan.threads / plan.groups;
    const int group = rank / team;
    Part part{{0, c.args.batch}, {0, c.work.blocks}, &c.barriers[group], rank % team, team, false};
    if (plan.split == Split::kRows) {
      part.rows = share_rows(c.args.batch_sizes, c.args.steps, c.args.batch, part.rank, team);
    } else {
      part.blocks = share(c.work.blocks, part.rank, team);
      part.meets_each_step = true;
    }
    for (int d = group; d < c.args.directions; d += plan.groups) c.scan.run(d, part);
  };
  run_parallel(context.plan.threads, body, &context);
}

// Vectors of hidden units in a block: as many as fill the register tile, no more than there are.
template <class T>
int units_per_block(int64_t hidden, int gates) {
  const int64_t needed = (hidden + Vec<T>::lanes - 1) / Vec<T>::lanes;
  int units = kMaxVectors / gates;
  while (units > 1 && units / 2 >= needed) units /= 2;
  return units < 1 ? 1 : units;
}

// The columns of a product, cut into blocks as wide as a register tile.
template <class T>
struct Columns {
  explicit Columns(int64_t columns)
      : units(units_per_block<T>(columns, 1)),
        width(units * Vec<T>::lanes),
        blocks((columns + width - 1) / width) {}
  int units;  // vectors of columns in a block
  int64_t width, blocks;
};

// The length of rows of T so that they are whole vectors and an odd number of cache lines, which
// makes them fall into all sets of the cache.
template <class T>
int64_t odd_lines(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((columns + line - 1) / line | 1) * line;
}

// Asks for the cache lines of [p, p + bytes).
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i <= bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

}  // namespace fastrnn::FASTRNN_VARIANT
