#include "modules.h"

#include <dlfcn.h>

#include <map>
#include <utility>

namespace fastrnn {

namespace {

std::map<std::pair<int, DType>, Kernels>& loaded() {
  static std::map<std::pair<int, DType>, Kernels> kernels;
  return kernels;
}

// Makes this library's FASTRNN_SHARED functions visible to those that are loaded later.
void show_library() {
  Dl_info own;
  if (dladdr(reinterpret_cast<void*>(&show_library), &own) != 0) {
    dlopen(own.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  }
}

}  // namespace

void load_cell(const std::string& mode, const std::string& path) {
  static const bool is_shown = (show_library(), true);
  static_cast<void>(is_shown);
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const void* const symbol = library == nullptr ? nullptr : dlsym(library, "fastrnn_cell");
  if (symbol == nullptr) throw py::import_error(dlerror());
  const auto& module = *static_cast<const CellModule*>(symbol);
  if (mode != module.traits.mode) {
    throw py::import_error(path + ": expected the cell " + mode + ", got " + module.traits.mode);
  }
  const int cell = add_cell(module.traits).index;
  loaded()[{cell, module.dtype}] = {module.forward, module.backward};
}

bool has_module(int cell, DType dtype) { return loaded().count({cell, dtype}) > 0; }

Kernels module_kernels(int cell, DType dtype) {
  const auto found = loaded().find({cell, dtype});
  if (found != loaded().end()) return found->second;
  throw py::value_error(std::string("mode: ") + cell_traits(cell).mode +
                        " has no kernel for this dtype");
}

}  // namespace fastrnn
