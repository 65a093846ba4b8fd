// The forward scan on the CPU: for each step and each block of hidden units, a register tile
// computes W_hh h_{t-1} for all gates of some rows, and the cell finishes these rows from
// registers.
//
// W_ih x comes from input_projection.h. A projection of h (LSTM only) is a second product per step,
// after the first is complete.
#pragma once

#include "input_projection.h"
#include "math.h"
#include "saved.h"
#include "states.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class ForwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int G = Cell::gates;
  using Carried = States<Cell, S>;

 public:
  using Kept = Saved<S, T>;

  ForwardScan(const ForwardArgs& args, const Steps& steps, Workspace& workspace)
      : args_(args),
        steps_(steps),
        projects_(args.weight_hr[0] != nullptr),
        input_(args, steps, G, workspace),
        hh_(args.weight_hh, args.hidden, G, args.proj, args.directions, steps.total(), workspace),
        hr_(args.weight_hr, args.proj, 1, args.hidden, args.directions, steps.total(), workspace),
        states_(args, workspace) {}

  Work work() const {
    const Columns<T>& columns = hh_.columns;
    return {args_.steps,     steps_.mean_rows(),        args_.input + args_.proj, columns.blocks,
            columns.vectors, max_rows(columns.vectors), args_.directions};
  }

  void run(int direction, const Part& part) const {
    const int64_t first = steps_.first(direction);
    pack(direction, part);
    start_states(direction, part, first, nullptr);
    part.wait();
    run_steps(direction, part, first, steps_.count(), kept(direction));
  }

  // The parts of a run. Backward runs single segments again, with null for all results.

  // Threads that split rows share all weights, threads that split units need only their own.
  void pack(int direction, const Part& part) const {
    const Range blocks =
        part.waits_each_step ? part.blocks : share(part.blocks.end, part.rank, part.size);
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
      states_.set(direction, row, features,
                  reset ? nullptr : state_row(args_.h_0, direction, row, args_.proj), units,
                  reset ? nullptr : state_row(args_.c_0, direction, row, args_.hidden));
      // Rows without any step keep their initial states.
      if (row >= steps_.rows(0) && args_.h_n != nullptr) {
        write_final(direction, part, row,
                    states_.h(0) + states_.offset(direction, row) + features.begin);
      }
    }
  }

  // Copies the cell states that go into step t to where the step before it would have kept them.
  void copy_cell(int direction, const Part& part, int64_t t, const Kept& kept) const {
    const int64_t end = min_of(part.rows.end, rows_continued(direction, t));
    const Range units = unit_range(part);
    for (int64_t row = part.rows.begin; row < end; ++row) {
      const int64_t n_before = steps_.offset(t - steps_.stride(direction)) + row;
      std::memcpy(kept.extra_row(n_before) + units.begin,
                  states_.cell() + states_.offset(direction, row) + units.begin,
                  (units.end - units.begin) * sizeof(T));
    }
  }

  // `count` steps from t on.
  void run_steps(int direction, const Part& part, int64_t t, int64_t count,
                 const Kept& kept) const {
    const int64_t ahead = input_.steps_ahead, stride = steps_.stride(direction);
    for (int64_t i = 0; i < count; ++i, t += stride) {
      if (i % ahead == 0) input_.run(direction, part, t, min_of(ahead, count - i));
      const int64_t rows = steps_.rows(t);
      run_rows(direction, part, {t, i, kept}, rows);
      if (projects_) {
        if (part.waits_each_step) part.wait();
        project_hidden(direction, part, t, i, rows);
      }
      const int64_t rows_after = min_of(rows, steps_.rows(t + stride));
      if (args_.h_n != nullptr) finish_rows(direction, part, t, rows_after, rows);
      if (args_.boundaries != nullptr) keep_states(direction, part, t + stride, i + 1);
      if (part.waits_each_step) part.wait();
    }
  }

 private:
  const ForwardArgs& args_;
  const Steps& steps_;
  const bool projects_;
  const InputProjection<S> input_;
  const ForwardWeight<S> hh_, hr_;
  const Carried states_;

  // Row `row` of [D, B, columns]
  template <class Pointer>
  auto state_row(Pointer* base, int direction, int64_t row, int64_t columns) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const S, S>;
    Element* p = static_cast<Element*>(base);
    return p == nullptr ? p : p + (direction * args_.batch + row) * columns;
  }
  // Row `row` of step t of [N, D*columns]
  S* output_row(int direction, int64_t t, int64_t row, int64_t columns) const {
    S* output = static_cast<S*>(args_.output);
    if (output == nullptr) return nullptr;
    return output + ((steps_.offset(t) + row) * args_.directions + direction) * columns;
  }
  // Row `row` of the states that go into step t of [S-1, D, B, P + C], the first in time of a
  // segment or, in the other direction, the last.
  template <class Element>
  Element* boundary_row(Element* base, int direction, int64_t t, int64_t row) const {
    const int64_t k = (steps_.runs_back(direction) ? t + 1 : t) / args_.checkpoint_every - 1;
    const int64_t width = args_.proj + (Cell::has_cell_state ? args_.hidden : 0);
    return base + ((k * args_.directions + direction) * args_.batch + row) * width;
  }

  // Rows of step t that have a step before it, in the order of the direction.
  int64_t rows_continued(int direction, int64_t t) const {
    return min_of(steps_.rows(t), steps_.rows(t - steps_.stride(direction)));
  }

  Kept kept(int direction) const {
    const int64_t own = direction * args_.hidden;
    return {static_cast<S*>(args_.gates[direction]),
            args_.extra == nullptr ? nullptr : static_cast<T*>(args_.extra) + own, G * args_.hidden,
            args_.directions * args_.hidden, 0};
  }

  // The part's own hidden units, blocks of features of a projected h, and features of h.
  Range unit_range(const Part& part) const { return hh_.columns.range(part.blocks); }
  Range hr_blocks(const Part& part) const {
    const int64_t blocks = hr_.columns.blocks;
    return part.waits_each_step ? share(blocks, part.rank, part.size) : Range{0, blocks};
  }
  Range feature_range(const Part& part) const {
    return projects_ ? hr_.columns.range(hr_blocks(part)) : unit_range(part);
  }

  // The final states of a row; h: the part's own features of the last one.
  template <class Element>
  void write_final(int direction, const Part& part, int64_t row, const Element* h) const {
    const Range features = feature_range(part), units = unit_range(part);
    convert(h, state_row(args_.h_n, direction, row, args_.proj) + features.begin,
            features.end - features.begin);
    if constexpr (Cell::has_cell_state) {
      convert(states_.cell() + states_.offset(direction, row) + units.begin,
              state_row(args_.c_n, direction, row, args_.hidden) + units.begin,
              units.end - units.begin);
    }
  }

  // Rows [begin, end) end at step t.
  void finish_rows(int direction, const Part& part, int64_t t, int64_t begin, int64_t end) const {
    const int64_t own = feature_range(part).begin, last = min_of(end, part.rows.end);
    for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
      write_final(direction, part, row, output_row(direction, t, row, args_.proj) + own);
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

  // Step t, the i-th of those that run.
  struct StepContext {
    int64_t t, i;
    const Kept& kept;
  };

  // The first `end` rows of a step. Few rows take several blocks at once, so that their cells, one
  // chain of dependent operations each, run side by side, too.
  void run_rows(int direction, const Part& part, const StepContext& step, int64_t end) const {
    const int vectors = hh_.columns.vectors;
    const F* h = states_.h(step.i);
    const bool is_zero = step.t == steps_.first(direction) && args_.h_0 == nullptr;
    end = min_of(end, part.rows.end);
    const int64_t group = hh_.blocks_at_once(end - part.rows.begin);
    for (int64_t first = part.blocks.begin; first < part.blocks.end; first += group) {
      const int64_t last = min_of(first + group, part.blocks.end);
      V biases[ForwardWeight<S>::kMaxBlocks * kMaxVectors];
      for (int64_t b = first; b < last; ++b) {
        hh_.load_bias(args_.bias_hh[direction], b, biases + (b - first) * vectors);
      }
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V sums[kMaxRows * kMaxVectors];
        if (is_zero) {
          for (int j = 0; j < (last - first) * count * vectors; ++j) sums[j] = V(T(0));
        } else {
          const F* rows[kMaxRows];
          for (int r = 0; r < count; ++r) rows[r] = h + states_.offset(direction, row + r);
          hh_.multiply_blocks(direction, first, last, rows, count, index, sums);
        }
        for (int64_t b = first; b < last; ++b) {
          run_units(direction, step, row, count, b, sums + (b - first) * count * vectors,
                    biases + (b - first) * vectors);
        }
      };
      for_each_tile(part.rows.begin, end, max_rows(vectors), run_tile);
    }
  }

  // The cell on a block of units of some rows.
  void run_units(int direction, const StepContext& step, int64_t row, int count, int64_t block,
                 const V* sums, const V* biases) const {
    const int64_t slot = step.i % input_.steps_ahead;
    for (int u = 0; u < hh_.columns.units; ++u) {
      const int64_t unit = hh_.columns.column(block, u);
      const Tile tile{direction,
                      row,
                      count,
                      unit,
                      sums + u * G,
                      biases + u * G,
                      input_.at(direction, block, slot, row) + u * G * V::lanes};
      if (args_.hidden - unit >= V::lanes) {
        run_cell<true>(step, tile);
      } else if (args_.hidden > unit) {
        run_cell<false>(step, tile);
      }
    }
  }

  // h_t = W_hr times what run_rows left, for the part's rows and features.
  void project_hidden(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const Columns<T>& columns = hr_.columns;
    const Range blocks = hr_blocks(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V sums[kMaxRows * kMaxVectors];
        const F* rows[kMaxRows];
        for (int r = 0; r < count; ++r) {
          rows[r] = states_.unprojected() + states_.offset(direction, row + r);
        }
        hr_.multiply(direction, block, rows, count, index, sums);
        for (int r = 0; r < count; ++r) {
          S* output = output_row(direction, t, row + r, args_.proj);
          F* h_next = states_.h(i + 1) + states_.offset(direction, row + r);
          const bool reset = steps_.resets_after(direction, t, row + r);
          for (int u = 0; u < columns.units; ++u) {
            const int64_t column = columns.column(block, u);
            const int64_t left = min_of(args_.proj - column, V::lanes);
            if (left <= 0) break;
            V h = sums[r * columns.units + u];
            if (left < V::lanes) h = first_lanes(h, left);
            if (output != nullptr) h.store(output + column, left);
            (reset ? V(T(0)) : h).store(h_next + column);
          }
        }
      };
      for_each_tile(part.rows.begin, min_of(end, part.rows.end), max_rows(columns.units), run_tile);
    }
  }

  // One vector of units of some rows.
  struct Tile {
    int direction;
    int64_t row;
    int count;
    int64_t unit;
    const V* sums;       // W_hh h_{t-1}
    const V* bias;       // b_hh
    const T* projected;  // W_ih x_t + b_ih
  };

  // The cell on one tile. Full: no lane lies beyond H.
  template <bool Full>
  void run_cell(const StepContext& step, const Tile& tile) const {
    const int64_t left = args_.hidden - tile.unit;
    const auto store = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };

    const int64_t n = steps_.offset(step.t) + tile.row;
    const int64_t features = args_.directions * args_.hidden;
    const int64_t state = states_.offset(tile.direction, tile.row) + tile.unit;
    const int64_t stride = states_.stride, width = hh_.columns.width;
    const F* h_prev = states_.h(step.i) + state;
    F* h_next = states_.h(step.i + 1) + state;
    T* kept_direct = states_.direct() + state;
    T* cell = states_.cell() + state;
    F* unprojected = states_.unprojected() + state;
    S* output = output_row(tile.direction, step.t, tile.row, args_.hidden);
    const Kept& kept = step.kept;
    S* gates = kept.gates == nullptr ? nullptr : kept.gate_row(n) + tile.unit;
    T* extra = kept.extra == nullptr ? nullptr : kept.extra_row(n) + tile.unit;

    for (int r = 0; r < tile.count; ++r) {
      V x[G], recurrent[G], state_or_extra(T(0)), direct(T(0));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        x[g] = V::load(tile.projected + r * width + g * V::lanes);
        recurrent[g] = tile.sums[r * hh_.columns.vectors + g] + tile.bias[g];
      }
      if constexpr (Carried::kKeepsDirect) {
        direct = V::load(kept_direct + r * stride);
      } else if constexpr (Cell::has_direct_path) {
        direct = V::load(h_prev + r * stride);
      }
      if constexpr (Cell::has_cell_state) state_or_extra = V::load(cell + r * stride);

      V h = Cell::forward(x, recurrent, direct, state_or_extra);
      if constexpr (!Full) h = first_lanes(h, left);

      if constexpr (Cell::saves_gates) {
        if (gates != nullptr) {
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) store(gates + (r * G + g) * args_.hidden, x[g]);
        }
      }
      if constexpr (Cell::has_extra) {
        if (extra != nullptr) store(extra + r * kept.extra_stride, state_or_extra);
      }
      const bool reset = steps_.resets_after(tile.direction, step.t, tile.row + r);
      const V next = reset ? V(T(0)) : h;
      if (projects_) {
        h.store(unprojected + r * stride);
      } else {
        if (output != nullptr) store(output + r * features + tile.unit, h);
        next.store(h_next + r * stride);
        if constexpr (Carried::kKeepsDirect) next.store(kept_direct + r * stride);
      }
      if constexpr (Cell::has_cell_state) {
        (reset ? V(T(0)) : state_or_extra).store(cell + r * stride);
      }
    }
  }
};

template <class Device, class Cell, class S>
void forward_dev_impl(const Device& device, const ForwardArgs& args) {
  Workspace workspace;
  const Steps steps(args, workspace);
  const ForwardScan<Cell, S> scan(args, steps, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
