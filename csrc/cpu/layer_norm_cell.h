// The cell on whole rows, with layer normalisation: forward where c is normalised, too, and
// backward. A vector of units goes through the same functions as in register tiles.
#pragma once

#include "backward_cell.h"
#include "forward_cell.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
void ForwardCell<Cell, S>::run_whole_row(const ForwardStep<S>& step,
                                         const ForwardRow<S>& whole) const {
  const int direction = whole.direction;
  const int64_t row = whole.row;
  const Gains<S>& gains = whole.gains;
  const TileRow<T> x{whole.x.values, G}, recurrent{whole.recurrent.values, R};
  const int64_t hidden = args_.hidden;
  const int vectors = static_cast<int>((hidden + V::lanes - 1) / V::lanes);
  const Rows rows = rows_of(step, {direction, row, 1, 0, nullptr, nullptr, nullptr});
  const bool reset = steps_.resets_after(direction, step.t, row);

  for (int v = 0; v < vectors; ++v) {
    CellValues cell;
    for (int g = 0; g < G; ++g) cell.x[g] = V::load(x.at(v, g));
    for (int g = 0; g < R; ++g) cell.recurrent[g] = V::load(recurrent.at(v, g));
    load_states(rows, 0, v, hidden - v * V::lanes, cell);
    C::forward(cell.x, cell.recurrent, cell.inputs, cell.parameters, cell.h_prev, cell.extra,
               cell.saved);
    for (int k = 0; k < C::saves; ++k) cell.saved[k].store(x.at(v, k));
    cell.extra[0].store(recurrent.at(v, 0));
  }
  const Moments<T> c_moments = moments_of(recurrent.first_part(hidden));
  for (int v = 0; v < vectors; ++v) {
    const int64_t unit = v * V::lanes, left = hidden - unit;
    CellValues cell;
    for (int k = 0; k < C::saves; ++k) cell.saved[k] = V::load(x.at(v, k));
    cell.extra[0] = V::load(recurrent.at(v, 0));
    const V normalised = c_moments.normalise(cell.extra[0]) * load_lanes(gains.c + unit, left) +
                         load_lanes(gains.bias_c + unit, left);
    cell.h = C::hidden(cell.saved, &normalised);
    if (zoneout_.is_on()) keep_states(rows, 0, v, cell);
    store(rows, 0, v, left, reset, cell);
  }
}

template <class Cell, class S>
void BackwardCell<Cell, S>::run_whole_row(const BackwardStep<S>& step,
                                          const BackwardRow<S>& whole) const {
  const int direction = whole.direction;
  const int64_t row = whole.row;
  const Gains<S>& gains = whole.gains;
  const T* const d_hidden = whole.d_hidden;
  const TileRow<T> x{whole.x.values, G}, recurrent{whole.recurrent.values, R};
  const int64_t hidden = args_.hidden;
  Rows rows = rows_of(step, {direction, row, 1, 0, nullptr, 0});
  rows.d_recurrent = chunk_gradients_.biased(direction, step.chunk_row(steps_, row));
  Units units = units_of(step, direction, row, 0);

  const auto load = [&](int64_t column, CellInputs& in, CellGradients& d) {
    units.column = column;
    units.left = hidden - column;
    in.dh = V::load(d_hidden + column);
    return load_units<false>(rows, units, in, d);
  };
  // What forward computed.
  const auto run_forward = [&](int64_t column, CellInputs& in) {
    const int64_t v = column / V::lanes;
    V gate[G], recurrent_part[R];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) gate[g] = V::load(x.at(v, g));
#pragma GCC unroll 4
    for (int g = 0; g < R; ++g) recurrent_part[g] = V::load(recurrent.at(v, g));
    for (int k = 0; k < C::states; ++k) in.extra[k] = in.extra_prev[k];
    in.h =
        C::forward(gate, recurrent_part, in.inputs, in.parameters, in.h_prev, in.extra, in.saved);
  };
  const auto run_backward = [&](const Kept& kept, const CellInputs& in, CellGradients& d) {
    d.direct = C::backward(in.saved, in.inputs, in.parameters, in.h_prev, in.h, in.extra_prev,
                           in.extra, in.dh, d.extra, d.x, d.r, d.inputs, d.parameters);
    finish_units(rows, units, kept, in, d);
  };

  if constexpr (C::normalises_state) {
    // Until the gate gradients are stored, their places hold what forward computed; and those
    // beside them c and dh, and then the gradients of the gain of c and of its bias.
    T* const gates = rows.d_input;
    T* const c = gates + G * hidden;
    T* const d_biased = c + hidden;
    for (int64_t column = 0; column < hidden; column += V::lanes) {
      const int64_t left = hidden - column;
      CellInputs in;
      CellGradients d;
      load(column, in, d);
      run_forward(column, in);
      for (int g = 0; g < G; ++g) store_lanes(in.saved[g], gates + g * hidden + column, left);
      store_lanes(in.extra[0], c + column, left);
      store_lanes(in.dh, d_biased + column, left);
    }
    const Moments<T> c_moments = moments_of(values_of(c, hidden));
    // What hidden() is given.
    const auto load_normalised = [&](int64_t column, int64_t left, CellInputs& in) {
      for (int g = 0; g < G; ++g) in.saved[g] = load_lanes(gates + g * hidden + column, left);
      const V normalised = c_moments.normalise(load_lanes(c + column, left));
      in.extra[0] =
          normalised * load_lanes(gains.c + column, left) + load_lanes(gains.bias_c + column, left);
      return normalised;
    };
    NormSums<T> sums;
    for (int64_t column = 0; column < hidden; column += V::lanes) {
      const int64_t left = hidden - column;
      CellInputs in;
      V normalised = load_normalised(column, left, in);
      V d_c = C::hidden_gradient(in.saved, in.extra[0], load_lanes(d_biased + column, left));
      store_lanes(d_c, d_biased + column, left);
      if (left < V::lanes) {
        normalised = first_lanes(normalised, left);
        d_c = first_lanes(d_c, left);
      }
      sums.add(d_c, load_lanes(gains.c + column, left), normalised);
    }
    sums.complete(hidden);
    for (int64_t column = 0; column < hidden; column += V::lanes) {
      const int64_t left = hidden - column;
      CellInputs in;
      CellGradients d;
      const Kept kept = load(column, in, d);
      const V normalised = load_normalised(column, left, in);
      const V d_c = load_lanes(d_biased + column, left);
      // backward() adds d_c, as if c were not normalised.
      d.extra[0] =
          d.extra[0] - d_c +
          sums.gradient(d_c, load_lanes(gains.c + column, left), normalised, c_moments.inverse);
      run_backward(kept, in, d);
      store_lanes(d_c * normalised, c + column, left);
    }
  } else {
    for (int64_t column = 0; column < hidden; column += V::lanes) {
      CellInputs in;
      CellGradients d;
      const Kept kept = load(column, in, d);
      run_forward(column, in);
      run_backward(kept, in, d);
    }
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
