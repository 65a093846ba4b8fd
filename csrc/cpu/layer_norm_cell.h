// The cell on whole rows, with layer normalisation: of all its products, and of an LSTM's c. A
// vector of units goes through the same functions as in register tiles.
#pragma once

#include "backward_cell.h"
#include "forward_cell.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
void ForwardCell<Cell, S>::run_whole_row(const ForwardStep<S>& step, int direction, int64_t row,
                                         const Gains<Cell, S>& gains, const TileRow<G, T>& x,
                                         const TileRow<R, T>& recurrent) const {
  const int64_t hidden = args_.hidden, full = hidden / V::lanes, left = hidden % V::lanes;
  Rows rows = rows_of(step, {direction, row, 1, 0, nullptr, nullptr, nullptr});
  S* const kept = rows.gates;
  rows.gates = nullptr;
  const bool reset = steps_.resets_after(direction, step.t, row);
  const Moments<T> x_moments = x.moments(hidden), r_moments = recurrent.moments(hidden);
  const S* const bias_ih = static_cast<const S*>(args_.bias_ih[direction]);
  const S* const bias_hh = static_cast<const S*>(args_.bias_hh[direction]);

  const auto run_cell = [&]<bool Full>(std::bool_constant<Full>, int64_t v, int64_t left) {
    CellValues cell;
    load_normalised<Full>(x, x_moments, gains.ih, bias_ih, v, left, cell.x);
    if (kept != nullptr) {
      for (int g = 0; g < R; ++g) {
        store_lanes<Full>(V::load(recurrent.at(v, g)), kept + g * hidden + v * V::lanes, left);
      }
    }
    load_normalised<Full>(recurrent, r_moments, gains.hh, bias_hh, v, left, cell.recurrent);
    load_states<Full>(rows, 0, static_cast<int>(v), left, cell);
    cell.h = C::forward(cell.x, cell.recurrent, cell.inputs, cell.parameters, cell.h_prev,
                        cell.extra, cell.saved);
    if constexpr (C::normalises_state) {
      for (int k = 0; k < C::saves; ++k) cell.saved[k].store(x.at(v, k));
      cell.extra[0].store(recurrent.at(v, 0));
    } else {
      finish_units<Full>(rows, static_cast<int>(v), left, reset, cell);
    }
  };
  for (int64_t v = 0; v < full; ++v) run_cell(std::true_type{}, v, V::lanes);
  if (left > 0) run_cell(std::false_type{}, full, left);

  if constexpr (C::normalises_state) {
    const Moments<T> c_moments = moments_of<1, T>(
        hidden, [&](int64_t v, int, int64_t) { return V::load(recurrent.at(v, 0)); });
    const auto run_output = [&]<bool Full>(std::bool_constant<Full>, int64_t v, int64_t left) {
      const int64_t unit = v * V::lanes;
      CellValues cell;
      for (int k = 0; k < C::saves; ++k) cell.saved[k] = V::load(x.at(v, k));
      cell.extra[0] = V::load(recurrent.at(v, 0));
      const V normalised =
          c_moments.normalise(cell.extra[0]) * load_lanes<Full>(gains.c + unit, left) +
          load_lanes<Full>(gains.bias_c + unit, left);
      cell.h = C::hidden(cell.saved, &normalised);
      finish_units<Full>(rows, static_cast<int>(v), left, reset, cell);
    };
    for (int64_t v = 0; v < full; ++v) run_output(std::true_type{}, v, V::lanes);
    if (left > 0) run_output(std::false_type{}, full, left);
  }
}

