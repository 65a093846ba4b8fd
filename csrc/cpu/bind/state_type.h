// PackedState as a type of CPython's own C interface. pybind11's look for the function, its table
// of instances and its conversions would take half a microsecond of a small layer's step, an
// eighth.
#pragma once

#include <memory>

#include "packed.h"

namespace fastrnn {

// Once: makes the type, as an attribute of the extension.
void add_state_type(py::module_& m);

py::object to_python(std::unique_ptr<PackedState> state);

}  // namespace fastrnn
