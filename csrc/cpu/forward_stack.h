// Layers on top of each other, side by side on different threads: while one takes a chunk of steps,
// the layer above it takes the chunk before. Where rows are few, this divides the work better than
// the rows or units of one layer, and threads need each other once in a chunk, not in a step.
//
// The parts of a phase are the layers, or rows of them, and its work is a diagonal: the k-th layer
// has its chunk number (phase - k). So all that a part reads was written in a phase before, and
// threads that are late or gone are replaced as in any other phase, see team.h.
#pragma once

#include <memory>
#include <optional>

#include "forward.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class ForwardStack {
 public:
  // layers: from the lowest on, each with the output of the one below as its x. Their weights are
  // not packed yet.
  ForwardStack(const ForwardArgs* layers, int count, const CellLoops<S>& loops,
               const StackPlan& plan, Workspace& workspace)
      : plan_(plan),
        count_(count),
        parts_(count * plan.row_parts),
        layers_(std::make_unique<std::optional<Layer>[]>(count)) {
    for (int k = 0; k < count; ++k) layers_[k].emplace(layers[k], loops, workspace);
  }

  Parts parts(Workspace& workspace) const {
    Part* const own = workspace.take<Part>(parts_);
    const ForwardArgs& args = layers_[0]->args;
    for (int i = 0; i < parts_; ++i) {
      const Range rows = share_rows(args.batch_sizes, args.steps, args.batch, i % plan_.row_parts,
                                    plan_.row_parts);
      own[i] = {rows, i, parts_, false};
    }
    // Weights stay in the cache of their thread, as where units are split.
    return {own, parts_, {{0, args.batch}, 0, 1, false}, /*splits_units=*/true};
  }

  void run(int, PhaseRunner& runner) const {
    runner.phase([&](const Part& part) {
      const Layer& layer = layer_of(part);
      const Part own = rows_of(part);
      layer.scan.pack(0, own);
      layer.scan.start_states(0, own, layer.steps.first(0), nullptr);
    });
    const int64_t steps = layers_[0]->steps.count();
    const int64_t chunks = (steps + plan_.chunk - 1) / plan_.chunk;
    const int64_t diagonals = chunks + count_ - 1;
    for (int64_t i = 0; i < diagonals; ++i) {
      runner.phase([&](const Part& part) {
        const int64_t begin = (i - part.rank / plan_.row_parts) * plan_.chunk;
        if (begin < 0 || begin >= steps) return;
        const Layer& layer = layer_of(part);
        const int64_t first = layer.steps.first(0) + begin * layer.steps.stride(0);
        const int64_t count = min_of(plan_.chunk, steps - begin);
        const auto alone = [&](Body body) { body({part.rows, 0, 1, false}); };
        layer.scan.run_steps(0, first, count, layer.scan.saved(0), alone);
        if (layer.args.dropped != nullptr) drop(layer, part.rows, first, count);
      });
    }
  }

 private:
  struct Layer {
    Layer(const ForwardArgs& args, const CellLoops<S>& loops, Workspace& workspace)
        : args(args), steps(args, workspace), scan(args, loops, steps, workspace) {}

    const ForwardArgs& args;
    const Steps steps;
    const ForwardScan<S> scan;
  };

  const StackPlan plan_;
  const int count_, parts_;
  const std::unique_ptr<std::optional<Layer>[]> layers_;

  static void drop(const Layer& layer, Range rows, int64_t first, int64_t count) {
    const int64_t features = layer.args.proj;
    for (int64_t i = 0, t = first; i < count; ++i, t += layer.steps.stride(0)) {
      const int64_t begin = (layer.steps.offset(t) + rows.begin) * features;
      const int64_t end =
          (layer.steps.offset(t) + min_of(rows.end, layer.steps.rows(t))) * features;
      join_each(at<S>(layer.args.output, begin), at<S>(layer.args.dropout, begin),
                static_cast<S*>(layer.args.dropped) + begin, end - begin,
                [](auto a, auto b) { return a * b; });
    }
  }

  const Layer& layer_of(const Part& part) const { return *layers_[part.rank / plan_.row_parts]; }
  // Its place among the parts of one layer.
  Part rows_of(const Part& part) const {
    return {part.rows, part.rank % plan_.row_parts, plan_.row_parts, false};
  }
};

// For `count` layers like this one.
template <class S>
StackPlan stack_plan(const ForwardArgs& layer, int count, int threads) {
  Workspace workspace;
  ForwardArgs upper = layer;
  upper.input = layer.proj;
  const Steps steps(upper, workspace);
  return fastrnn::plan_stack(ForwardScan<S>::work(upper, steps), count, threads, Pass::kForward);
}

template <class Device, class S>
void forward_stack_dev_impl(const Device& device, const ForwardArgs* layers, int count,
                            const StackPlan& plan, const CellLoops<S>& loops) {
  Workspace workspace;
  const ForwardStack<S> stack(layers, count, loops, plan, workspace);
  run_parts(stack, 1, {plan.threads, 1, Split::kRows}, stack.parts(workspace), device.threads,
            workspace);
}

}  // namespace fastrnn::FASTRNN_VARIANT
