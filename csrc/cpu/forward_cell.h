// The cell's forward on register tiles: from W_ih x_t + b_ih and W_hh h_{t-1} to h_t, and what
// backward needs of the step.
#pragma once

#include "../cells/general.h"
#include "forward_context.h"
#include "math.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class ForwardCell {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using C = General<Cell>;
  static constexpr int G = C::gates, R = C::recurrent, Z = C::inputs, Q = C::parameters;

 public:
  explicit ForwardCell(const ForwardContext<S>& context)
      : args_(context.args),
        steps_(context.steps),
        states_(context.states),
        zoneout_(context.zoneout),
        projects_(context.projects),
        units_(context.units) {}

  void run(const ForwardStep<S>& step, const ForwardTile<S>& tile) const {
    const Rows rows = rows_of(step, tile);
    const bool keeps = zoneout_.is_on();
    const int64_t units = args_.hidden - tile.unit;
    for (int r = 0; r < tile.count; ++r) {
      const bool reset = steps_.resets_after(tile.direction, step.t, tile.row + r);
      for (int u = 0; u < units_; ++u) {
        const int64_t left = units - u * V::lanes;
        if (left <= 0) break;
        CellValues cell;
        load(tile, rows, r, u, left, cell);
        cell.h = C::forward(cell.x, cell.recurrent, cell.inputs, cell.parameters, cell.h_prev,
                            cell.extra, cell.saved);
        if (keeps) [[unlikely]]
          keep_states(rows, r, u, cell);
        store(rows, r, u, left, reset, cell);
      }
    }
  }

  // The cell on a row of a layer with layer normalisation, where it normalises c. See
  // layer_norm_cell.h.
  void run_whole_row(const ForwardStep<S>& step, const ForwardRow<S>& whole) const;

 private:
  const ForwardArgs& args_;
  const Steps& steps_;
  const States<S>& states_;
  const Zoneout<S>& zoneout_;
  const bool projects_;
  const int units_;  // vectors of units in a block

  // Where the first row of a tile lies, and how far the rows are from each other. Null: no such
  // result. Copies of what members say: these would be read again after every store.
  struct Rows {
    const F* h_prev;
    F* h_next;
    const T* before;  // h of the direct path
    T* direct;
    T* cell;
    F* unprojected;
    S* output;
    S* gates;
    T* extra;
    const S* inputs;
    const S* parameters[room(Q)];
    const S* h_mask;
    const T *keep_h, *keep_c;
    int64_t state_stride, output_stride, extra_stride, hidden;
    int units;
  };

  [[gnu::always_inline]] Rows rows_of(const ForwardStep<S>& step,
                                      const ForwardTile<S>& tile) const {
    const int64_t n = steps_.offset(step.t) + tile.row;
    const int64_t state = states_.offset(tile.direction, tile.row) + tile.unit;
    const int64_t feature =
        steps_.feature_offset(tile.direction, step.t, tile.row, args_.hidden) + tile.unit;
    const auto& saved = step.saved;
    Rows rows{states_.h(step.i) + state,
              states_.h(step.i + 1) + state,
              nullptr,
              at(states_.direct(), state),
              states_.cell(tile.direction, tile.row) + tile.unit,
              states_.unprojected() + state,
              nullptr,
              saved.gates == nullptr ? nullptr : saved.gate_row(n) + tile.unit,
              saved.extra == nullptr ? nullptr : saved.extra_row(n) + tile.unit,
              nullptr,
              {},
              nullptr,
              nullptr,
              nullptr,
              states_.stride,
              args_.directions * args_.hidden,
              saved.extra_stride,
              args_.hidden,
              kBlockVectors / G <= 1 ? 1 : units_};
    if constexpr (std::is_same_v<F, T>) {
      rows.before = rows.direct == nullptr ? rows.h_prev : rows.direct;
    } else {
      rows.before = rows.direct;
    }
    if (!projects_) {
      rows.output = at(static_cast<S*>(args_.output), feature);
      rows.h_mask = at(states_.h_mask(tile.direction, tile.row), tile.unit);
      rows.keep_h = at(zoneout_.weights(Zoneout<S>::kH, tile.direction, tile.row), tile.unit);
    }
    rows.keep_c = at(zoneout_.weights(Zoneout<S>::kC, tile.direction, tile.row), tile.unit);
    if constexpr (Z > 0) {
      rows.inputs = static_cast<const S*>(args_.inputs) + tile.unit +
                    steps_.feature_offset(tile.direction, step.t, tile.row, Z * args_.hidden);
    }
    for (int q = 0; q < Q; ++q) {
      rows.parameters[q] =
          static_cast<const S*>(own_parameters(args_, tile.direction)[q]) + tile.unit;
    }
    return rows;
  }

  // What the cell's forward takes and leaves: see ../cells/general.h.
  struct CellValues {
    V x[G], recurrent[room(R)], inputs[room(Z)], parameters[room(Q)], h_prev;
    V extra[room(C::extras)], saved[room(C::saves)], h;
  };

  // Of the u-th vector of units of the tile's r-th row. left: the units from its first one on.
  [[gnu::always_inline]] void load(const ForwardTile<S>& tile, const Rows& rows, int r, int u,
                                   int64_t left, CellValues& cell) const {
    const int64_t first = r * rows.units + u;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      cell.x[g] = V::load(tile.projected + (first * G + g) * V::lanes);
    }
