// The cell's backward on register tiles: from the gradient of h_t to the gradients of the gates,
// and to what a step hands to the one before it.
#pragma once

#include "chunk_gradients.h"
#include "math.h"
#include "saved.h"

namespace fastrnn::FASTRNN_VARIANT {

// Step t among its neighbours in the order of the direction, as some of its rows have them.
template <class S>
struct BackwardStep {
  int64_t t, before;
  bool has_after, has_before;
  const Factor<S>* d_gates_after;  // the gate gradients of the step after t
  const Chunk& chunk;
  const Saved<const S, const Compute<S>>& saved;

  int64_t chunk_row(const Steps& steps, int64_t row) const {
    return steps.offset(t) + row - chunk.begin;
  }
};

// One vector of columns of some rows; sums[r * stride] is what reaches them by a product.
template <class S>
struct BackwardTile {
  int direction;
  int64_t row;
  int count;
  int64_t column;
  const Vec<Compute<S>>* sums;
  int stride;
};

template <class Cell, class S>
class BackwardCell {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int G = Cell::gates;

 public:
  BackwardCell(const BackwardArgs& args, const Steps& steps,
               const ChunkGradients<Cell, S>& chunk_gradients, Workspace& workspace)
      : args_(args),
        steps_(steps),
        chunk_gradients_(chunk_gradients),
        projects_(args.weight_hr[0] != nullptr) {
    const size_t size = args.directions * args.batch * args.hidden;
    carry_h_ = workspace.take<T>(Cell::has_direct_path ? size : 0);
    carry_c_ = workspace.take<T>(Cell::has_cell_state ? size : 0);
  }

  // What a step hands to the one before it, [D, B, H]: the direct part of the gradient of h, of
  // cells with a direct path, and the gradient of the cell state.
  const T* carry_h() const { return carry_h_; }
  const T* carry_c() const { return carry_c_; }

  void run(const BackwardStep<S>& step, const BackwardTile<S>& tile) const {
    if (args_.hidden - tile.column >= V::lanes) {
      run_rows<true>(step, tile);
    } else if (args_.hidden > tile.column) {
      run_rows<false>(step, tile);
    }
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<Cell, S>& chunk_gradients_;
  const bool projects_;
  T* carry_h_;
  T* carry_c_;

  // What the cell's backward takes for one vector of units of one row.
  struct CellInputs {
    V gate[G], h_prev, h, extra_prev, extra, dh, d_extra;
  };

  // Full: no lane lies beyond H.
  template <bool Full>
  void run_rows(const BackwardStep<S>& step, const BackwardTile<S>& tile) const {
    const int64_t left = args_.hidden - tile.column;
    const auto store = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };
    for (int r = 0; r < tile.count; ++r) {
      const int64_t row = tile.row + r;
      const bool reset = steps_.resets_before(tile.direction, step.t, row);
      CellInputs in;
      load_inputs<Full>(step, tile, r, reset, in);
      V dx[G], dr[G];
      const V direct = Cell::backward(in.gate, in.h_prev, in.h, in.extra_prev, in.extra, in.dh,
                                      in.d_extra, dx, dr);

      const int64_t local = step.chunk_row(steps_, row);
      const int64_t state = steps_.state_offset(tile.direction, row, args_.hidden) + tile.column;
      if constexpr (Cell::has_cell_state) {
        if (projects_) {
          Cell::hidden(in.gate, in.extra)
              .store(chunk_gradients_.hidden(tile.direction, local) + tile.column);
        }
      }
      const auto store_gates = [&](const ChunkRows<S>& rows, const V(&d_gates)[G]) {
        T* values = rows.values(tile.direction, local) + tile.column;
        F* factors = rows.factors(tile.direction, local) + tile.column;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          store(values + g * args_.hidden, d_gates[g]);
          if constexpr (ChunkRows<S>::kNarrows) store(factors + g * args_.hidden, d_gates[g]);
        }
      };
      store_gates(chunk_gradients_.input, dx);
      if constexpr (Cell::splits_gradient) store_gates(chunk_gradients_.recurrent, dr);
      if constexpr (Cell::has_direct_path) store(carry_h_ + state, reset ? V(T(0)) : direct);
      if constexpr (Cell::has_cell_state) store(carry_c_ + state, reset ? V(T(0)) : in.d_extra);
    }
  }

  // Of the tile's r-th row. Reset: nothing of the step before goes into this one.
  template <bool Full>
  [[gnu::always_inline]] void load_inputs(const BackwardStep<S>& step, const BackwardTile<S>& tile,
                                          int r, bool reset, CellInputs& in) const {
    const int64_t left = args_.hidden - tile.column;
    const auto load = [left](const auto* p) {
      if constexpr (Full) return V::load(p);
      return V::load(p, left);
    };
    const auto load_or_zero = [&load](const auto* p) { return p == nullptr ? V(T(0)) : load(p); };

    const int64_t row = tile.row + r, n = steps_.offset(step.t) + row;
    const int64_t state = steps_.state_offset(tile.direction, row, args_.hidden) + tile.column;
    const int64_t feature =
        steps_.feature_offset(tile.direction, step.t, row, args_.hidden) + tile.column;
    const int64_t n_before = step.has_before ? steps_.offset(step.before) + row : 0;

    in.h_prev = in.h = in.extra_prev = in.extra = in.d_extra = V(T(0));
    if constexpr (Cell::saves_gates) {
      const S* gates = step.saved.gate_row(n) + tile.column;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) in.gate[g] = load(gates + g * args_.hidden);
    } else {
      in.h = load(at<S>(args_.output, feature));
    }
    if constexpr (Cell::has_extra) in.extra = load(step.saved.extra_row(n) + tile.column);
    if (Cell::has_direct_path && !reset) {
      const int64_t before =
          (n_before * args_.directions + tile.direction) * args_.hidden + tile.column;
      in.h_prev = step.has_before ? load(at<S>(args_.output, before))
                                  : load_or_zero(at<S>(args_.h_0, state));
    }
    if constexpr (Cell::has_cell_state) {
      if (!reset) {
        in.extra_prev = step.has_before ? load(step.saved.extra_row(n_before) + tile.column)
                                        : load_or_zero(at<S>(args_.c_0, state));
      }
      in.d_extra =
          step.has_after ? load(carry_c_ + state) : load_or_zero(at<S>(args_.d_c_n, state));
      if (args_.d_extra != nullptr) in.d_extra = in.d_extra + load(at<T>(args_.d_extra, feature));
    }

    in.dh = tile.sums[r * tile.stride];
    if (!projects_) {
      if (args_.d_output != nullptr) in.dh = in.dh + load(at<S>(args_.d_output, feature));
      if (!step.has_after) in.dh = in.dh + load_or_zero(at<S>(args_.d_h_n, state));
    }
    if (Cell::has_direct_path && step.has_after) in.dh = in.dh + load(carry_h_ + state);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
