// Cells that are loaded at run time: see ../cell_module.h.
#pragma once

#include <cstdint>
#include <string>

#include "../../python/layer.h"
#include "../cell_module.h"

namespace fastrnn {

struct Kernels {
  void (*forward)(const ForwardArgs& args, int threads);
  int64_t (*pack)(const ForwardArgs& args, void* to);
  void (*backward)(const BackwardArgs& args, int threads);
};

// Takes up a CellModule that lies at the address, of a library that stays loaded. Throws
// ImportError for another cell's than `mode`.
void load_cell(const std::string& mode, uintptr_t address);

bool has_module(int cell, DType dtype);

// Of a cell that is not one of the registry; throws ValueError where it was not loaded for a dtype.
Kernels module_kernels(int cell, DType dtype);

}  // namespace fastrnn
