// The forward scan on the CPU: for each step and each block of hidden units, a register tile
// computes W_hh h_{t-1} for all gates of some rows, and the cell finishes these rows from
// registers. With layer normalisation the sums are stored, and the cell takes whole rows.
//
// A scan is compiled for each dtype, not for each cell: it calls the cell's own loops, see
// cell_loops.h. W_ih x comes from input_projection.h. A projection of h (LSTM only) is a second
// product per step, after the first is complete.
#pragma once

#include "cell_loops.h"
#include "input_projection.h"

namespace fastrnn::FASTRNN_VARIANT {

// Weights are packed in elements of type W.
template <class S, class W = Factor<S>>
class ForwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int kCellRows = 16;  // at least two blocks of few rows, see blocks_at_once

 public:
  ForwardScan(const ForwardArgs& args, const CellLoops<S>& loops, const Steps& steps,
              Workspace& workspace)
      : args_(args),
        cell_(*args.traits),
        loops_(loops),
        steps_(steps),
        has_products_(cell_.recurrent > 0),
        projects_(args.weight_hr[0] != nullptr),
        input_(args, steps, cell_.gates, workspace, given(args, 0)),
        hh_(args.weight_hh, Columns<T>(args.hidden, cell_.recurrent, cell_.gates), args.proj,
            args.directions, steps.total(), workspace, given(args, input_size())),
        hr_(args.weight_hr, Columns<T>(args.proj), args.hidden, args.directions, steps.total(),
            workspace, given(args, input_size() + hidden_size())),
        states_(args, workspace),
        zoneout_(args, states_.stride, workspace),
        context_{args, steps, states_, zoneout_, projects_, hh_.columns.units} {
    if (!args.layer_norm) return;
    products_ = workspace.take<T>(args.directions * args.batch * product_stride());
  }

  static Work work(const ForwardArgs& args, const Steps& steps) {
    const Columns<T> columns(args.hidden, args.traits->gates);
    const int64_t recurrent = args.traits->recurrent > 0 ? args.proj : 0;
    return {args.steps,      steps.mean_rows(),         args.input + recurrent, columns.blocks,
            columns.vectors, max_rows(columns.vectors), args.directions};
  }

  void run(int direction, PhaseRunner& runner) const {
    const int64_t first = steps_.first(direction);
    runner.phase([&](const Part& part) {
      pack(direction, part);
      start_states(direction, part, first, nullptr);
    });
    run_steps(direction, runner, first, steps_.count(), saved(direction), true);
  }

  // Writes all weights to where `packed` of later scans is to point, unless that is null. Returns
  // how many elements they are.
  int64_t pack_all(W* to) const {
    if (to != nullptr) {
      const auto pack_to = [&](const auto& weight, W* first) {
        for (int d = 0; d < args_.directions; ++d) {
          weight.pack_to(d, {0, weight.columns.blocks}, first + d * weight.packed_size());
        }
      };
      pack_to(input_.weight(), to);
      if (has_products_) pack_to(hh_, to + input_size());
      if (projects_) pack_to(hr_, to + input_size() + hidden_size());
    }
    return input_size() + hidden_size() + (projects_ ? size_of(hr_) : 0);
  }

  // The parts of a run. Backward runs single segments again, with null for all results.

  // Threads that split units need only their own weights, those that split rows share all.
  void pack(int direction, const Part& part) const {
    const Range blocks = share(hh_.columns.blocks, part.rank, part.size);
    input_.pack(direction, blocks);
    hh_.pack(direction, blocks);
    hr_.pack(direction, share(hr_.columns.blocks, part.rank, part.size));
  }

