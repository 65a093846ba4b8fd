// Layers on top of each other, the output of one being the next one's input: all in one call, and
// with gradients in one node of autograd.
#pragma once

#include <array>

#include "run_layer.h"

namespace fastrnn {

// Of one cell, with states and weights of all of them together.
struct Stack {
  int cell, layers, directions;
  size_t weights_per_layer;
  Tensor h_0, c_0;  // [L*D, B, features] or none
  const Tensor* weights;

  // The k-th layer, on x.
  LayerCall layer(int k, const Tensor& x) const;
};

// How they should run side by side.
StackPlan plan_stack(const Stack& stack, const Tensor& x);

// Output, h_n and c_n or None, without gradients.
std::array<py::object, 3> infer(const Stack& stack, Tensor x);

// forward and backward of the autograd Function of a stack of plain tensors in one direction; its
// arguments are mode, number of layers, x, h_0, c_0 and all weights, and its results output, h_n
// and, of cells with a cell state, c_n. See run_function.h.
py::tuple record_stack(py::handle ctx, const std::string& mode, int layers,
                       const py::args& tensors);
py::object replay_stack(py::handle ctx, const py::args& gradients);

}  // namespace fastrnn
