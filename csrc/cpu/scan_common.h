// One parallel region per scan, and which part of the work is a thread's own.
#pragma once

#include "scan.h"
#include "schedule.h"
#include "team.h"

namespace fastrnn::FASTRNN_VARIANT {

struct Cpu {
  int threads;
};

// A thread's own part of one direction.
struct Part {
  Range rows, blocks;
  Barrier* barrier;
  int rank, size;
  bool waits_each_step;  // at the barrier: other threads have other units of the same rows
  void wait() const { barrier->wait(size); }
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
      part.waits_each_step = true;
    }
    for (int d = group; d < c.args.directions; d += plan.groups) c.scan.run(d, part);
  };
  run_parallel(context.plan.threads, body, &context);
}

}  // namespace fastrnn::FASTRNN_VARIANT
