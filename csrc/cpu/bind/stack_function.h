// forward and backward of the autograd Function of a stack of plain layers in one direction: see
// run_function.h and run_stack.h. A stack is a record of a layer whose states and weights are those
// of all layers, and dropout [L-1, ..., P] between them, or None.
#pragma once

#include "../../python/tensor.h"
#include "../schedule.h"

namespace fastrnn {

// How such a stack should run side by side.
StackPlan plan_stack(py::handle record, int layers);

// It without a gradient: see StackResults::tuple.
py::tuple forward_stack(py::handle record, int layers, py::handle dropout);

// The same, with what backward needs.
py::tuple record_stack(py::handle ctx, int layers, py::handle options, py::handle dropout,
                       const py::args& tensors);
py::object replay_stack(py::handle ctx, const py::args& gradients);

}  // namespace fastrnn