  // Sets the states that go into step t, the first of those that run: rows that have a step before
  // it, in the order of the direction, take what crossed this boundary, the others h_0 and c_0.
  void start_states(int direction, const Part& part, int64_t t, const void* boundaries) const {
    const int64_t continued = rows_continued(direction, t);
    const Range features = feature_range(part), units = unit_range(part);
    for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
      if (row < continued) {
        const T* states = boundary_row(static_cast<const T*>(boundaries), direction, t, row);
        states_.set(direction, row, features, states, units, states + args_.proj);
        continue;
      }
      const bool reset = steps_.resets_before(direction, t, row);
      states_.set(
          direction, row, features,
          reset ? nullptr : state_row(args_.h_0, direction, row, args_.proj), units,
          reset ? nullptr : state_row(args_.c_0, direction, row, cell_.states * args_.hidden));
      // Rows without any step keep their initial states.
      if (row >= steps_.rows(0) && args_.h_n != nullptr) {
        const int64_t own = states_.offset(direction, row) + features.begin;
        if (states_.direct() != nullptr) {
          write_final(direction, part, row, states_.direct() + own);
        } else {
          write_final(direction, part, row, states_.h(0) + own);
        }
      }
    }
  }

  // Copies the cell states that go into step t to where the step before it would have saved them.
  void copy_cell(int direction, const Part& part, int64_t t, const Saved<S, T>& saved) const {
    const int64_t end = min_of(part.rows.end, rows_continued(direction, t));
    const Range units = unit_range(part);
    for (int64_t row = part.rows.begin; row < end; ++row) {
      const int64_t n_before = steps_.offset(t - steps_.stride(direction)) + row;
      for (int k = 0; k < cell_.states; ++k) {
        std::memcpy(saved.extra_row(n_before) + k * args_.hidden + units.begin,
                    states_.cell(direction, row) + k * states_.stride + units.begin,
                    (units.end - units.begin) * sizeof(T));
      }
    }
  }

  // `count` steps from `first` on. Last: nothing follows.
  void run_steps(int direction, PhaseRunner& runner, int64_t first, int64_t count,
                 const Saved<S, T>& saved, bool is_last) const {
    const auto run_all = [&](Phase phase) { run_steps(direction, first, count, saved, phase); };
    runner.step_phases(run_all, is_last, has_products_ || InputProjection<S, W>::kCopies);
  }
  void run_steps(int direction, int64_t first, int64_t count, const Saved<S, T>& saved,
                 Phase phase) const {
    const int64_t ahead = input_.steps_ahead, stride = steps_.stride(direction);
    int64_t t = first;
    for (int64_t i = 0; i < count; ++i, t += stride) {
      if (i % ahead == 0) input_.run(direction, t, min_of(ahead, count - i), phase);
      const int64_t rows = steps_.rows(t), rows_after = min_of(rows, steps_.rows(t + stride));
      const auto finish = [&](const Part& part) {
        if (args_.h_n != nullptr) finish_rows(direction, part, t, rows_after, rows);
        if (args_.boundaries != nullptr) keep_states(direction, part, t + stride, i + 1);
      };
      const ForwardStep<S> step{t, i, saved};
      const auto draw = [&](const Part& part) {
        const Range own{part.rows.begin, min_of(rows, part.rows.end)};
        zoneout_.draw(Zoneout<S>::kC, direction, t, own, unit_range(part));
        if (!projects_) zoneout_.draw(Zoneout<S>::kH, direction, t, own, unit_range(part));
      };
      phase([&](const Part& part) {
        if (!args_.layer_norm) draw(part);
        run_rows(direction, part, step, rows);
        if (!args_.layer_norm && !projects_) finish(part);
      });
      if (args_.layer_norm) {
        phase([&](const Part& part) {
          const Part own = row_part(part, rows);
          draw(own);
          run_whole_rows(direction, own, step, rows);
          if (!projects_) finish(own);
        });
      }
      if (!projects_) continue;
      phase([&](const Part& part) {
        project_hidden(direction, part, t, i, rows);
        finish(part);
      });
    }
  }

  // What all steps leave for backward.
  Saved<S, T> saved(int direction) const {
    return {static_cast<S*>(args_.gates[direction]),
            at(static_cast<T*>(args_.extra), direction * cell_.extras * args_.hidden),
            saved_values(args_) * args_.hidden, args_.directions * cell_.extras * args_.hidden, 0};
  }

 private:
  const ForwardArgs& args_;
  const CellTraits& cell_;
  const CellLoops<S>& loops_;
  const Steps& steps_;
  const bool has_products_;  // of states, so that a step needs all units of another
  const bool projects_;
  const InputProjection<S, W> input_;
  const ForwardWeight<S, W> hh_, hr_;
  const States<S> states_;
  const Zoneout<S> zoneout_;
  const ForwardContext<S> context_;
  T* products_ = nullptr;  // [D, B, product_stride]: W_hh h of the current step, see layer_norm.h

  int64_t product_stride() const { return hh_.columns.blocks * hh_.columns.width; }
  T* product_row(int direction, int64_t row) const {
    return products_ + (direction * args_.batch + row) * product_stride();
  }

  // Packed weights lie one after the other: those of x, of h, and of the projection.
  static const W* given(const ForwardArgs& args, int64_t begin) {
    return at<W>(args.packed, begin);
  }
  int64_t size_of(const ForwardWeight<S, W>& weight) const {
    return args_.directions * weight.packed_size();
  }
  int64_t input_size() const { return size_of(input_.weight()); }
  int64_t hidden_size() const { return has_products_ ? size_of(hh_) : 0; }

  // Row `row` of [D, B, columns]
  template <class Pointer>
  auto state_row(Pointer* base, int direction, int64_t row, int64_t columns) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const S, S>;
    return at(static_cast<Element*>(base), steps_.state_offset(direction, row, columns));
  }
  // Row `row` of step t of [N, D*columns]
  S* output_row(int direction, int64_t t, int64_t row, int64_t columns) const {
    return at(static_cast<S*>(args_.output), steps_.feature_offset(direction, t, row, columns));
  }
  // Row `row` of the states that go into step t of [S-1, D, B, P + C*H], the first in time of a
  // segment or, in the other direction, the last.
  template <class Element>
  Element* boundary_row(Element* base, int direction, int64_t t, int64_t row) const {
    const int64_t k = (steps_.runs_back(direction) ? t + 1 : t) / args_.checkpoint_every - 1;
    const int64_t width = args_.proj + cell_.states * args_.hidden;
    return base + ((k * args_.directions + direction) * args_.batch + row) * width;
  }

  // Rows of step t that have a step before it, in the order of the direction.
  int64_t rows_continued(int direction, int64_t t) const {
    return min_of(steps_.rows(t), steps_.rows(t - steps_.stride(direction)));
  }

  // The part's own hidden units, blocks of features of a projected h, and features of h.
  Range unit_range(const Part& part) const {
    return hh_.columns.range(part.blocks(hh_.columns.blocks));
  }
  Range hr_blocks(const Part& part) const { return part.blocks(hr_.columns.blocks); }
  Range feature_range(const Part& part) const {
    return projects_ ? hr_.columns.range(hr_blocks(part)) : unit_range(part);
  }

  // The final states of a row; h: the part's own features of the last one.
  template <class Element>
  void write_final(int direction, const Part& part, int64_t row, const Element* h) const {
    const Range features = feature_range(part), units = unit_range(part);
    convert(h, state_row(args_.h_n, direction, row, args_.proj) + features.begin,
            features.end - features.begin);
    for (int k = 0; k < cell_.states; ++k) {
      convert(states_.cell(direction, row) + k * states_.stride + units.begin,
              state_row(args_.c_n, direction, row, cell_.states * args_.hidden) + k * args_.hidden +
                  units.begin,
              units.end - units.begin);
    }
  }

  // Rows [begin, end) end at step t.
  void finish_rows(int direction, const Part& part, int64_t t, int64_t begin, int64_t end) const {
    const int64_t feature = feature_range(part).begin, last = min_of(end, part.rows.end);
    for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
      write_final(direction, part, row, output_row(direction, t, row, args_.proj) + feature);
    }
  }

  // Keeps the states that go into step t, the i-th, if it begins a segment.
  void keep_states(int direction, const Part& part, int64_t t, int64_t i) const {
    const int64_t boundary = steps_.runs_back(direction) ? t + 1 : t;
    if (boundary % args_.checkpoint_every != 0) return;
    const int64_t end = min_of(part.rows.end, rows_continued(direction, t));
    for (int64_t row = part.rows.begin; row < end; ++row) {
      T* states = boundary_row(static_cast<T*>(args_.boundaries), direction, t, row);
      states_.get(direction, row, i, feature_range(part), states, unit_range(part),
                  states + args_.proj);
    }
  }

  // The first `end` rows of a step. Few rows take several blocks at once, so that their cells, one
  // chain of dependent operations each, run side by side, too.
  void run_rows(int direction, const Part& part, const ForwardStep<S>& step, int64_t end) const {
    const int vectors = hh_.columns.vectors, height = max_rows(input_.columns().vectors);
    const F* h = states_.h(step.i);
    const bool is_zero =
        !has_products_ || (step.t == steps_.first(direction) && args_.h_0 == nullptr);
    end = min_of(end, part.rows.end);
    const int64_t group = hh_.blocks_at_once(end - part.rows.begin);
    const auto run_blocks = [&](int64_t first, int64_t last, int64_t next) {
      V biases[ForwardWeight<S, W>::kMaxBlocks * kMaxVectors];
      for (int64_t b = first; b < last; ++b) {
        hh_.load_bias(args_.bias_hh[direction], b, biases + (b - first) * vectors);
      }
      // The cell takes the rows of several tiles at once: its constants are loaded once, and its
      // chains of dependent operations overlap.
      V sums[kCellRows * kMaxVectors];
      int64_t begin = part.rows.begin;
      int gathered = 0;
      const auto run_gathered = [&] {
        for (int64_t b = first; b < last; ++b) {
          const int64_t i = b - first;
          if (args_.layer_norm) {
            keep_products(direction, begin, gathered, b, sums + i * gathered * vectors);
            continue;
          }
          loops_.forward(context_, step,
                         {direction, begin, gathered, hh_.columns.column(b, 0),
                          sums + i * gathered * vectors, biases + i * vectors,
                          input_.at(direction, part, b, step.i % input_.steps_ahead, begin)});
        }
        begin += gathered;
        gathered = 0;
      };
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V* tile_sums = sums + gathered * vectors;
        if (is_zero) {
          for (int j = 0; j < (last - first) * count * vectors; ++j) tile_sums[j] = V(T(0));
        } else {
          const TileRows<F> h_prev(count,
                                   [&](int r) { return h + states_.offset(direction, row + r); });
          for (int64_t b = first; b < last && !args_.layer_norm; ++b) {
            context_.prefetch_results(step, direction, row, count, hh_.columns.column(b, 0));
          }
          hh_.multiply_blocks(direction, first, last, next, h_prev.rows, count, index, tile_sums);
        }
        gathered += count;
        if (gathered + height > kCellRows) run_gathered();
      };
      for_each_tile(part.rows.begin, end, height, run_tile);
      if (gathered > 0) run_gathered();
    };
    sweep(part.blocks(hh_.columns.blocks), group, step.i % 2 != 0, run_blocks);
  }

  // The sums of a block, for run_whole_rows.
  void keep_products(int direction, int64_t row, int count, int64_t block, const V* sums) const {
    for (int r = 0; r < count; ++r) {
      T* const to = product_row(direction, row + r) + block * hh_.columns.width;
      for (int v = 0; v < hh_.columns.vectors; ++v, ++sums) sums->store(to + v * V::lanes);
    }
  }

  // The cell on rows of which run_rows left all products.
  void run_whole_rows(int direction, const Part& part, const ForwardStep<S>& step,
                      int64_t end) const {
    const Gains<S> gains(args_, direction);
    const auto* const bias_ih = static_cast<const S*>(args_.bias_ih[direction]);
    const auto* const bias_hh = static_cast<const S*>(args_.bias_hh[direction]);
    const int64_t slot = step.i % input_.steps_ahead;
    // What the cell would save is computed again by backward, from W_hh h.
    Saved<S, T> saved = step.saved;
    saved.gates = nullptr;
    const ForwardStep<S> own{step.t, step.i, saved};
    for (int64_t row = part.rows.begin; row < min_of(end, part.rows.end); ++row) {
      const TileRow<T> x{input_.whole_row(direction, slot, row), cell_.gates};
      const TileRow<T> recurrent{product_row(direction, row), cell_.recurrent};
      if (step.saved.gates != nullptr) {
        store_row(recurrent, step.saved.gate_row(steps_.offset(step.t) + row));
      }
      normalise_row(x, args_.hidden, gains.ih, bias_ih);
      normalise_row(recurrent, args_.hidden, gains.hh, bias_hh);
      if (loops_.forward_row != nullptr) {
        loops_.forward_row(context_, own, {direction, row, gains, x, recurrent});
      } else {
        run_normalised(direction, row, own, x, recurrent);
      }
    }
  }

  void store_row(const TileRow<T>& row, S* to) const {
    for_each_part<T>(args_.hidden, row.parts, [&](int64_t v, int g, int64_t place, int64_t left) {
      store_lanes(V::load(row.at(v, g)), to + place, left);
    });
  }

  // A tile of one row for each block.
  void run_normalised(int direction, int64_t row, const ForwardStep<S>& step, const TileRow<T>& x,
                      const TileRow<T>& recurrent) const {
    const Columns<T>& columns = hh_.columns;
    const V no_bias[kMaxVectors] = {};
    V sums[kMaxVectors];
    for (int64_t block = 0; block < columns.blocks; ++block) {
      const int64_t first = block * columns.units;
      for (int i = 0; i < columns.vectors; ++i) {
        sums[i] = V::load(recurrent.at(first, 0) + i * V::lanes);
      }
      loops_.forward(context_, step,
                     {direction, row, 1, columns.column(block, 0), sums, no_bias, x.at(first, 0)});
    }
  }

  // h_t = W_hr times what run_rows left, for the part's rows and features.
  void project_hidden(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const Columns<T>& columns = hr_.columns;
    zoneout_.draw(Zoneout<S>::kH, direction, t, {part.rows.begin, min_of(part.rows.end, end)},
                  feature_range(part));
    sweep(hr_blocks(part), 1, i % 2 != 0, [&](int64_t block, int64_t, int64_t next) {
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V sums[kMaxRows * kMaxVectors];
        const TileRows<F> unprojected(count, [&](int r) {
          return states_.unprojected() + states_.offset(direction, row + r);
        });
        hr_.multiply(direction, block, next, unprojected.rows, count, index, sums);
        for (int r = 0; r < count; ++r) {
          context_.store_projected({t, i, direction, row + r}, columns, block,
                                   sums + r * columns.units);
        }
      };
      for_each_tile(part.rows.begin, min_of(end, part.rows.end), max_rows(columns.units), run_tile);
    });
  }
};

