// The backward scans of layers on top of each other, side by side: see forward_stack.h. The highest
// layer goes first, and the gradients of its x are those of the output below. The gradients of the
// weights are computed as in a scan alone, from whole chunks and by all threads.
#pragma once

#include <memory>
#include <optional>

#include "backward.h"

namespace fastrnn::FASTRNN_VARIANT {

// Turns gradients of the x of the layer above, of some rows, into those of the output.
template <class S>
void complete_output(const BackwardArgs& args, int64_t begin, int64_t rows, void* d_x) {
  S* const d_output = static_cast<S*>(d_x) + begin * args.proj;
  const auto join = [&](const void* other, auto operation) {
    if (other == nullptr) return;
    join_each(d_output, at<S>(other, begin * args.proj), d_output, rows * args.proj, operation);
  };
  join(args.dropout, [](auto a, auto b) { return a * b; });
  join(args.d_result, [](auto a, auto b) { return a + b; });
}

template <class S>
class BackwardStack {
  using SavedSteps = Saved<const S, const Compute<S>>;

 public:
  // layers: from the lowest on. plan.chunk: the steps between two barriers, of which there are
  // several in a chunk of gradients.
  BackwardStack(const BackwardArgs* layers, int count, const CellLoops<S>& loops,
                const StackPlan& plan, Workspace& workspace)
      : threads_(plan.threads),
        count_(count),
        layers_(std::make_unique<std::optional<Layer>[]>(count)) {
    for (int i = 0; i < count; ++i) {
      layers_[i].emplace(layers[count - 1 - i], loops, threads_, workspace);
    }
    const BackwardScan<S>& scan = layers_[0]->scan;
    piece_ = min_of(plan.chunk, scan.chunk_steps());
    pieces_per_chunk_ = (scan.chunk_steps() + piece_ - 1) / piece_;
  }

  Parts parts(Workspace& workspace) const {
    Part* const own = workspace.take<Part>(count_);
    const Range rows{0, layers_[0]->args.batch};
    for (int i = 0; i < count_; ++i) own[i] = {rows, i, count_, false};
    return {own, count_, {rows, 0, threads_ * kSharedParts, false}, /*splits_units=*/true};
  }

  void run(int, PhaseRunner& runner) const {
    runner.phase([&](const Part& part) { layers_[part.rank]->scan.start(0, alone(part)); });
    const int64_t pieces = piece_end();
    for (int64_t i = 0; i < pieces + count_ - 1; ++i) {
      runner.phase([&](const Part& part) {
        if (0 <= i - part.rank && i - part.rank < pieces) run_piece(part, i - part.rank);
      });
      finish_chunks(runner, i);
    }
    runner.last_phase([&](const Part& part) { layers_[part.rank]->scan.write(0, alone(part)); });
  }

 private:
  struct Layer {
    Layer(const BackwardArgs& args, const CellLoops<S>& loops, int threads, Workspace& workspace)
        : args(args), steps(args, workspace), scan(args, loops, steps, threads, workspace) {}

    const BackwardArgs& args;
    const Steps steps;
    const BackwardScan<S> scan;
  };

  // Some steps of a chunk, in the order in which they run.
  struct Piece {
    Chunk chunk;
    int64_t from, to, last;  // the piece's first and last step, and the chunk's last
  };

  const int threads_, count_;
  const std::unique_ptr<std::optional<Layer>[]> layers_;  // the highest one first
  int64_t piece_, pieces_per_chunk_;

  static Part alone(const Part& part) { return {part.rows, 0, 1, false}; }

  int64_t steps() const { return layers_[0]->steps.count(); }
  int64_t chunk_steps() const { return layers_[0]->scan.chunk_steps(); }
  int64_t piece_end() const {
    const int64_t whole = steps() / chunk_steps();
    const int64_t left = steps() - whole * chunk_steps();
    return whole * pieces_per_chunk_ + (left + piece_ - 1) / piece_;
  }

  Piece piece_at(const Steps& steps, int64_t j) const {
    const int64_t end = steps.count() - j / pieces_per_chunk_ * chunk_steps();
    const int64_t first = max_of(0, end - chunk_steps());
    const int64_t from = end - 1 - j % pieces_per_chunk_ * piece_;
    return {steps.chunk(first, end - 1), from, max_of(first, from - piece_ + 1), first};
  }

  void run_piece(const Part& part, int64_t j) const {
    const Layer& layer = *layers_[part.rank];
    const Piece piece = piece_at(layer.steps, j);
    const Part own = alone(part);
    const auto phase = [&](Body body) { body(own); };
    layer.scan.run_chunk_steps(0, piece.chunk, piece.from, piece.to, layer.scan.saved(0), phase);
    const Chunk steps = layer.steps.chunk(piece.to, piece.from);
    const int64_t begin = steps.begin - piece.chunk.begin;
    layer.scan.write_input(0, own, piece.chunk, {begin, begin + steps.rows});
    if (part.rank + 1 < count_) {
      complete_output<S>(layers_[part.rank + 1]->args, steps.begin, steps.rows, layer.args.d_x);
    }
  }

  // Calls body(layer, piece) for the layers of which a chunk is complete after the i-th diagonal.
  template <class F>
  void for_each_complete(int64_t i, F body) const {
    for (int k = 0; k < count_; ++k) {
      const int64_t j = i - k;
      if (j < 0 || j >= piece_end()) continue;
      const Piece piece = piece_at(layers_[k]->steps, j);
      if (piece.to == piece.last) body(layers_[k]->scan, piece);
    }
  }

  void finish_chunks(PhaseRunner& runner, int64_t i) const {
    bool any = false;
    for_each_complete(i, [&](const BackwardScan<S>&, const Piece&) { any = true; });
    if (!any) return;
    if constexpr (ChunkRows<S>::kZips) {
      runner.shared_phase([&](const Part& part) {
        for_each_complete(i, [&](const BackwardScan<S>& scan, const Piece& piece) {
          scan.zip(0, part, piece.chunk);
        });
      });
    }
    runner.shared_phase([&](const Part& part) {
      for_each_complete(i, [&](const BackwardScan<S>& scan, const Piece& piece) {
        scan.finish_chunk(0, part, piece.chunk, piece.last);
      });
    });
  }
};

template <class Device, class S>
void backward_stack_dev_impl(const Device& device, const BackwardArgs* layers, int count,
                             const CellLoops<S>& loops) {
  Workspace workspace;
  const BackwardArgs& highest = layers[count - 1];
  const Steps steps(highest, workspace);
  const Work work = BackwardScan<S>::work(highest, steps);
  const StackPlan plan = plan_stack(work, count, device.threads, Pass::kBackward);
  if (plan.threads < 2) {
    for (int k = count; k-- > 0;) {
      backward_dev_impl<Device, S>(device, layers[k], loops);
      if (k > 0) complete_output<S>(layers[k - 1], 0, steps.total(), layers[k].d_x);
    }
    return;
  }
  const BackwardStack<S> stack(layers, count, loops, plan, workspace);
  run_parts(stack, 1, {plan.threads, 1, Split::kRows}, stack.parts(workspace), device.threads,
            workspace);
}

}  // namespace fastrnn::FASTRNN_VARIANT
