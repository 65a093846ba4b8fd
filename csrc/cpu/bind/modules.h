// Cells that are loaded at run time: see ../cell_module.h.
#pragma once

#include <cstdint>
#include <string>

#include "../../python/layer.h"
#include "../cell_module.h"

namespace fastrnn {

// Takes up a CellModule that lies at the address, of a library that stays loaded. Throws
// ImportError for another cell's than `mode`.
void load_cell(const std::string& mode, uintptr_t address);

bool has_module(int cell, DType dtype);

// LayerArgs::loops; throws ValueError where a cell of the user's was not loaded for a dtype.
const void* loops_of(int cell, DType dtype);

}  // namespace fastrnn
