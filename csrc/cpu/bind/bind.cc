// The CPU kernels as Python sees them, and what of a layer call is the same for every device: the
// record's check, and the cells' traits. Tensors come as they are; nothing of libtorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "../../cells/registry.h"
#include "../../python/layer.h"
#include "../rate.h"
#include "../variant.h"
#include "inspector.h"
#include "int8_layer.h"
#include "modules.h"
#include "packed.h"
#include "run_function.h"
#include "run_layer.h"
#include "run_module.h"
#include "stack_function.h"
#include "state_type.h"

namespace fastrnn {
namespace {

// The same of a record Saved.
py::list backward_of(py::handle layer, py::handle saved) {
  const LayerCall call = read_layer(layer);
  py::list list;
  for (const py::object& gradient : backward(call, read_saved(call, saved))) {
    list.append(gradient);
  }
  return list;
}

// All tensors in a record, and in tuples and lists that it has.
bool are_contiguous(const py::tuple& record) {
  const auto is_other = [](py::handle value) {
    return is_tensor(value) && !view(value).is_contiguous;
  };
  for (const py::handle value : record) {
    if (is_other(value)) return false;
    if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr())) continue;
    for (const py::handle each : value) {
      if (is_other(each)) return false;
    }
  }
  return true;
}

double checked_rate(int threads) {
  const int most = std::max<int>(torch_threads(), std::thread::hardware_concurrency());
  if (threads < 1 || threads > most) {  // OpenMP ends the process where it cannot start them
    throw py::value_error("threads: expected 1 to " + std::to_string(most) + ", got " +
                          std::to_string(threads));
  }
  return multiply_add_rate(threads);
}

double checked_tile_rate(int vectors, int64_t depth, bool transposed) {
  if (vectors < 1 || vectors > 4) {
    throw py::value_error("vectors: expected 1 to 4, got " + std::to_string(vectors));
  }
  constexpr int64_t kMostDepth = 1 << 16;
  if (depth < 1 || depth > kMostDepth) {
    throw py::value_error("depth: expected 1 to " + std::to_string(kMostDepth) + ", got " +
                          std::to_string(depth));
  }
  return tile_rate(vectors, depth, transposed);
}

}  // namespace
}  // namespace fastrnn

PYBIND11_MODULE(_cpu, m) {
  using namespace fastrnn;
  active_variant();  // a wrong FASTRNN_CPU fails the import, not the first call

  m.def("set_torch", &set_torch);
  m.def("exchange", [] { return std::string(exchange_name()); });
  m.def("inspect", &inspect);

  py::class_<CellTraits>(m, "CellInfo")
      .def_readonly("index", &CellTraits::index)
      .def_readonly("gates", &CellTraits::gates)
      .def_readonly("recurrent", &CellTraits::recurrent)
      .def_readonly("states", &CellTraits::states)
      .def_readonly("extras", &CellTraits::extras)
      .def_readonly("saves", &CellTraits::saves)
      .def_readonly("inputs", &CellTraits::inputs)
      .def_readonly("parameters", &CellTraits::parameters)
      .def_readonly("norms", &CellTraits::norms)
      .def_property_readonly("has_cell_state", &CellTraits::has_cell_state)
      .def_property_readonly("has_extra", &CellTraits::has_extra)
      .def_property_readonly("saves_gates", &CellTraits::saves_gates)
      .def_readonly("splits_gradient", &CellTraits::splits_gradient);
  py::dict cells;
  for (int i = 0; i < Cells::size; ++i) {
    Cells::visit(i, [&](auto cell) { cells[decltype(cell)::mode] = cell_traits(i); });
  }
  m.def(
      "add_cell",
      [](const std::string& mode, int gates, int recurrent, int states, int inputs,
         int parameters) -> const CellTraits& {
        const int norms = recurrent > 0 ? 2 : 0;
        return declare_cell({mode.c_str(), -1, gates, recurrent, states, states, 0, inputs,
                             parameters, norms, false, false, false});
      },
      py::return_value_policy::reference);
  m.def("load_cell", &load_cell);
  m.def("define_cell",
        [](uintptr_t address) { define_cell(*reinterpret_cast<const CellTraits*>(address)); });
  m.attr("cells") = cells;
  m.attr("layer_fields") = layer_fields();

  m.def("int8_variant", [] { return std::string(active_int8_kernels().name); });

  m.def("cpu_variant", [] { return std::string(active_variant().name); });
  m.def("cpu_variant_flags", [] { return std::string(active_variant().flags); });
  m.def("cpu_variants", [] {
    int count = 0;
    const CpuVariant* const* variants = runnable_variants(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(variants[i]->name);
    return names;
  });
  m.def("multiply_add_rate", &checked_rate);
  m.def("tile_rate", &checked_tile_rate);
  m.def("run_module", &run_module);
  m.def("check", [](py::handle layer) { read_layer(layer); });
  m.def("is_contiguous", &are_contiguous);
  m.def("check_saved",
        [](py::handle layer, py::handle saved) { read_saved(read_layer(layer), saved); });
  m.def("forward", [](py::handle layer) { return forward(read_layer(layer)).tuple(); });
  m.def("backward", &backward_of);
  m.def("plan_stack", [](py::handle record, int layers) {
    const StackPlan plan = plan_stack(record, layers);
    return py::make_tuple(plan.threads, plan.row_parts, plan.chunk);
  });
  m.attr("least_stack_steps") = kLeastStackSteps;
  m.def("forward_stack", &forward_stack);
  py::class_<PackedLayer, std::shared_ptr<PackedLayer>>(m, "PackedLayer")
      .def(py::init([](py::handle layer, const std::string& storage) {
        return pack(read_layer(layer), storage);
      }))
      .def_property_readonly("bytes", &PackedLayer::bytes)
      .def_property_readonly("mode",
                             [](const PackedLayer& p) { return cell_traits(p.shape().cell).mode; })
      .def_property_readonly("hidden_size", [](const PackedLayer& p) { return p.shape().hidden; })
      .def_property_readonly("proj_size", [](const PackedLayer& p) { return p.shape().proj; })
      .def("forward", [](const PackedLayer& packed, py::handle layer) {
        return forward(layer, packed).tuple();
      });
  py::class_<Int8Layer, PackedLayer, std::shared_ptr<Int8Layer>>(m, "Int8Layer")
      .def(py::init<py::handle, int, py::handle, py::handle>())
      .def_property_readonly("weights", &Int8Layer::weights)
      .def_property_readonly("scales", &Int8Layer::scales);
  py::class_<PackedModel, std::shared_ptr<PackedModel>>(m, "PackedModel")
      .def(py::init<std::vector<std::shared_ptr<PackedLayer>>, const py::dict&, const py::list&>())
      .def_property_readonly("layers", &PackedModel::layers)
      .def_property_readonly("bytes", &PackedModel::bytes)
      .def("is_current", &PackedModel::is_current)
      .def("step", &PackedModel::step)
      .def("run", &PackedModel::run)
      .def("start",
           [](std::shared_ptr<PackedModel> model, py::dict module, int64_t batch, bool is_batched,
              py::handle h, py::handle c) {
             return to_python(std::make_unique<PackedState>(std::move(model), std::move(module),
                                                            batch, is_batched, h, c));
           })
      // What is packed for this processor and these parameters is no part of a copy.
      .def("__reduce__", [](const PackedModel&) {
        return py::make_tuple(py::type::of(py::none()), py::tuple());
      });
  add_state_type(m);
  m.def("record", &record);
  m.def("replay", &replay);
  m.def("record_stack", &record_stack);
  m.def("replay_stack", &replay_stack);
}
