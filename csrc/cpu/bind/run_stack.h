// Layers on top of each other, the output of one being the next one's input: all in one call.
#pragma once

#include <vector>

#include "run_layer.h"

namespace fastrnn {

// Layers of one cell, with the states and weights of all of them together.
struct Stack {
  LayerCall every;  // what they share: all but x, states and weights
  int layers;
  size_t weights_per_layer;
  Tensor h_0, c_0;  // [L*D, B, features] or none
  Tensor dropout;   // [L-1, ..., D*P] or none: multiplies what each layer but the first takes
  const Tensor* weights;

  // The k-th layer, on x.
  LayerCall layer(int k, const Tensor& x) const;
};

// Part k of `parts` of a contiguous tensor, cut along its first dimension.
Tensor part_of(const Tensor& whole, int64_t k, int64_t parts);

// How they should run side by side.
StackPlan plan_stack(const Stack& stack, const Tensor& x);

struct StackResults {
  std::vector<Results> layers;  // without final states; of some layers none, if nobody asks for it
  std::vector<Made> dropped;    // with dropout: what each layer but the first took
  Made h_n, c_n;                // of all layers

  // Output, h_n, of cells with a cell state c_n, and with all_c the states of each step: the output
  // of each layer but the last, and of such cells the others of each layer.
  py::tuple tuple(const Stack& stack) const;
};

// Side by side or one after the other, as should be faster. Where backward follows, or with
// dropout, always by the scan of a stack, if need be on one thread.
StackResults forward(const Stack& stack, Tensor x);

}  // namespace fastrnn