#pragma GCC unroll 4
    for (int g = 0; g < R; ++g) {
      cell.recurrent[g] = tile.sums[first * R + g] + tile.bias[u * R + g];
    }
    load_states(rows, r, u, left, cell);
  }

  // The rest of what the cell takes.
  [[gnu::always_inline]] void load_states(const Rows& rows, int r, int u, int64_t left,
                                          CellValues& cell) const {
    const int64_t unit = u * V::lanes, state = r * rows.state_stride + unit;
    for (int z = 0; z < Z; ++z) {
      cell.inputs[z] =
          load_lanes(rows.inputs + Z * r * rows.output_stride + z * rows.hidden + unit, left);
    }
    for (int q = 0; q < Q; ++q) {
      cell.parameters[q] = load_lanes(rows.parameters[q] + unit, left);
    }
    cell.h_prev = cell.extra[0] = V(T(0));
    if constexpr (C::has_direct_path) cell.h_prev = V::load(rows.before + state);
#pragma GCC unroll 4
    for (int k = 0; k < C::states; ++k) {
      cell.extra[k] = V::load(rows.cell + (r * C::states + k) * rows.state_stride + unit);
    }
  }

  // Zoneout: mixes the new states with those before the step.
  [[gnu::always_inline]] void keep_states(const Rows& rows, int r, int u, CellValues& cell) const {
    const int64_t state = r * rows.state_stride + u * V::lanes;
    if (rows.keep_h != nullptr) {
      cell.h = mix(V::load(rows.keep_h + state), V::load(rows.direct + state), cell.h);
    }
    if constexpr (C::rebuilds_cell_state) {
      if (rows.keep_c == nullptr) return;
      cell.extra[0] = mix(V::load(rows.keep_c + state), V::load(rows.cell + state), cell.extra[0]);
    }
  }

  // Reset: nothing goes on to the next step, which begins a new segment.
  [[gnu::always_inline]] void store(const Rows& rows, int r, int u, int64_t left, bool reset,
                                    CellValues& cell) const {
    if (left < V::lanes) [[unlikely]] {
      cell.h = first_lanes(cell.h, left);
      store_step(rows, r, u, cell, [left](V value, auto* p) { value.store(p, left); });
    } else {
      store_step(rows, r, u, cell, [](V value, auto* p) { value.store(p); });
    }
    const int64_t unit = u * V::lanes, state = r * rows.state_stride + unit;
    if (projects_) {
      cell.h.store(rows.unprojected + state);
    } else {
      const V next = reset ? V(T(0)) : cell.h;
      if (rows.direct != nullptr) next.store(rows.direct + state);
      if (rows.h_mask == nullptr) {
        next.store(rows.h_next + state);
      } else {
        const V mask = load_lanes(rows.h_mask + r * args_.hidden + unit, left);
        (next * mask).store(rows.h_next + state);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < C::states; ++k) {
      T* state_k = rows.cell + (r * C::states + k) * rows.state_stride + unit;
      (reset ? V(T(0)) : cell.extra[k]).store(state_k);
    }
  }

  // What stays of a step, by put(value, p): only here may lanes beyond H not be written.
  template <class Put>
  [[gnu::always_inline]] void store_step(const Rows& rows, int r, int u, const CellValues& cell,
                                         const Put& put) const {
    const int64_t unit = u * V::lanes;
    if constexpr (C::saves > 0) {
      if (rows.gates != nullptr) {
#pragma GCC unroll 4
        for (int k = 0; k < C::saves; ++k) {
          put(cell.saved[k], rows.gates + (r * C::saves + k) * rows.hidden + unit);
        }
      }
    }
    if constexpr (C::extras > 0) {
      if (rows.extra != nullptr) {
#pragma GCC unroll 4
        for (int k = 0; k < C::extras; ++k) {
          put(cell.extra[k], rows.extra + r * rows.extra_stride + k * rows.hidden + unit);
        }
      }
    }
    if (rows.output != nullptr) put(cell.h, rows.output + r * rows.output_stride + unit);
  }
};

template <class Cell, class S>
void forward_loop(const ForwardContext<S>& context, const ForwardStep<S>& step,
                  const ForwardTile<S>& tile) {
  ForwardCell<Cell, S>(context).run(step, tile);
}

}  // namespace fastrnn::FASTRNN_VARIANT
