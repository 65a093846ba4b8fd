// forward and backward of the autograd Function of a layer of plain tensors. They take part in the
// time of each small step, so nothing of them is in Python.
#pragma once

#include <vector>

#include "../../python/layer.h"

namespace fastrnn {

// The record that the Function's arguments make: the layer's options, one tuple, and its tensors.
class FunctionFields {
 public:
  static constexpr size_t kOptions = static_cast<size_t>(LayerField::kX);
  static constexpr size_t kSingle = static_cast<size_t>(LayerField::kWeights) - kOptions;

  FunctionFields(py::handle options, const py::tuple& tensors);

  LayerFields all;

 private:
  py::tuple weights_;
};

// Keeps options and tensors in ctx for backward, which is not to be given zeros for nothing.
void save(py::handle ctx, py::handle options, const std::vector<PyObject*>& tensors);

// forward: output, h_n, of cells with a cell state c_n and, if asked for, every c_t.
py::tuple record(py::handle ctx, py::handle options, const py::args& tensors);

// backward; None where this one is not enough, since something watches or wants to differentiate it
// again.
py::object replay(py::handle ctx, const py::args& gradients);

}  // namespace fastrnn
