// forward and backward of the autograd Function of a layer of plain tensors. They take part in the
// time of each small step, so nothing of them is in Python.
#pragma once

#include "../../python/tensor.h"

namespace fastrnn {

// forward, whose arguments are the layer's options, one tuple, and its tensors: output, h_n, of
// cells with a cell state c_n and, if asked for, every c_t.
py::tuple record(py::handle ctx, py::handle options, const py::args& tensors);

// backward; None where this one is not enough, since something watches or wants to differentiate it
// again.
py::object replay(py::handle ctx, const py::args& gradients);

}  // namespace fastrnn
