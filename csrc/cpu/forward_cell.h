// The cell's forward on register tiles: from W_ih x_t + b_ih and W_hh h_{t-1} to h_t, and what
// backward needs of the step.
#pragma once

#include "math.h"
#include "saved.h"
#include "states.h"

namespace fastrnn::FASTRNN_VARIANT {

// Step t, the i-th of those that run.
template <class S>
struct ForwardStep {
  int64_t t, i;
  const Saved<S, Compute<S>>& saved;
};

// A block of units of some rows.
template <class S>
struct ForwardTile {
  int direction;
  int64_t row;
  int count;
  int64_t unit;
  const Vec<Compute<S>>* sums;  // W_hh h_{t-1}: [count][units][G]
  const Vec<Compute<S>>* bias;  // b_hh: [units][G]
  const Compute<S>* projected;  // W_ih x_t + b_ih: [count][units][G][lanes]
};

template <class Cell, class S>
class ForwardCell {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int G = Cell::gates;

 public:
  // `columns`: of the products from which tiles are made.
  ForwardCell(const ForwardArgs& args, const Steps& steps, const States<Cell, S>& states,
              const Columns<T>& columns)
      : args_(args),
        steps_(steps),
        states_(states),
        projects_(args.weight_hr[0] != nullptr),
        units_(columns.units) {}

  void run(const ForwardStep<S>& step, const ForwardTile<S>& tile) const {
    const int64_t left = args_.hidden - tile.unit;
    const int full = static_cast<int>(min_of(units_, left / V::lanes));
    run_rows<true>(step, tile, 0, full);
    if (full < units_ && left > full * V::lanes) run_rows<false>(step, tile, full, full + 1);
  }

  // Results go to memory that nobody has touched for long. Asked for before the product, their
  // cache lines are there when the cell stores to them.
  void prefetch_results(const ForwardStep<S>& step, int direction, int64_t row, int count,
                        int64_t unit) const {
    const int64_t bytes = min_of(units_ * V::lanes, args_.hidden - unit) * sizeof(S);
    for (int r = 0; r < count; ++r) {
      const int64_t n = steps_.offset(step.t) + row + r;
      if (!projects_ && args_.output != nullptr) {
        const int64_t feature = steps_.feature_offset(direction, step.t, row + r, args_.hidden);
        prefetch(at<S>(args_.output, feature + unit), bytes);
      }
      if (Cell::saves_gates && step.saved.gates != nullptr) {
        S* gates = step.saved.gate_row(n) + unit;
        for (int g = 0; g < G; ++g) prefetch(gates + g * args_.hidden, bytes);
      }
      if (Cell::has_extra && step.saved.extra != nullptr) {
        prefetch(step.saved.extra_row(n) + unit, bytes);
      }
    }
  }

 private:
  const ForwardArgs& args_;
  const Steps& steps_;
  const States<Cell, S>& states_;
  const bool projects_;
  const int units_;  // vectors of units in a block

  // Where the first row of a tile lies, and how far the rows are from each other. Null: no such
  // result. Copies of what members say: these would be read again after every store.
  struct Rows {
    const F* h_prev;
    F* h_next;
    T* direct;
    T* cell;
    F* unprojected;
    S* output;
    S* gates;
    T* extra;
    int64_t state_stride, output_stride, extra_stride;
    int units;
  };

  [[gnu::always_inline]] Rows rows_of(const ForwardStep<S>& step,
                                      const ForwardTile<S>& tile) const {
    const int64_t n = steps_.offset(step.t) + tile.row;
    const int64_t state = states_.offset(tile.direction, tile.row) + tile.unit;
    const int64_t feature =
        steps_.feature_offset(tile.direction, step.t, tile.row, args_.hidden) + tile.unit;
    const auto& saved = step.saved;
    return {states_.h(step.i) + state,
            states_.h(step.i + 1) + state,
            states_.direct() + state,
            states_.cell() + state,
            states_.unprojected() + state,
            at(static_cast<S*>(args_.output), feature),
            saved.gates == nullptr ? nullptr : saved.gate_row(n) + tile.unit,
            saved.extra == nullptr ? nullptr : saved.extra_row(n) + tile.unit,
            states_.stride,
            args_.directions * args_.hidden,
            saved.extra_stride,
            kMaxVectors / G == 1 ? 1 : units_};
  }

  // What the cell's forward takes and leaves: see ../cells/registry.h.
  struct CellValues {
    V gate[G], recurrent[G], h_prev, extra, h;
  };

  // Vectors [begin, end) of the block's units. Full: no lane lies beyond H.
  template <bool Full>
  void run_rows(const ForwardStep<S>& step, const ForwardTile<S>& tile, int begin, int end) const {
    const Rows rows = rows_of(step, tile);
    for (int r = 0; r < tile.count; ++r) {
      const bool reset = steps_.resets_after(tile.direction, step.t, tile.row + r);
      for (int u = begin; u < end; ++u) {
        const int64_t left = args_.hidden - tile.unit - u * V::lanes;
        CellValues cell;
        load(tile, rows, r, u, cell);
        cell.h = Cell::forward(cell.gate, cell.recurrent, cell.h_prev, cell.extra);
        if constexpr (!Full) cell.h = first_lanes(cell.h, left);
        store<Full>(rows, r, u, left, reset, cell);
      }
    }
  }

  // Of the u-th vector of units of the tile's r-th row.
  [[gnu::always_inline]] void load(const ForwardTile<S>& tile, const Rows& rows, int r, int u,
                                   CellValues& cell) const {
    const int64_t first = (r * rows.units + u) * G, state = r * rows.state_stride + u * V::lanes;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      cell.gate[g] = V::load(tile.projected + (first + g) * V::lanes);
      cell.recurrent[g] = tile.sums[first + g] + tile.bias[u * G + g];
    }
    cell.h_prev = cell.extra = V(T(0));
    if constexpr (States<Cell, S>::kKeepsDirect) {
      cell.h_prev = V::load(rows.direct + state);
    } else if constexpr (Cell::has_direct_path) {
      cell.h_prev = V::load(rows.h_prev + state);
    }
    if constexpr (Cell::has_cell_state) cell.extra = V::load(rows.cell + state);
  }

  // Reset: nothing goes on to the next step, which begins a new segment.
  template <bool Full>
  [[gnu::always_inline]] void store(const Rows& rows, int r, int u, int64_t left, bool reset,
                                    const CellValues& cell) const {
    const int64_t unit = u * V::lanes, state = r * rows.state_stride + unit;
    const auto store_lanes = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };
    if constexpr (Cell::saves_gates) {
      if (rows.gates != nullptr) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          store_lanes(rows.gates + (r * G + g) * args_.hidden + unit, cell.gate[g]);
        }
      }
    }
    if constexpr (Cell::has_extra) {
      if (rows.extra != nullptr) {
        store_lanes(rows.extra + r * rows.extra_stride + unit, cell.extra);
      }
    }
    if (projects_) {
      cell.h.store(rows.unprojected + state);
    } else {
      const V next = reset ? V(T(0)) : cell.h;
      if (rows.output != nullptr) {
        store_lanes(rows.output + r * rows.output_stride + unit, cell.h);
      }
      next.store(rows.h_next + state);
      if constexpr (States<Cell, S>::kKeepsDirect) next.store(rows.direct + state);
    }
    if constexpr (Cell::has_cell_state) (reset ? V(T(0)) : cell.extra).store(rows.cell + state);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
