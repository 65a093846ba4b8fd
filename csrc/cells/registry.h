// The list of cells. A new cell is a header beside this file and a line in `Cells`.
//
// A cell is the mathematics of one hidden unit at one step, over a value type V: a SIMD vector of
// units on the CPU, one unit on a GPU. It knows no memory layout. V comes with arithmetic and the
// functions sigmoid, tanh, relu and relu_derivative. A cell's functions are constexpr, so that nvcc
// may call them on the device. A cell defines:
//   mode             its name, as in torch.nn.RNNBase.mode
//   gates            G, the rows of weight_ih per unit
//   has_cell_state   it carries a second state beside h (its `extra`)
//   has_extra        it has a value per step that backward needs beside gates and output
//   saves_gates      backward needs the activated gates
//   splits_gradient  the gradients of the input part and of the recurrent part of the gates differ
//   has_direct_path  h_{t-1} reaches h_t by another way than W_hh
//   forward(x, r, h_prev, extra) -> h
//       x[G] = W_ih x_t + b_ih in, activated gates out; r[G] = W_hh h_{t-1} + b_hh;
//       extra: the cell state in and out, or only out
//   hidden(gate, extra) -> h
//       as forward returned it; only of cells with saved gates and without a direct path
//   hidden_gradient(gate, extra, dh) -> gradient of hidden's extra; only of cells with a cell state
//   cell_state(gate, before) -> extra
//       the cell state that forward left; only of cells with one
//   backward(gate, h_prev, h, extra_prev, extra, dh, d_extra, dx, dr) -> direct part of dh_{t-1}
//       d_extra: gradient of the cell state in, of the previous one out; dx[G], dr[G]: gradients of
//       x, r
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

namespace fastrnn {

template <class... Cell>
struct CellList {
  static constexpr int size = sizeof...(Cell);

  // Calls f with an object of the index-th cell type.
  template <class F>
  static void visit(int index, F&& f) {
    int i = 0;
    static_cast<void>(((i++ == index && (f(Cell{}), true)) || ...));
  }
};

using Cells = CellList<Elman<Tanh>, Elman<Relu>, Gru, Lstm>;

}  // namespace fastrnn
