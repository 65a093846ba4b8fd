// With checkpoint_every, forward keeps only the states between segments. Before backward comes to a
// segment, its forward scan runs again.
#pragma once

#include "forward.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class Recomputation {
  using T = Compute<S>;

 public:
  // Whether backward needs more of a step than its output.
  static bool is_needed(const LayerArgs& args) {
    return saved_values(args) > 0 || args.traits->extras > 0;
  }

  Recomputation(const BackwardArgs& args, const CellLoops<S>& loops, const Steps& steps,
                Workspace& workspace)
      : args_(args),
        steps_(steps),
        forward_args_(make_forward_args(args)),
        forward_(forward_args_, loops, steps, workspace),
        rows_(args.steps == 0 ? 0 : segment(0).rows) {
    const int64_t rows = args.directions * rows_;
    gates_ = workspace.take<S>(rows * saved_values(args) * args.hidden);
    extra_ = workspace.take<T>(args.directions * extra_rows() * args.traits->extras * args.hidden);
  }

  int64_t segments() const {
    return (args_.steps + args_.checkpoint_every - 1) / args_.checkpoint_every;
  }
  Chunk segment(int64_t k) const {
    const int64_t first = k * args_.checkpoint_every;
    return steps_.chunk(first, min_of(first + args_.checkpoint_every, args_.steps) - 1);
  }

  // Before the first segment.
  void pack(int direction, const Part& part) const { forward_.pack(direction, part); }

  // What forward would have saved of a segment, until the next segment is computed.
  Saved<const S, const T> run(int direction, PhaseRunner& runner, const Chunk& segment) const {
    const int64_t t = steps_.runs_back(direction) ? segment.last : segment.first;
    const Saved<S, T> saved = buffers(direction, segment);
    runner.phase([&](const Part& part) {
      forward_.start_states(direction, part, t, args_.boundaries);
      if (args_.traits->states > 0) forward_.copy_cell(direction, part, t, saved);
    });
    forward_.run_steps(direction, runner, t, segment.last - segment.first + 1, saved, false);
    return {saved.gates, saved.extra, saved.gate_stride, saved.extra_stride, saved.begin};
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ForwardArgs forward_args_;
  const ForwardScan<S> forward_;
  const int64_t rows_;  // of the largest segment: no step has more rows than one before it
  S* gates_;            // [D, rows, K*H], see saved_values
  T* extra_;            // [D, rows + B, E*H]

  static ForwardArgs make_forward_args(const BackwardArgs& args) {
    ForwardArgs forward{};
    static_cast<LayerArgs&>(forward) = args;
    return forward;
  }

  // The step before the first one, in the order of the direction, has room too: backward reads its
  // c_t there.
  int64_t extra_rows() const { return rows_ + (args_.traits->states > 0 ? args_.batch : 0); }
  Saved<S, T> buffers(int direction, const Chunk& segment) const {
    const int64_t gate_stride = saved_values(args_) * args_.hidden;
    const int64_t extra_stride = args_.traits->extras * args_.hidden;
    T* extra = extra_ + direction * extra_rows() * extra_stride;
    if (!steps_.runs_back(direction)) extra += (extra_rows() - rows_) * extra_stride;
    return {gates_ + direction * rows_ * gate_stride, extra, gate_stride, extra_stride,
            segment.begin};
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
