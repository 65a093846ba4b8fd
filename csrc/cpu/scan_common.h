// One team of threads per scan, and the parts into which its work is divided.
#pragma once

#include <type_traits>

#include "scan.h"
#include "schedule.h"
#include "steps.h"
#include "team.h"

namespace fastrnn::FASTRNN_VARIANT {

struct Cpu {
  int threads;
};

// Parts per thread, at most, of work that is divided by rows, and of work that is divided with
// share(): more than one, so that a thread can take over parts of another that is late.
constexpr int kMaxRowParts = 4, kSharedParts = 4;
constexpr int64_t kTilesPerPart = 4;  // of rows, at least: they share the weights that they read

// One of the `size` parts of a phase. Where rows are split, a part is some rows and all units;
// where units are split, it is all rows and some blocks of units.
struct Part {
  Range rows;
  int rank, size;
  bool splits_units;

  Range blocks(int64_t count) const {
    return splits_units ? share(count, rank, size) : Range{0, count};
  }
};

// The parts of all directions.
struct Parts {
  Part* own;  // by rows or by units, as the plan says
  int count;
  Part shared;  // of other work, see PhaseRunner::shared_phase
  bool splits_units;
};

// A function object that somebody else owns, called through a pointer: what takes one is compiled
// once.
template <class Argument>
class Called {
 public:
  template <class F>
    requires(!std::is_same_v<F, Called>)
  Called(const F& f)
      : object_(&f), call_([](const void* object, Argument argument) {
          (*static_cast<const F*>(object))(argument);
        }) {}
  void operator()(Argument argument) const { call_(object_, argument); }

 private:
  const void* object_;
  void (*call_)(const void* object, Argument argument);
};
using Body = Called<const Part&>;  // what is done for a part
using Phase = Called<Body>;        // does it for parts

// A thread on its way through one direction. body(part) is run for every part of a phase, each on
// one thread; when phase() returns, all are done.
class PhaseRunner {
 public:
  PhaseRunner(const Parts& parts, Phases& phases, int rank, int size)
      : parts_(parts), phases_(phases), member_{rank, size, parts.splits_units} {}

  void phase(Body body) {
    run(parts_.count, [&](int i) { body(parts_.own[i]); });
  }
  // The same, but nothing may follow: it returns when all parts have begun.
  void last_phase(Body body) {
    for (int i; (i = phases_.next_part_of_last(member_, parts_.count)) >= 0;) body(parts_.own[i]);
  }
  // Work that is divided with share() by the part's rank and size, neither by rows nor by units.
  void shared_phase(Body body) {
    run(parts_.shared.size, [&](int i) {
      Part part = parts_.shared;
      part.rank = i;
      body(part);
    });
  }

  // The phases of some steps: steps(phase) goes through the steps and calls phase(body) for what
  // must be done by all parts before the next body begins. Where rows are split, or no part reads
  // what another wrote, each part goes through all steps in a single phase.
  void step_phases(Called<Phase> steps, bool is_last = false, bool need_each_other = true) {
    if (parts_.splits_units && need_each_other) {
      const auto with_all = [&](Body body) { phase(body); };
      return steps(with_all);
    }
    const auto all_steps = [&](const Part& part) {
      const auto alone = [&](Body body) { body(part); };
      steps(alone);
    };
    is_last ? last_phase(all_steps) : phase(all_steps);
  }

 private:
  const Parts& parts_;
  Phases& phases_;
  Member member_;

  template <class Run>
  void run(int count, const Run& run_part) {
    for (int i; (i = phases_.next_part(member_, count)) >= 0;) {
      run_part(i);
      phases_.done(member_, i, count);
    }
  }
};

// The parts of a plan. Each thread's share of rows is divided further, at the borders of register
// tiles, so that others can take over what it has not begun.
template <class Args>
Parts make_parts(const Args& args, const Work& work, const ThreadPlan& plan, Workspace& workspace) {
  const int team = plan.threads / plan.groups;
  const bool splits_units = plan.split == Split::kUnits, is_alone = plan.threads == 1;
  const Range all{0, args.batch};
  const Part shared{all, 0, is_alone ? 1 : team * kSharedParts, false};
  const int64_t tiles = (work.rows / team + work.max_rows - 1) / work.max_rows;
  const int64_t wanted = max_of(1, min_of(tiles / kTilesPerPart, kMaxRowParts));
  const int per_thread = splits_units || is_alone ? 1 : static_cast<int>(wanted);
  const int count = team * per_thread;
  Parts parts{workspace.take<Part>(count), count, shared, splits_units};
  for (int i = 0; i < team; ++i) {
    const Range rows =
        splits_units ? all : share_rows(args.batch_sizes, args.steps, args.batch, i, team);
    const int64_t size = rows.end - rows.begin;
    const int64_t row_tiles = max_of(1, (size + work.max_rows - 1) / work.max_rows);
    // The tiles of for_each_tile begin at the same rows.
    const auto begin = [&](int part) {
      return rows.begin + row_tiles * part / per_thread * size / row_tiles;
    };
    for (int part = 0; part < per_thread; ++part) {
      const int rank = i * per_thread + part;
      parts.own[rank] = {{begin(part), begin(part + 1)}, rank, count, splits_units};
    }
  }
  return parts;
}

// Runs all directions on one team. Each group of threads begins with its own direction, and then
// takes parts of the others that nobody has begun.
template <class Scan>
void run_parts(const Scan& scan, int directions, const ThreadPlan& plan, const Parts& parts,
               int threads, Workspace& workspace) {
  struct Context {
    const Scan& scan;
    int directions;
    ThreadPlan plan;
    const Parts& parts;
    Phases phases[kMaxDirections];
  };
  Context context{scan, directions, plan, parts, {}};
  const int max_parts = parts.count < parts.shared.size ? parts.shared.size : parts.count;
  for (int d = 0; d < directions; ++d) {
    void* const memory = workspace.take<unsigned char>(Phases::bytes(max_parts));
    context.phases[d].set_memory(memory, max_parts);
  }
  const auto body = [](void* pointer, int rank) {
    Context& c = *static_cast<Context*>(pointer);
    if (rank >= c.plan.threads) return;
    const int team = c.plan.threads / c.plan.groups;
    for (int i = 0; i < c.directions; ++i) {
      const int direction = (rank / team + i) % c.directions;
      PhaseRunner runner(c.parts, c.phases[direction], rank % team, team);
      c.scan.run(direction, runner);
    }
  };
  // A team of all threads, though some have nothing to do: OpenMP ends those that a smaller team
  // leaves out, and the next operation of torch would have to start them again.
  run_team(plan.threads == 1 ? 1 : threads, body, &context);
}

// The same with the division that should take the least time.
template <class Scan, class Args>
void run_scan(const Args& args, const Work& work, int threads, Workspace& workspace,
              const Scan& scan) {
  const ThreadPlan plan = plan_threads(work, threads);
  const Parts parts = make_parts(args, work, plan, workspace);
  run_parts(scan, args.directions, plan, parts, threads, workspace);
}

}  // namespace fastrnn::FASTRNN_VARIANT
