// The cell's backward on register tiles: from the gradient of h_t to the gradients of the gates,
// and to what a step hands to the one before it.
#pragma once

#include "../cells/general.h"
#include "backward_context.h"
#include "math.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class BackwardCell {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using C = General<Cell>;
  static constexpr int G = C::gates, R = C::recurrent, Z = C::inputs, Q = C::parameters;

 public:
  explicit BackwardCell(const BackwardContext<S>& context)
      : args_(context.args),
        steps_(context.steps),
        chunk_gradients_(context.chunk_gradients),
        zoneout_(context.zoneout),
        edge_(context.edge),
        projects_(context.projects),
        zoneout_stride_(context.zoneout_stride),
        carry_h_(context.carry_h),
        carry_c_(context.carry_c) {}

  void run(const BackwardStep<S>& step, const BackwardTile<S>& tile) const {
    const Rows rows = rows_of(step, tile);
    const int64_t columns = args_.hidden - tile.column;
    for (int r = 0; r < tile.count; ++r) {
      Units units = units_of(step, tile.direction, tile.row, r);
      for (int v = 0; v < tile.vectors; ++v) {
        units.column = v * V::lanes;
        units.left = columns - units.column;
        if (units.left <= 0) break;
        CellInputs in;
        CellGradients d;
        in.dh = tile.sums[r * tile.vectors + v];
        const Kept kept = load_units(rows, units, in, d);
        d.direct = C::backward(in.saved, in.inputs, in.parameters, in.h_prev, in.h, in.extra_prev,
                               in.extra, in.dh, d.extra, d.x, d.r, d.inputs, d.parameters);
        finish_units(rows, units, kept, in, d);
      }
    }
  }

  // The cell on a row of a layer with layer normalisation. It computes again what forward has not
  // saved. See layer_norm_cell.h.
  void run_whole_row(const BackwardStep<S>& step, const BackwardRow<S>& whole) const;

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<S>& chunk_gradients_;
  const Zoneout<S>& zoneout_;
  const Edge<S>& edge_;
  const bool projects_;
  const int64_t zoneout_stride_;
  T *const carry_h_, *const carry_c_;

  // Where the first row of a tile lies, and how far the rows are from each other. Null: nothing
  // there. Copies of what members say: these would be read again after every store.
  struct Rows {
    const S *gates, *output, *output_before, *h_0, *c_0, *d_output, *d_h_n, *d_c_n, *inputs;
    const S* parameters[room(Q)];
    const T *extra, *extra_before, *d_extra, *keep_h, *keep_c;
    T *carry_h, *carry_c, *d_input, *d_recurrent;
    F *d_input_factors, *d_recurrent_factors, *hidden;
    S* d_inputs;
    int64_t gate_stride, feature_stride, extra_stride, chunk_stride, hidden_units;
  };

  [[gnu::always_inline]] Rows rows_of(const BackwardStep<S>& step,
                                      const BackwardTile<S>& tile) const {
    const auto& saved = step.saved;
    const int direction = tile.direction;
    const int64_t n = steps_.offset(step.t) + tile.row;
    const int64_t local = step.chunk_row(steps_, tile.row), column = tile.column;
    const int64_t feature =
        steps_.feature_offset(direction, step.t, tile.row, args_.hidden) + column;
    const int64_t state = steps_.state_offset(direction, tile.row, args_.hidden) + column;
    // The same of the other states.
    const int64_t width = C::states * args_.hidden;
    const int64_t states = steps_.state_offset(direction, tile.row, width) + column;
    Rows rows{};
    if constexpr (C::saves > 0) rows.gates = saved.gate_row(n) + column;
    rows.output = at<S>(args_.output, feature);
    if constexpr (C::extras > 0) rows.extra = saved.extra_row(n) + column;
    if (step.has_before) {
      const int64_t n_before = steps_.offset(step.before) + tile.row;
      rows.output_before =
          at<S>(args_.output,
                steps_.feature_offset(direction, step.before, tile.row, args_.hidden) + column);
      if constexpr (C::extras > 0) rows.extra_before = saved.extra_row(n_before) + column;
    } else {
      rows.h_0 = at<S>(args_.h_0, state);
      rows.c_0 = at<S>(args_.c_0, states);
    }
    if (!projects_) {
      rows.d_output = at<S>(args_.d_output, feature);
      if (!step.has_after) rows.d_h_n = at<S>(args_.d_h_n, state);
    }
    if (!step.has_after) rows.d_c_n = at<S>(args_.d_c_n, states);
    rows.d_extra =
        at<T>(args_.d_extra, steps_.feature_offset(direction, step.t, tile.row, width) + column);
    if (!projects_) {
      rows.carry_h = at(carry_h_, state);
      rows.keep_h = at(zoneout_.weights(Zoneout<S>::kH, direction, tile.row), column);
    }
    rows.keep_c = at(zoneout_.weights(Zoneout<S>::kC, direction, tile.row), column);
    rows.carry_c = carry_c_ + states;
    if constexpr (Z > 0) {
      const int64_t inputs =
          steps_.feature_offset(direction, step.t, tile.row, Z * args_.hidden) + column;
      rows.inputs = static_cast<const S*>(args_.inputs) + inputs;
      rows.d_inputs = at(static_cast<S*>(args_.d_inputs), inputs);
    }
    for (int q = 0; q < Q; ++q) {
      rows.parameters[q] = static_cast<const S*>(own_parameters(args_, direction)[q]) + column;
    }
    rows.d_input = chunk_gradients_.input.values(direction, local) + column;
    rows.d_input_factors = chunk_gradients_.input.factors(direction, local) + column;
    rows.d_recurrent = chunk_gradients_.recurrent.values(direction, local) + column;
    rows.d_recurrent_factors = chunk_gradients_.recurrent.factors(direction, local) + column;
    if (projects_) rows.hidden = chunk_gradients_.hidden(direction, local) + column;
    rows.gate_stride = saved.gate_stride;
    rows.feature_stride = args_.directions * args_.hidden;
    rows.extra_stride = saved.extra_stride;
    rows.chunk_stride = chunk_gradients_.stride;
    rows.hidden_units = args_.hidden;
    return rows;
  }

  // What the cell's backward takes and leaves for one vector of units of one row: see
  // ../cells/general.h.
  struct CellInputs {
    V saved[room(C::saves)], inputs[room(Z)], parameters[room(Q)], h_prev, h;
    V extra_prev[room(C::extras)], extra[room(C::extras)], dh;
  };
  struct CellGradients {
    V extra[room(C::extras)], x[G], r[room(R)], inputs[room(Z)], parameters[room(Q)], direct;
  };

  // A vector of units of a tile's r-th row, and how it stands to the steps beside it. Reset:
  // nothing of the step before goes into this one.
  struct Units {
    int r;
    bool reset, has_after, has_before;
    int64_t n, n_after;    // the rows of the step and of the one after it in the layer
    int64_t column, left;  // of the tile's columns, and how many units follow from it on
  };
  [[gnu::always_inline]] Units units_of(const BackwardStep<S>& step, int direction, int64_t row,
                                        int r) const {
    const int64_t n_after = step.has_after ? steps_.offset(step.after) + row + r : 0;
    return {r,
            steps_.resets_before(direction, step.t, row + r),
            step.has_after,
            step.has_before,
            steps_.offset(step.t) + row + r,
            n_after,
            0,
            0};
  }

  // What goes past the cell.
  struct Kept {
    V h, c;
  };

  // All that the cell's backward takes. In in.dh is what a product has brought. What forward saved
  // is not there with layer normalisation.
  template <bool IsSaved = true>
  [[gnu::always_inline]] Kept load_units(const Rows& rows, const Units& units, CellInputs& in,
                                         CellGradients& d) const {
    if (units.has_after && rows.carry_h != nullptr) {
      const T* carried = rows.carry_h + units.r * rows.hidden_units + units.column;
      in.dh = in.dh + load_lanes(carried, units.left);
    }
    if (!edge_.is_plain() && !projects_ && units.has_after) [[unlikely]]
      in.dh = edge_(in.dh, units.n_after);
    if (const int64_t left = units.left; left < V::lanes) [[unlikely]] {
      load_inputs<IsSaved>(rows, units, in, d, [left](const auto* p) { return V::load(p, left); });
    } else {
      load_inputs<IsSaved>(rows, units, in, d, [](const auto* p) { return V::load(p); });
    }
    Kept kept;
    if (zoneout_.is_on()) [[unlikely]]
      kept = keep_states(rows, units, in, d);
    return kept;
  }

  // And all that it leaves.
  [[gnu::always_inline]] void finish_units(const Rows& rows, const Units& units, const Kept& kept,
                                           const CellInputs& in, CellGradients& d) const {
    if (zoneout_.is_on()) [[unlikely]] {
      d.direct = d.direct + kept.h;
      d.extra[0] = d.extra[0] + kept.c;
    }
    if (!edge_.is_plain()) [[unlikely]] {
      for (int k = 0; k < C::states; ++k) d.extra[k] = edge_(d.extra[k], units.n);
    }
    if constexpr (C::projects) {
      if (rows.hidden != nullptr) {
        C::hidden(in.saved, in.extra)
            .store(rows.hidden + units.r * rows.chunk_stride + units.column);
      }
    }
    if (const int64_t left = units.left; left < V::lanes) [[unlikely]] {
      store_outputs(rows, units, d, [left](auto* p, V value) { value.store(p, left); });
    } else {
      store_outputs(rows, units, d, [](auto* p, V value) { value.store(p); });
    }
  }

  // Zoneout: splits the gradients of the states between the step before and the cell, which it
  // gives the states as the cell's forward left them.
  [[gnu::always_inline]] Kept keep_states(const Rows& rows, const Units& units, CellInputs& in,
                                          CellGradients& d) const {
    const int64_t r = units.r, column = units.column;
    Kept kept{V(T(0)), V(T(0))};
    const int64_t place = r * zoneout_stride_ + column;
    if (rows.keep_h != nullptr) {
      const V weight = V::load(rows.keep_h + place);
      kept.h = weight * in.dh;
      in.dh = in.dh - kept.h;
      if constexpr (C::reads_output) {
        const int64_t feature = r * rows.feature_stride + column;
        const S* before = units.has_before ? at(rows.output_before, feature)
                                           : at(rows.h_0, r * rows.hidden_units + column);
        const V h_prev =
            units.reset || before == nullptr ? V(T(0)) : load_lanes(before, units.left);
        const V one(T(1)), rest = one - weight;
        // Where all is kept, no gradient asks for it.
        in.h = where(rest > V(T(0)), (in.h - weight * h_prev) / rest, in.h);
      }
    }
    if constexpr (C::rebuilds_cell_state) {
      if (rows.keep_c != nullptr) {
        in.extra[0] = C::cell_state(in.saved, in.extra_prev[0]);
        kept.c = V::load(rows.keep_c + place) * d.extra[0];
        d.extra[0] = d.extra[0] - kept.c;
      }
    }
    return kept;
  }

  template <bool IsSaved, class Load>
  [[gnu::always_inline]] static void load_inputs(const Rows& rows, const Units& units,
                                                 CellInputs& in, CellGradients& d,
                                                 const Load& load) {
    const int64_t r = units.r, column = units.column;
    const bool reset = units.reset, has_after = units.has_after, has_before = units.has_before;
    const auto load_or_zero = [&load](const auto* p, int64_t i) {
      return p == nullptr ? V(T(0)) : load(p + i);
    };
    const int64_t feature = r * rows.feature_stride + column;
    const int64_t state = r * rows.hidden_units + column;
    const int64_t extra = r * rows.extra_stride + column;

    in.h_prev = in.h = in.extra_prev[0] = in.extra[0] = d.extra[0] = V(T(0));
    if constexpr (IsSaved && C::saves > 0) {
      const S* gates = rows.gates + r * rows.gate_stride + column;
#pragma GCC unroll 4
      for (int k = 0; k < C::saves; ++k) in.saved[k] = load(gates + k * rows.hidden_units);
    }
    if constexpr (C::reads_output) in.h = load(rows.output + feature);
#pragma GCC unroll 4
    for (int k = 0; k < C::extras; ++k)
      in.extra[k] = load(rows.extra + extra + k * rows.hidden_units);
    if (C::has_direct_path && !reset) {
      in.h_prev = has_before ? load(rows.output_before + feature) : load_or_zero(rows.h_0, state);
    }
#pragma GCC unroll 4
    for (int k = 0; k < C::states; ++k) {
      const int64_t own = C::states * r * rows.hidden_units + k * rows.hidden_units + column;
      if (reset) {
        in.extra_prev[k] = V(T(0));
      } else {
        in.extra_prev[k] = has_before ? load(rows.extra_before + extra + k * rows.hidden_units)
                                      : load_or_zero(rows.c_0, own);
      }
      d.extra[k] = has_after ? load(rows.carry_c + own) : load_or_zero(rows.d_c_n, own);
      if (rows.d_extra != nullptr) {
        const int64_t given = C::states * r * rows.feature_stride + k * rows.hidden_units + column;
        d.extra[k] = d.extra[k] + load(rows.d_extra + given);
      }
    }
    for (int z = 0; z < Z; ++z) {
      in.inputs[z] =
          load(rows.inputs + Z * r * rows.feature_stride + z * rows.hidden_units + column);
    }
    for (int q = 0; q < Q; ++q) in.parameters[q] = load(rows.parameters[q] + column);
    if (rows.d_output != nullptr) in.dh = in.dh + load(rows.d_output + feature);
    if (rows.d_h_n != nullptr) in.dh = in.dh + load(rows.d_h_n + state);
  }

  template <class Store>
  [[gnu::always_inline]] static void store_outputs(const Rows& rows, const Units& units,
                                                   const CellGradients& d, const Store& store) {
    const int64_t r = units.r, column = units.column;
    const bool reset = units.reset;
    const int64_t state = r * rows.hidden_units + column;
    const int64_t first = r * rows.chunk_stride + column;
    const auto store_gates = [&]<int N>(T* values, F* factors, const V(&d_gates)[N]) {
#pragma GCC unroll 4
      for (int g = 0; g < N; ++g) {
        store(values + first + g * rows.hidden_units, d_gates[g]);
        if constexpr (ChunkRows<S>::kNarrows)
          store(factors + first + g * rows.hidden_units, d_gates[g]);
      }
    };
    store_gates(rows.d_input, rows.d_input_factors, d.x);
    if constexpr (C::splits_gradient && R > 0) {
      store_gates(rows.d_recurrent, rows.d_recurrent_factors, d.r);
    }
    // Beside the gates, as their sums are those of biases.
    for (int q = 0; q < Q; ++q)
      store(rows.d_input + first + (G + q) * rows.hidden_units, d.parameters[q]);
    if (Z > 0 && rows.d_inputs != nullptr) {
      for (int z = 0; z < Z; ++z) {
        store(rows.d_inputs + Z * r * rows.feature_stride + z * rows.hidden_units + column,
              d.inputs[z]);
      }
    }
    if (rows.carry_h != nullptr) store(rows.carry_h + state, reset ? V(T(0)) : d.direct);
#pragma GCC unroll 4
    for (int k = 0; k < C::states; ++k) {
      const int64_t own = C::states * r * rows.hidden_units + k * rows.hidden_units + column;
      store(rows.carry_c + own, reset ? V(T(0)) : d.extra[k]);
    }
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