template <class Device, class S, class W = Factor<S>>
void forward_dev_impl(const Device& device, const ForwardArgs& args, const CellLoops<S>& loops) {
  if constexpr (std::is_same_v<S, float> && std::is_same_v<W, Factor<S>>) {
    if (args.storage == Storage::kBFloat16) {
      return forward_dev_impl<Device, S, BFloat16>(device, args, loops);
    }
  }
  Workspace workspace;
  const Steps steps(args, workspace);
  const ForwardScan<S, W> scan(args, loops, steps, workspace);
  run_scan(args, scan.work(args, steps), device.threads, workspace, scan);
}

// Packs the weights of `args`, a scan of no steps, for all later scans with args.storage, unless
// `to` is null. Returns the number of bytes.
template <class S, class W = Factor<S>>
int64_t pack_layer(const ForwardArgs& args, const CellLoops<S>& loops, void* to) {
  if constexpr (std::is_same_v<S, float> && std::is_same_v<W, Factor<S>>) {
    if (args.storage == Storage::kBFloat16) return pack_layer<S, BFloat16>(args, loops, to);
  }
  Workspace workspace;
  const Steps steps(args, workspace);
  const ForwardScan<S, W> scan(args, loops, steps, workspace);
  return scan.pack_all(static_cast<W*>(to)) * sizeof(W);
}

}  // namespace fastrnn::FASTRNN_VARIANT
