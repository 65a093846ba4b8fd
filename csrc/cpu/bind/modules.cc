#include "modules.h"

#include <map>
#include <utility>

namespace fastrnn {

namespace {

std::map<std::pair<int, DType>, Kernels>& loaded() {
  static std::map<std::pair<int, DType>, Kernels> kernels;
  return kernels;
}

}  // namespace

void load_cell(const std::string& mode, uintptr_t address) {
  const auto& module = *reinterpret_cast<const CellModule*>(address);
  if (mode != module.traits.mode) {
    throw py::import_error("expected the cell " + mode + ", got " + module.traits.mode);
  }
  const int cell = define_cell(module.traits).index;
  loaded()[{cell, module.dtype}] = {module.forward, module.pack, module.backward};
}

bool has_module(int cell, DType dtype) { return loaded().count({cell, dtype}) > 0; }

Kernels module_kernels(int cell, DType dtype) {
  const auto found = loaded().find({cell, dtype});
  if (found != loaded().end()) return found->second;
  throw py::value_error(std::string("mode: expected a cell that is compiled for ") +
                        describe(static_cast<Element>(dtype)) + ", got " + cell_traits(cell).mode);
}

}  // namespace fastrnn
