// The backward scan on the CPU, in the shape of the forward one: a register tile computes the part
// of dh_t that comes through W_hh from the following step, and the cell computes the gate gradients
// from dh_t. The gradients of the input and of the weights are computed from those of a chunk of
// steps, while they are in cache. Where h is projected, its gradient is completed first, and a
// second product per step computes that of the units.
#pragma once

#include <optional>

#include "cell_loops.h"
#include "input_gradient.h"
#include "layer_gradients.h"
#include "layer_norm_gradient.h"
#include "recomputation.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class BackwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using SavedSteps = Saved<const S, const T>;
  // Rows of gate gradients in a chunk: a panel of as many rows, one register tile wide, fits into
  // L1.
  static constexpr int64_t kChunkRows = 128;
  static constexpr int64_t kNoStep = -1;

 public:
  BackwardScan(const BackwardArgs& args, const CellLoops<S>& loops, const Steps& steps, int threads,
               Workspace& workspace)
      : args_(args),
        cell_(*args.traits),
        loops_(loops),
        steps_(steps),
        has_products_(cell_.recurrent > 0),
        projects_(args.weight_hr[0] != nullptr),
        gate_columns_(cell_.recurrent * args.hidden),
        chunk_steps_(max_of(1, min_of(args.steps, kChunkRows / max_of(1, args.batch)))),
        // One step alone has none after it.
        hh_(args.weight_hh, has_products_ && (args.steps > 1 || args.d_h_0 != nullptr),
            gate_columns_, args.proj, args.directions, steps.total(), workspace),
        hr_(args.weight_hr, projects_, args.proj, args.hidden, args.directions, steps.total(),
            workspace),
        chunk_gradients_(args, chunk_steps_ * args.batch, workspace),
        stride_(chunk_gradients_.stride),
        input_gradient_(args, steps, chunk_gradients_, workspace),
        layer_gradients_(args, steps, chunk_gradients_, is_one_chunk(), kSharedParts * threads,
                         workspace),
        context_(args, steps, chunk_gradients_, workspace) {
    if (recomputes()) recomputation_.emplace(args, loops, steps, workspace);
    if (args.layer_norm) norm_.emplace(args, steps, chunk_gradients_, workspace);
    carry_d_gates_ = workspace.take<F>(args.directions * args.batch * stride_);
    zeros_ = workspace.take<F>(stride_);
    std::memset(zeros_, 0, stride_ * sizeof(F));
  }

  static Work work(const BackwardArgs& args, const Steps& steps) {
    const Columns<T> columns(args.proj);
    return {args.steps,
            steps.mean_rows(),
            args.traits->gates * args.hidden * 4,  // every weight is used twice
            columns.blocks,
            columns.units,
            max_rows(columns.units),
            args.directions,
            args.batch_sizes != nullptr};
  }

  void run(int direction, PhaseRunner& runner) const {
    runner.phase([&](const Part& part) { start(direction, part); });
    if (recomputation_) {
      run_segments(direction, runner);
    } else {
      run_steps(direction, runner, 0, steps_.count(), saved(direction));
    }
    runner.last_phase([&](const Part& part) { write(direction, part); });
  }

  // The parts of a run.

  void start(int direction, const Part& part) const {
    pack(direction, part);
    layer_gradients_.start(direction, part);
    if (norm_) norm_->start(direction, part);
  }

  // Steps [from, to], against the order of the direction, of a chunk in which those after them are
  // done.
  void run_chunk_steps(int direction, const Chunk& chunk, int64_t from, int64_t to,
                       const SavedSteps& saved, Phase phase) const {
    const int64_t stride = steps_.stride(direction);
    for (int64_t t = from; t != to - stride; t -= stride) {
      run_step(direction, chunk, t, saved, phase);
    }
  }

  // The gradients of x of some rows of a chunk whose steps are done.
  void write_input(int direction, const Part& part, const Chunk& chunk, Range rows) const {
    input_gradient_.write(direction, part, chunk, rows);
  }

  // Where products take pairs of rows: before what follows.
  void zip(int direction, const Part& part, const Chunk& chunk) const {
    chunk_gradients_.zip(direction, chunk.rows, part.rank, part.size);
  }

  // What a complete chunk, of which `last` was the last step to run, leaves beside d_x.
  void finish_chunk(int direction, const Part& part, const Chunk& chunk, int64_t last) const {
    if (!norm_) layer_gradients_.add_sums(direction, part, chunk);
    layer_gradients_.add(direction, part, chunk);
    keep_d_gates(direction, part, chunk, last);
  }

  void write(int direction, const Part& part) const {
    const auto no_d_gates = [](int64_t) { return nullptr; };
    write_initial(direction, part, kNoStep, no_d_gates, steps_.rows(0), args_.batch);
    layer_gradients_.write(direction, part);
    if (norm_) norm_->write(direction, part);
  }

  int64_t chunk_steps() const { return chunk_steps_; }

  // What forward saved of all steps.
  SavedSteps saved(int direction) const {
    return {static_cast<const S*>(args_.gates[direction]),
            at<T>(args_.extra, direction * cell_.extras * args_.hidden),
            saved_values(args_) * args_.hidden, args_.directions * cell_.extras * args_.hidden, 0};
  }

 private:
  const BackwardArgs& args_;
  const CellTraits& cell_;
  const CellLoops<S>& loops_;
  const Steps& steps_;
  const bool has_products_;  // of states, see ForwardScan
  const bool projects_;
  const int64_t gate_columns_;  // of W_hh
  const int64_t chunk_steps_;
  const BackwardWeight<S> hh_, hr_;
  const ChunkGradients<S> chunk_gradients_;
  const int64_t stride_;  // between rows of gate gradients
  const InputGradient<S> input_gradient_;
  const LayerGradients<S> layer_gradients_;
  const BackwardContext<S> context_;
  // The gate gradients of the step of a chunk that is first in the order of the direction, for the
  // next chunk: [D, B, stride].
  F* carry_d_gates_;
  F* zeros_;  // the gate gradients of a step beyond a reset
  std::optional<Recomputation<S>> recomputation_;
  std::optional<LayerNormGradient<S>> norm_;

  bool recomputes() const {
    return args_.checkpoint_every > 0 && Recomputation<S>::is_needed(args_);
  }
  bool is_one_chunk() const {
    const bool is_one_segment = !recomputes() || args_.steps <= args_.checkpoint_every;
    return args_.steps > 0 && args_.steps <= chunk_steps_ && is_one_segment;
  }

  Range hh_blocks(const Part& part) const { return part.blocks(hh_.columns.blocks); }
  Range hr_blocks(const Part& part) const { return part.blocks(hr_.columns.blocks); }
  // The part's own units of the cell state.
  Range unit_range(const Part& part) const {
    return projects_ ? hr_.columns.range(hr_blocks(part)) : hh_.columns.range(hh_blocks(part));
  }

  // Threads that split units need only their own weights, those that split rows share all.
  void pack(int direction, const Part& part) const {
    for (const BackwardWeight<S>* weight : {&hh_, &hr_}) {
      weight->pack(direction, share(weight->columns.blocks, part.rank, part.size));
    }
    input_gradient_.pack(direction, part);
    if (recomputation_) recomputation_->pack(direction, part);
    if (norm_) norm_->pack(direction, part);
  }

  void run_segments(int direction, PhaseRunner& runner) const {
    const int64_t segments = recomputation_->segments();
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t k = steps_.runs_back(direction) ? i : segments - 1 - i;
      const Chunk segment = recomputation_->segment(k);
      const SavedSteps saved = recomputation_->run(direction, runner, segment);
      run_steps(direction, runner, segment.first, segment.last + 1, saved);
    }
  }

  // Steps [first, end) in time, against the order of the direction, chunk by chunk.
  void run_steps(int direction, PhaseRunner& runner, int64_t first, int64_t end,
                 const SavedSteps& saved) const {
    const int64_t stride = steps_.stride(direction);
    int64_t from = stride == 1 ? end - 1 : first;
    for (int64_t left = end - first; left > 0; left -= chunk_steps_) {
      const int64_t last = from - (min_of(chunk_steps_, left) - 1) * stride;
      const Chunk chunk = steps_.chunk(min_of(from, last), max_of(from, last));
      const auto run_chunk = [&](Phase phase) {
        if (norm_) norm_->project(direction, chunk, last, phase);
        run_chunk_steps(direction, chunk, from, last, saved, phase);
      };
      runner.step_phases(run_chunk, false, has_products_);
      from = last - stride;
      // The gate gradients of the chunk are complete.
      if (norm_) {
        runner.shared_phase([&](const Part& part) {
          layer_gradients_.add_sums(direction, part, chunk);
          norm_->add(direction, part, chunk, saved);
        });
        runner.shared_phase([&](const Part& part) { norm_->finish_input(direction, part, chunk); });
      }
      if constexpr (ChunkRows<S>::kZips) {
        runner.shared_phase([&](const Part& part) { zip(direction, part, chunk); });
      }
      runner.shared_phase([&](const Part& part) {
        write_input(direction, part, chunk, {0, chunk.rows});
        finish_chunk(direction, part, chunk, last);
      });
    }
  }

  void run_step(int direction, const Chunk& chunk, int64_t t, const SavedSteps& saved,
                Phase phase) const {
    const int64_t stride = steps_.stride(direction), rows = steps_.rows(t);
    const int64_t next = t + stride, before = t - stride;
    // The rows that have a step after t, and before t, in the order of the direction.
    const int64_t rows_after = min_of(rows, steps_.rows(next));
    const int64_t rows_before = min_of(rows, steps_.rows(before));
    const F* d_gates_after = nullptr;
    if (has_products_ && rows_after > 0) {
      const bool is_in_chunk = chunk.first <= next && next <= chunk.last;
      d_gates_after = is_in_chunk ? d_gates_of(direction, chunk, next)
                                  : carry_d_gates_ + direction * args_.batch * stride_;
    }
    // At most one of the two lies between 0 and rows: in one direction rows end before others do,
    // in the other they begin later.
    const int64_t middle = rows_after > 0 && rows_after < rows ? rows_after : rows_before;
    const auto step = [&](bool has_after, bool has_before) -> BackwardStep<S> {
      return {t, before, next, has_after, has_before, d_gates_after, chunk, saved};
    };
    const BackwardStep<S> first_rows = step(rows_after > 0, rows_before > 0);
    const BackwardStep<S> other_rows = step(rows_after == rows, rows_before == rows);
    using Kept = Zoneout<S>;
    const auto draw = [&](typename Kept::State state, const Part& part, Range columns) {
      const Range own{part.rows.begin, min_of(part.rows.end, rows)};
      context_.zoneout.draw(state, direction, t, own, columns);
    };
    phase([&](const Part& part) {
      if (projects_ || !norm_) draw(Kept::kH, part, hh_.columns.range(hh_blocks(part)));
      if (!projects_ && !norm_) draw(Kept::kC, part, unit_range(part));
      run_rows(direction, part, first_rows, 0, middle);
      run_rows(direction, part, other_rows, middle, rows);
    });
    if (projects_) {
      phase([&](const Part& part) {
        if (!norm_) draw(Kept::kC, part, unit_range(part));
        run_projected_rows(direction, part, first_rows, 0, middle);
        run_projected_rows(direction, part, other_rows, middle, rows);
      });
    }
    if (norm_) {
      phase([&](const Part& part) {
        const Part own = row_part(part, rows);
        if (!projects_) draw(Kept::kH, own, {0, args_.hidden});
        draw(Kept::kC, own, {0, args_.hidden});
        run_whole_rows(direction, own, first_rows, 0, middle);
        run_whole_rows(direction, own, other_rows, middle, rows);
      });
    }
    if (rows_before == rows) return;
    // For the other rows, t is the first step.
    phase([&](const Part& part) {
      const F* d_gates = d_gates_of(direction, chunk, t);
      const auto first_d_gates = [&](int64_t row) {
        return steps_.resets_before(direction, t, row) ? zeros_ : d_gates + row * stride_;
      };
      write_initial(direction, part, t, first_d_gates, rows_before, rows);
    });
  }

  // The gradients of W_hh h_{t-1} of a step of the chunk.
  const F* d_gates_of(int direction, const Chunk& chunk, int64_t t) const {
    return chunk_gradients_.recurrent.factors(direction, steps_.offset(t) - chunk.begin);
  }

  // Calls finish(row, count, column, sums) for every block of columns of h of every tile of rows
  // [begin, end); sums[r * units + u] is W_hh^T times the gate gradients `d_gates(row)`, or zero
  // without any. Before that, fetch(row, count, column) may prefetch what finish will read.
  template <class DGates, class Fetch, class Finish>
  void for_each_column(int direction, const Part& part, int64_t t, bool has_d_gates, DGates d_gates,
                       int64_t begin, int64_t end, Fetch fetch, Finish finish) const {
    const Columns<T>& columns = hh_.columns;
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    sweep(hh_blocks(part), 1, t % 2 != 0, [&](int64_t block, int64_t, int64_t next) {
      for_each_tile(begin, end, max_rows(columns.units), [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        if (has_products_ && has_d_gates) {
          fetch(row, count, columns.column(block, 0));
          const TileRows<F> left(count, [&](int r) { return d_gates(row + r); });
          hh_.multiply(direction, block, next, left.rows, count, i, sums);
          if (args_.h_mask != nullptr) [[unlikely]] {
            mask_sums(direction, row, count, columns.column(block, 0), sums);
          }
        } else {
          for (int j = 0; j < count * columns.units; ++j) sums[j] = V(T(0));
        }
        finish(row, count, columns.column(block, 0), sums);
      });
    });
  }

  // Calls body(r, u, column, lanes) for the vectors of a block of columns of h.
  template <class Body>
  void for_each_vector(int count, int64_t column, Body body) const {
    for (int r = 0; r < count; ++r) {
      for (int u = 0; u < hh_.columns.units; ++u) {
        const int64_t own = column + u * V::lanes;
        if (own < args_.proj) body(r, u, own, min_of(args_.proj - own, V::lanes));
      }
    }
  }

  // W_hh multiplied a masked h.
  void mask_sums(int direction, int64_t row, int count, int64_t column, V* sums) const {
    for_each_vector(count, column, [&](int r, int u, int64_t own, int64_t left) {
      const int64_t place = steps_.state_offset(direction, row + r, args_.proj) + own;
      V& sum = sums[r * hh_.columns.units + u];
      sum = sum * V::load(at<S>(args_.h_mask, place), left);
    });
  }

  void run_rows(int direction, const Part& part, const BackwardStep<S>& step, int64_t begin,
                int64_t end) const {
    const auto fetch = [&](int64_t row, int count, int64_t unit) {
      const int64_t bytes = hh_.columns.width * sizeof(T);
      for (int r = 0; r < count; ++r) {
        if (cell_.saves > 0) {
          const S* gates = step.saved.gate_row(steps_.offset(step.t) + row + r) + unit;
          for (int k = 0; k < cell_.saves; ++k) prefetch(gates + k * args_.hidden, bytes);
        }
        if (args_.d_output != nullptr) {
          const int64_t feature = steps_.feature_offset(direction, step.t, row + r, args_.proj);
          prefetch(at<S>(args_.d_output, feature + unit), bytes);
        }
      }
    };
    const auto d_gates = [&](int64_t row) {
      return steps_.resets_after(direction, step.t, row) ? zeros_
                                                         : step.d_gates_after + row * stride_;
    };
    const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
      const BackwardTile<S> tile{direction, row, count, column, sums, hh_.columns.units};
      projects_ ? finish_projected(step, tile) : run_units(step, tile);
    };
    for_each_column(direction, part, step.t, step.has_after, d_gates, begin, end, fetch, finish);
  }

  // The cell on a tile; or, where it needs whole rows, the tile is kept for run_whole_rows.
  void run_units(const BackwardStep<S>& step, const BackwardTile<S>& tile) const {
    if (!norm_) return loops_.backward(context_, step, tile);
    const V* sums = tile.sums;
    for (int r = 0; r < tile.count; ++r) {
      T* const to = norm_->d_hidden(tile.direction, tile.row + r) + tile.column;
      for (int v = 0; v < tile.vectors; ++v, ++sums) sums->store(to + v * V::lanes);
    }
  }

  void run_whole_rows(int direction, const Part& part, const BackwardStep<S>& step, int64_t begin,
                      int64_t end) const {
    const Gains<S> gains(args_, direction);
    const int64_t last = min_of(end, part.rows.end);
    for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
      const S* const r = step.saved.gate_row(steps_.offset(step.t) + row);
      const BackwardRow<S> whole = norm_->start_row(direction, step.chunk, step.t, row, gains, r);
      loops_.backward_row(context_, step, whole);
      norm_->finish_row(whole, step.chunk, step.t, r);
    }
  }

  // Completes the gradient of a projected h_t.
  void finish_projected(const BackwardStep<S>& step, const BackwardTile<S>& tile) const {
    const ChunkRows<S>& rows = chunk_gradients_.projected;
    for_each_vector(tile.count, tile.column, [&](int r, int u, int64_t column, int64_t left) {
      const int64_t row = tile.row + r, local = step.chunk_row(steps_, row);
      V dh = tile.sums[r * tile.vectors + u];
      const int64_t own_state = steps_.state_offset(tile.direction, row, args_.proj) + column;
      T* carried = at(context_.carry_h, own_state);
      if (step.has_after) {
        if (carried != nullptr) dh = dh + V::load(carried, left);
        const Edge<S>& edge = context_.edge;
        if (!edge.is_plain()) dh = edge(dh, steps_.offset(step.after) + row);
      }
      if (args_.d_output != nullptr) {
        const int64_t feature = steps_.feature_offset(tile.direction, step.t, row, args_.proj);
        dh = dh + V::load(at<S>(args_.d_output, feature + column), left);
      }
      if (!step.has_after && args_.d_h_n != nullptr) {
        const int64_t state = steps_.state_offset(tile.direction, row, args_.proj);
        dh = dh + V::load(at<S>(args_.d_h_n, state + column), left);
      }
      if (left < V::lanes) dh = first_lanes(dh, left);
      if (carried != nullptr) {
        const T* weights = context_.zoneout.weights(Zoneout<S>::kH, tile.direction, row);
        const V kept = V::load(weights + column) * dh;
        dh = dh - kept;
        const bool reset = steps_.resets_before(tile.direction, step.t, row);
        (reset ? V(T(0)) : kept).store(carried, left);
      }
      dh.store(rows.values(tile.direction, local) + column);
      if constexpr (ChunkRows<S>::kNarrows) {
        dh.store(rows.factors(tile.direction, local) + column);
      }
    });
  }

  // The units' gradients, W_hr^T times that of the projected h_t, and the cell on them.
  void run_projected_rows(int direction, const Part& part, const BackwardStep<S>& step,
                          int64_t begin, int64_t end) const {
    const Columns<T>& columns = hr_.columns;
    sweep(hr_blocks(part), 1, step.t % 2 != 0, [&](int64_t block, int64_t, int64_t next) {
      const auto run_tile = [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        const int64_t local = step.chunk_row(steps_, row);
        const TileRows<F> d_projected(
            count, [&](int r) { return chunk_gradients_.projected.factors(direction, local + r); });
        hr_.multiply(direction, block, next, d_projected.rows, count, i, sums);
        run_units(step, {direction, row, count, columns.column(block, 0), sums, columns.units});
      };
      for_each_tile(max_of(begin, part.rows.begin), min_of(end, part.rows.end),
                    max_rows(columns.units), run_tile);
    });
  }

  // The gradients of the initial states of rows whose first step, t, is done; d_gates(row) are
  // those of the row's first step. Rows without steps have none: their final states were the
  // initial ones.
  template <class DGates>
  void write_initial(int direction, const Part& part, int64_t t, DGates d_gates, int64_t begin,
                     int64_t end) const {
    const bool had_steps = t != kNoStep;
    if (args_.d_h_0 != nullptr) {
      const auto fetch = [](int64_t, int, int64_t) {};
      const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
        for_each_vector(count, column, [&](int r, int u, int64_t own, int64_t left) {
          const int64_t state = steps_.state_offset(direction, row + r, args_.proj) + own;
          V dh = sums[r * hh_.columns.units + u];
          if (!had_steps) {
            dh = args_.d_h_n == nullptr ? V(T(0)) : V::load(at<S>(args_.d_h_n, state), left);
          } else {
            if (context_.carry_h != nullptr) dh = dh + V::load(context_.carry_h + state, left);
            const Edge<S>& edge = context_.edge;
            if (!edge.is_plain()) dh = edge(dh, steps_.offset(t) + row + r);
          }
          dh.store(static_cast<S*>(args_.d_h_0) + state, left);
        });
      };
      for_each_column(direction, part, t, had_steps, d_gates, begin, end, fetch, finish);
    }
    if (cell_.states > 0 && args_.d_c_0 != nullptr) {
      write_initial_cell(direction, part, had_steps, begin, end);
    }
  }

  void write_initial_cell(int direction, const Part& part, bool had_steps, int64_t begin,
                          int64_t end) const {
    const Range units = unit_range(part);
    const int64_t count = units.end - units.begin, last = min_of(end, part.rows.end);
    for (int64_t i = max_of(begin, part.rows.begin) * cell_.states; i < last * cell_.states; ++i) {
      const int64_t state =
          (direction * args_.batch * cell_.states + i) * args_.hidden + units.begin;
      S* d_c_0 = static_cast<S*>(args_.d_c_0) + state;
      if (had_steps) {
        convert(context_.carry_c + state, d_c_0, count);
      } else if (args_.d_c_n != nullptr) {
        convert(at<S>(args_.d_c_n, state), d_c_0, count);
      } else {
        std::memset(d_c_0, 0, count * sizeof(S));
      }
    }
  }

  // The next chunk overwrites the gate gradients of step `last`, which it needs.
  void keep_d_gates(int direction, const Part& part, const Chunk& chunk, int64_t last) const {
    if (!has_products_) return;
    const Range rows = share(steps_.rows(last), part.rank, part.size);
    F* target = carry_d_gates_ + direction * args_.batch * stride_;
    std::memcpy(target + rows.begin * stride_,
                d_gates_of(direction, chunk, last) + rows.begin * stride_,
                (rows.end - rows.begin) * stride_ * sizeof(F));
  }
};

template <class Device, class S>
void backward_dev_impl(const Device& device, const BackwardArgs& args, const CellLoops<S>& loops) {
  Workspace workspace;
  const Steps steps(args, workspace);
  const BackwardScan<S> scan(args, loops, steps, device.threads, workspace);
  run_scan(args, scan.work(args, steps), device.threads, workspace, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
