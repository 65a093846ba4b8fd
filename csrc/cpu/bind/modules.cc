#include "modules.h"

#include <map>
#include <utility>

#include "../../cells/registry.h"

namespace fastrnn {

namespace {

std::map<std::pair<int, DType>, const void*>& loaded() {
  static std::map<std::pair<int, DType>, const void*> loops;
  return loops;
}

}  // namespace

void load_cell(const std::string& mode, uintptr_t address) {
  const auto& module = *reinterpret_cast<const CellModule*>(address);
  if (mode != module.traits.mode) {
    throw py::import_error("expected the cell " + mode + ", got " + module.traits.mode);
  }
  const int cell = define_cell(module.traits).index;
  loaded()[{cell, module.dtype}] = module.loops;
}

bool has_module(int cell, DType dtype) { return loaded().count({cell, dtype}) > 0; }

const void* loops_of(int cell, DType dtype) {
  if (cell < Cells::size) return nullptr;
  const auto found = loaded().find({cell, dtype});
  if (found != loaded().end()) return found->second;
  throw py::value_error(std::string("mode: expected a cell that is compiled for ") +
                        describe(static_cast<Element>(dtype)) + ", got " + cell_traits(cell).mode);
}

}  // namespace fastrnn
