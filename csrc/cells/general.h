// The general form of a cell, in which the scans call it: any number of states, learned vectors,
// inputs that no weight multiplies, and gates without rows in W_hh. Its functions are constexpr,
// for CUDA. It defines
//   mode, gates, recurrent, states, saves, inputs, parameters, splits_gradient, has_direct_path
//       see traits.h and registry.h; the recurrent gates come in the order of the rows of W_hh
//   reads_output
//       backward reads h, the one after the step
//   forward(x, r, z, p, h_prev, state, saved) -> h
//       x[G] = W_ih x_t + b_ih; r[R] = W_hh h_{t-1} + b_hh; z[Z], p[Q]: inputs and learned vectors;
//       h_prev only with a direct path, else 0; state[C] in and out; saved[K] out
//   backward(saved, z, p, h_prev, h, state_prev, state, dh, d_state, dx, dr, dz, dp)
//           -> direct part of dh_{t-1}
//       state_prev[C] and state[C]: before the step and after; d_state[C]: gradient of the states
//       after the step in, of those before it out; dx[G], dr[R], dz[Z], dp[Q] out. Without
//       splits_gradient dr is dx, and is not read.
// A cell of registry.h, whose form is a special case, is called through the same two functions.
#pragma once

#include "traits.h"

// Before the loops over gates, which must not stay loops: they index registers.
#if defined(__CUDA_ARCH__)
#define FASTRNN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // for the host, where nothing calls them
#define FASTRNN_UNROLL
#else
#define FASTRNN_UNROLL _Pragma("GCC unroll 4")
#endif

namespace fastrnn {

// Room for N values; C++ has no arrays of none.
constexpr int room(int n) { return n > 0 ? n : 1; }

template <class Cell>
constexpr bool is_general = requires { Cell::parameters; };

template <class Cell>
struct General : Cell {
  static constexpr int extras = Cell::states;
  static constexpr int norms = Cell::recurrent > 0 ? 2 : 0;  // vectors of layer normalisation
  static constexpr bool projects = false, rebuilds_cell_state = false, normalises_state = false;
};

template <class Cell>
  requires(!is_general<Cell>)
struct General<Cell> {
  static constexpr const char* mode = Cell::mode;
  static constexpr int gates = Cell::gates, recurrent = Cell::gates;
  static constexpr int states = Cell::has_cell_state, extras = Cell::has_extra;
  static constexpr int saves = Cell::saves_gates ? Cell::gates : 0;
  static constexpr int inputs = 0, parameters = 0;
  static constexpr bool splits_gradient = Cell::splits_gradient;
  static constexpr bool has_direct_path = Cell::has_direct_path;
  static constexpr bool reads_output = !Cell::saves_gates;
  static constexpr bool projects = Cell::has_cell_state && !Cell::has_direct_path;
  static constexpr bool rebuilds_cell_state = Cell::has_cell_state;
  static constexpr bool normalises_state = Cell::has_cell_state;
  static constexpr int norms = normalises_state ? 4 : 2;

  template <class V>
  [[gnu::always_inline]] static constexpr V forward(const V* x, const V* r, const V*, const V*,
                                                    V h_prev, V* extra, V* saved) {
    V gate[gates], recurrent_part[gates];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) gate[g] = x[g];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) recurrent_part[g] = r[g];
    const V h = Cell::forward(gate, recurrent_part, h_prev, extra[0]);
    FASTRNN_UNROLL
    for (int g = 0; g < saves; ++g) saved[g] = gate[g];
    return h;
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V backward(const V* saved, const V*, const V*, V h_prev,
                                                     V h, const V* extra_prev, const V* extra, V dh,
                                                     V* d_extra, V* dx, V* dr, V*, V*) {
    V gate[gates], d_input[gates], d_recurrent[gates];
    FASTRNN_UNROLL
    for (int g = 0; g < saves; ++g) gate[g] = saved[g];
    const V direct = Cell::backward(gate, h_prev, h, extra_prev[0], extra[0], dh, d_extra[0],
                                    d_input, d_recurrent);
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) dx[g] = d_input[g];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) dr[g] = d_recurrent[g];
    return direct;
  }

  // h as forward returned it; only of cells that project it.
  template <class V>
  [[gnu::always_inline]] static constexpr V hidden(const V* saved, const V* extra) {
    V gate[gates];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) gate[g] = saved[g];
    return Cell::hidden(gate, extra[0]);
  }

  template <class V>
  [[gnu::always_inline]] static constexpr V hidden_gradient(const V* saved, V c, V dh) {
    V gate[gates];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) gate[g] = saved[g];
    return Cell::hidden_gradient(gate, c, dh);
  }

  // The cell state after the step, from the one before.
  template <class V>
  [[gnu::always_inline]] static constexpr V cell_state(const V* saved, V before) {
    V gate[gates];
    FASTRNN_UNROLL
    for (int g = 0; g < gates; ++g) gate[g] = saved[g];
    return Cell::cell_state(gate, before);
  }
};

template <class Cell>
constexpr CellTraits traits_of(int index) {
  using C = General<Cell>;
  return {C::mode,
          index,
          C::gates,
          C::recurrent,
          C::states,
          C::extras,
          C::saves,
          C::inputs,
          C::parameters,
          C::norms,
          C::splits_gradient,
          C::has_direct_path,
          C::rebuilds_cell_state};
}

}  // namespace fastrnn