template <class Cell, class S>
void BackwardCell<Cell, S>::run_whole_row(const BackwardStep<S>& step, int direction, int64_t row,
                                          const Gains<Cell, S>& gains,
                                          const LayerNormGradient<Cell, S>& norm) const {
  const int64_t hidden = args_.hidden, full = hidden / V::lanes, rest = hidden % V::lanes;
  const auto for_each_vector = [&](const auto& body) {
    for (int64_t v = 0; v < full; ++v) body(std::true_type{}, v * V::lanes, V::lanes);
    if (rest > 0) body(std::false_type{}, full * V::lanes, rest);
  };
  Rows rows = rows_of(step, {direction, row, 1, 0, nullptr, 0});
  Units units = units_of(step, direction, row, 0);
  const int64_t k = step.chunk_row(steps_, row);
  rows.d_recurrent = chunk_gradients_.biased(direction, k);
  const T* const d_hidden = norm.d_hidden(direction, row);
  const S* const r = step.saved.gate_row(units.n);
  const TileRow<G, T> x = norm.x(direction, step.chunk, step.t, row);
  const Moments<T> x_moments = x.moments(hidden);
  const Moments<T> r_moments = moments_of<R, T>(hidden, [&](int64_t v, int g, int64_t left) {
    return load_lanes(r + g * hidden + v * V::lanes, left);
  });
  norm.x_inverse(direction, k) = x_moments.inverse;
  norm.r_moments(direction, k) = r_moments;
  const S* const bias_ih = static_cast<const S*>(args_.bias_ih[direction]);
  const S* const bias_hh = static_cast<const S*>(args_.bias_hh[direction]);

  const auto load = [&]<bool Full>(std::bool_constant<Full>, int64_t column, int64_t left,
                                   CellInputs& in, CellGradients& d) {
    units.column = column;
    units.left = left;
    in.dh = V::load(d_hidden + column);
    return load_units<Full, false>(rows, units, in, d);
  };
  // What forward computed, from the products and the states before.
  const auto run_forward = [&](int64_t column, int64_t left, CellInputs& in) {
    V gate[G], recurrent[R];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      T* const own = x.at(column / V::lanes, g);
      const V normalised = x_moments.normalise(V::load(own));
      normalised.store(own);
      const int64_t place = g * hidden + column;
      gate[g] = normalised * load_lanes(gains.ih + place, left);
      if (bias_ih != nullptr) gate[g] = gate[g] + load_lanes(bias_ih + place, left);
    }
#pragma GCC unroll 4
    for (int g = 0; g < R; ++g) {
      const int64_t place = g * hidden + column;
      recurrent[g] =
          r_moments.normalise(load_lanes(r + place, left)) * load_lanes(gains.hh + place, left);
      if (bias_hh != nullptr) recurrent[g] = recurrent[g] + load_lanes(bias_hh + place, left);
    }
    for (int k = 0; k < C::states; ++k) in.extra[k] = in.extra_prev[k];
    in.h = C::forward(gate, recurrent, in.inputs, in.parameters, in.h_prev, in.extra, in.saved);
  };
  const auto run_backward = [&]<bool Full>(std::bool_constant<Full>, const Kept& kept,
                                           const CellInputs& in, CellGradients& d) {
    d.direct = C::backward(in.saved, in.inputs, in.parameters, in.h_prev, in.h, in.extra_prev,
                           in.extra, in.dh, d.extra, d.x, d.r, d.inputs, d.parameters);
    finish_units<Full>(rows, units, kept, in, d);
  };

  if constexpr (C::normalises_state) {
    // Until the gate gradients are stored, their places hold what forward computed; and those
    // beside them c, and then the gradients of its gain and its bias.
    T* const gates = rows.d_input;
    T* const c = gates + G * hidden;
    T* const d_biased = c + hidden;
    for_each_vector([&](auto is_full, int64_t column, int64_t left) {
      CellInputs in;
      CellGradients d;
      load(is_full, column, left, in, d);
      run_forward(column, left, in);
      for (int g = 0; g < G; ++g) store_lanes(in.saved[g], gates + g * hidden + column, left);
      store_lanes(in.extra[0], c + column, left);
    });
    const Moments<T> c_moments = moments_of<1, T>(
        hidden, [&](int64_t v, int, int64_t left) { return load_lanes(c + v * V::lanes, left); });
    // What hidden() is given.
    const auto load_normalised = [&](int64_t column, int64_t left, CellInputs& in) {
      for (int g = 0; g < G; ++g) in.saved[g] = load_lanes(gates + g * hidden + column, left);
      const V normalised = c_moments.normalise(load_lanes(c + column, left));
      in.extra[0] =
          normalised * load_lanes(gains.c + column, left) + load_lanes(gains.bias_c + column, left);
      return normalised;
    };
    NormSums<T> sums;
    for_each_vector([&](auto is_full, int64_t column, int64_t left) {
      CellInputs in;
      CellGradients d;
      load(is_full, column, left, in, d);
      V normalised = load_normalised(column, left, in);
      V d_c = C::hidden_gradient(in.saved, in.extra[0], in.dh);
      store_lanes(d_c, d_biased + column, left);
      if (left < V::lanes) {
        normalised = first_lanes(normalised, left);
        d_c = first_lanes(d_c, left);
      }
      sums.add(d_c, load_lanes(gains.c + column, left), normalised);
    });
    sums.complete(hidden);
    for_each_vector([&](auto is_full, int64_t column, int64_t left) {
      CellInputs in;
      CellGradients d;
      const Kept kept = load(is_full, column, left, in, d);
      const V normalised = load_normalised(column, left, in);
      const V d_c = load_lanes(d_biased + column, left);
      // backward() adds d_c, as if c were not normalised.
      d.extra[0] =
          d.extra[0] - d_c +
          sums.gradient(d_c, load_lanes(gains.c + column, left), normalised, c_moments.inverse);
      run_backward(is_full, kept, in, d);
      store_lanes(d_c * normalised, c + column, left);
    });
  } else {
    for_each_vector([&](auto is_full, int64_t column, int64_t left) {
      CellInputs in;
      CellGradients d;
      const Kept kept = load(is_full, column, left, in, d);
      run_forward(column, left, in);
      run_backward(is_full, kept, in, d);
    });
  }
  norm.finish_recurrent(direction, k, r, gains);
}

}  // namespace fastrnn::FASTRNN_VARIANT
