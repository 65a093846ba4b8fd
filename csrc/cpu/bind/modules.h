// Cells that are loaded at run time: see ../cell_module.h.
#pragma once

#include <string>

#include "../../python/layer.h"
#include "../cell_module.h"

namespace fastrnn {

struct Kernels {
  void (*forward)(const ForwardArgs& args, int threads);
  void (*backward)(const BackwardArgs& args, int threads);
};

// Loads a shared object; throws ImportError for what is none, or another cell's than `mode`.
void load_cell(const std::string& mode, const std::string& path);

bool has_module(int cell, DType dtype);

// Of a cell that is not one of the registry; throws ValueError where it was not loaded for a dtype.
Kernels module_kernels(int cell, DType dtype);

}  // namespace fastrnn
