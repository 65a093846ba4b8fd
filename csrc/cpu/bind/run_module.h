// The direct path: an RNN module on plain tensors.
#pragma once

#include "../../python/tensor.h"

namespace fastrnn {

// All layers of a module, by its __dict__. functions: for each mode the autograd Function of a
// layer, as function(options, *tensors); stack: that of several, see run_stack.h. Returns what the
// module's forward returns; None where the call is more than that, or not right: then the module
// finds the words.
py::object run_module(py::handle module, py::handle input, py::handle hx,
                      const py::object& checkpoint_every, const py::dict& functions,
                      const py::object& stack);

}  // namespace fastrnn
