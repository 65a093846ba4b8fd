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

// One vector of units of some rows.
template <class S>
struct ForwardTile {
  int direction;
  int64_t row;
  int count;
  int64_t unit;
  const Vec<Compute<S>>* sums;  // W_hh h_{t-1}: [count][vectors of the block]
  const Vec<Compute<S>>* bias;  // b_hh: [G]
  const Compute<S>* projected;  // W_ih x_t + b_ih: [count][width of the block]
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
        sums_stride_(columns.vectors),
        projected_stride_(columns.width) {}

  void run(const ForwardStep<S>& step, const ForwardTile<S>& tile) const {
    if (args_.hidden - tile.unit >= V::lanes) {
      run_rows<true>(step, tile);
    } else if (args_.hidden > tile.unit) {
      run_rows<false>(step, tile);
    }
  }

 private:
  const ForwardArgs& args_;
  const Steps& steps_;
  const States<Cell, S>& states_;
  const bool projects_;
  const int sums_stride_;
  const int64_t projected_stride_;

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
    int64_t state_stride, output_stride, extra_stride, projected_stride;
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
            projected_stride_};
  }

  // What the cell's forward takes and leaves: see ../cells/registry.h.
  struct CellValues {
    V gate[G], recurrent[G], h_prev, extra, h;
  };

  // Full: no lane lies beyond H.
  template <bool Full>
  void run_rows(const ForwardStep<S>& step, const ForwardTile<S>& tile) const {
    const Rows rows = rows_of(step, tile);
    const int64_t left = args_.hidden - tile.unit;
    for (int r = 0; r < tile.count; ++r) {
      CellValues cell;
      load(tile, rows, r, cell);
      cell.h = Cell::forward(cell.gate, cell.recurrent, cell.h_prev, cell.extra);
      if constexpr (!Full) cell.h = first_lanes(cell.h, left);
      store<Full>(step, tile, rows, r, left, cell);
    }
  }

  // Of the tile's r-th row.
  [[gnu::always_inline]] void load(const ForwardTile<S>& tile, const Rows& rows, int r,
                                   CellValues& cell) const {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      cell.gate[g] = V::load(tile.projected + r * rows.projected_stride + g * V::lanes);
      cell.recurrent[g] = tile.sums[r * sums_stride_ + g] + tile.bias[g];
    }
    cell.h_prev = cell.extra = V(T(0));
    if constexpr (States<Cell, S>::kKeepsDirect) {
      cell.h_prev = V::load(rows.direct + r * rows.state_stride);
    } else if constexpr (Cell::has_direct_path) {
      cell.h_prev = V::load(rows.h_prev + r * rows.state_stride);
    }
    if constexpr (Cell::has_cell_state) cell.extra = V::load(rows.cell + r * rows.state_stride);
  }

  template <bool Full>
  [[gnu::always_inline]] void store(const ForwardStep<S>& step, const ForwardTile<S>& tile,
                                    const Rows& rows, int r, int64_t left,
                                    const CellValues& cell) const {
    const int64_t state = r * rows.state_stride;
    const auto store_lanes = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };
    if constexpr (Cell::saves_gates) {
      if (rows.gates != nullptr) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          store_lanes(rows.gates + (r * G + g) * args_.hidden, cell.gate[g]);
        }
      }
    }
    if constexpr (Cell::has_extra) {
      if (rows.extra != nullptr) store_lanes(rows.extra + r * rows.extra_stride, cell.extra);
    }
    // Nothing goes on to a step that begins a new segment.
    const bool reset = steps_.resets_after(tile.direction, step.t, tile.row + r);
    if (projects_) {
      cell.h.store(rows.unprojected + state);
    } else {
      const V next = reset ? V(T(0)) : cell.h;
      if (rows.output != nullptr) {
        store_lanes(rows.output + r * rows.output_stride, cell.h);
      }
      next.store(rows.h_next + state);
      if constexpr (States<Cell, S>::kKeepsDirect) next.store(rows.direct + state);
    }
    if constexpr (Cell::has_cell_state) (reset ? V(T(0)) : cell.extra).store(rows.cell + state);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
