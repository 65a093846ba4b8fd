// The CUDA kernels as Python sees them, and, in the tests, the same kernels on a CPU. A call is the
// record of a layer whose product with x is done, see ../python/layer.h, and what it writes.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cells/registry.h"
#include "../python/layer.h"
#include "cell_module.h"
#include "device.h"
#include "scan.h"

namespace fastrnn::cuda {
namespace {

using Optional = std::optional<Tensor>;
// What forward writes, as the record Results: output, h_n, c_n, extra and what it saves.
using Results = std::tuple<Tensor, Tensor, Optional, Optional, Optional>;
// What backward writes: `split` of RecurrenceBackward, d_gates, d_recurrent, d_h_0, d_c_0, d_inputs
// and d_parameters. The first five tensors are made where they are needed and not given, which they
// are where they must begin as zeros.
using Gradients = std::tuple<int, Optional, Optional, Optional, Optional, Optional, Optional>;
// Where a scan over some steps and one direction of a layer takes up and leaves what it carries,
// and the layer's first such step and direction.
using Part = std::optional<std::tuple<Tensor, int64_t, int>>;
// With layer normalisation: gains, scratch and, in backward, sums and gates of LayerNormArgs.
using Norm = std::optional<std::tuple<Tensor, Tensor, Optional, Optional>>;
// The tables of Places.
using Tables = std::tuple<Optional, std::vector<Tensor>, Optional>;

[[noreturn]] void fail(const std::string& name, const std::string& expected) {
  throw py::value_error(name + ": expected " + expected);
}

void require(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  const std::string from = std::to_string(least);
  const bool is_open = most == std::numeric_limits<int64_t>::max();
  fail(name, (is_open ? "at least " + from : from + " to " + std::to_string(most)) + ", got " +
                 std::to_string(value));
}

// Where a tensor lies that must be as expected; null for none.
void* memory(const LayerCall& layer, const char* name, const Tensor& tensor, const Shape& shape,
             Element element) {
  if (!tensor) return nullptr;
  expect(layer, name, tensor, shape, element);
  if (!tensor.is_contiguous) fail(name, "a contiguous tensor");
  return tensor.data;
}
void* memory(const LayerCall& layer, const char* name, const Optional& tensor, const Shape& shape,
             Element element) {
  return tensor ? memory(layer, name, *tensor, shape, element) : nullptr;
}
void* required(const char* name, void* memory) {
  if (memory == nullptr) fail(name, "a tensor, got None");
  return memory;
}

Problem make_problem(bool backward, const std::string& mode, int dtype, int64_t steps,
                     int64_t batch, int64_t hidden, int directions, bool reverse, bool tf32) {
  // Of any size; what a device can hold is the plan's matter.
  constexpr int64_t any = std::numeric_limits<int64_t>::max();
  const int cell = find_cell(mode);
  require("dtype", dtype, 0, kDTypes - 1);
  require("steps", steps, 0, any);
  require("batch", batch, 0, any);
  require("hidden", hidden, 1, any);
  require("directions", directions, 1, kMaxDirections);
  if (reverse && directions > 1) {
    fail("reverse", "False with directions=" + std::to_string(directions) + ", got True");
  }
  const auto type = static_cast<DType>(dtype);
  return {{cell, type, steps, batch, 0, hidden, hidden, directions, reverse, 0},
          backward ? Pass::kBackward : Pass::kForward,
          cell_traits(cell).recurrent,
          cell_traits(cell).states,
          tf32};
}

void set_places(Places& places, const LayerCall& layer, const Tables& tables) {
  const auto& [place, before, lengths] = tables;
  const auto table = [&](const char* name, const auto& tensor, const Shape& shape) {
    return static_cast<const int64_t*>(memory(layer, name, tensor, shape, Element::kInt64));
  };
  const ScanShape& shape = layer.shape;
  const bool has_before = layer.batch_sizes || layer.resets;
  if (before.size() != static_cast<size_t>(has_before ? shape.directions : 0)) {
    fail("before", "one table per direction where rows end or are reset");
  }
  places.place = table("place", place, {shape.steps, shape.batch});
  for (size_t d = 0; d < before.size(); ++d) {
    places.before[d] = table("before", before[d], {shape.steps, shape.batch});
  }
  places.lengths = table("lengths", lengths, {shape.batch});
  if (layer.batch_sizes && (!place || !lengths)) fail("place and lengths", "tensors, got None");
}

// A probability as a limit of random words: see ../cpu/zoneout.h.
uint32_t limit_of(double probability) { return static_cast<uint32_t>(probability * 4294967296.0); }

// Of a cell for one dtype.
struct Kernels {
  void (*forward)(const Cuda& device, const RecurrenceForward& args);
  void (*backward)(const Cuda& device, const RecurrenceBackward& args);
};

// The kernels of cells that were loaded, by cell and dtype.
std::map<std::pair<int, DType>, Kernels>& loaded() {
  static std::map<std::pair<int, DType>, Kernels> kernels;
  return kernels;
}

// Takes up a CellModule that lies at the address, of a library that stays loaded.
void load_cell(const std::string& mode, uintptr_t address) {
  const auto& module = *reinterpret_cast<const CellModule*>(address);
  if (mode != module.traits.mode) {
    throw py::import_error("expected the cell " + mode + ", got " + module.traits.mode);
  }
  const int cell = define_cell(module.traits).index;
  loaded()[{cell, module.dtype}] = {module.forward, module.backward};
}

Kernels kernels_of(int cell, DType dtype) {
  Kernels found{};
  Cells::visit(cell, [&](auto built_in) {
    using Cell = decltype(built_in);
    found = {forward_dev_impl<Cuda, Cell>, backward_dev_impl<Cuda, Cell>};
  });
  if (found.forward != nullptr) return found;
  const auto own = loaded().find({cell, dtype});
  if (own != loaded().end()) return own->second;
  fail("mode", std::string("a cell with a kernel for this dtype, got ") + cell_traits(cell).mode);
}

// A pass over one record: reads what both have, then launches.
class Scan {
 public:
  Scan(Pass pass, int device, const Plan& plan, py::handle record, const Optional& parameters,
       const Norm& norm, const Tables& tables, const Part& part, Recurrence& args)
      : layer_(read_layer(record)), device_(device), plan_(plan), problem_(args.problem) {
    const ScanShape& shape = layer_.shape;
    if (shape.proj != shape.hidden || layer_.weights[0].hr) fail("layer", "one without projection");
    if (layer_.rows == 0) fail("x", "at least one step");
    // A plan with tensor cores for float32 rounds to tf32.
    const CellTraits& traits = layer_.traits();
    args.problem = {shape, pass, traits.recurrent, traits.states, plan.tensor};
    args.total = layer_.rows;
    set_places(args.places, layer_, tables);
    const int64_t recurrent = traits.recurrent * shape.hidden;
    for (int d = 0; d < shape.directions; ++d) {
      args.weight_hh[d] = get("weight_hh", layer_.weights[d].hh, {recurrent, shape.hidden});
      args.bias_hh[d] = get("bias_hh", layer_.weights[d].bias_hh, {recurrent});
    }
    args.h_0 = get("h_0", layer_.h_0, states());
    args.c_0 = get("c_0", layer_.c_0, states(traits.states));
    args.inputs = get("inputs", layer_.inputs, steps(traits.inputs));
    args.parameters =
        get("parameters", parameters, {shape.directions, traits.parameters, shape.hidden});
    if (traits.parameters > 0) required("parameters", const_cast<void*>(args.parameters));
    const Shape every{1 + traits.states, shape.directions, shape.batch, shape.hidden};
    if (part) args.carried = get_computed("carried", std::get<0>(*part), every);
    args.h_mask = get("h_mask", layer_.h_mask, states());
    set_layer_norm(norm, args.layer_norm);
    args.zoneout = {
        {layer_.zoneout_h, layer_.zoneout_c},
        {limit_of(layer_.zoneout_h), limit_of(layer_.zoneout_c)},
        static_cast<const int64_t*>(memory(layer_, "seed", layer_.seed, {1}, Element::kInt64)),
        1 / (1 - layer_.zoneout_h),
        part ? std::get<1>(*part) : 0,
        part ? std::get<2>(*part) : 0};
  }

  const LayerCall& layer() const { return layer_; }
  void set_layer_norm(const Norm& norm, LayerNormArgs& args) const {
    if (norm.has_value() != layer_.layer_norm) fail("norm", "tensors with layer_norm alone");
    if (!norm) return;
    if (plan_.kind != Kind::kStep) fail("plan", "one of kind STEP with layer_norm");
    const auto& [gains, scratch, sums, gates] = *norm;
    const CellTraits& traits = layer_.traits();
    const int64_t hidden = layer_.shape.hidden, directions = layer_.directions;
    const int64_t all = traits.recurrent * hidden, of_c = traits.norms > 2 ? 2 * hidden : 0;
    args.gains = required("gains", get("gains", gains, {directions, all + of_c}));
    args.scratch = required(
        "scratch", get_computed("scratch", scratch, {directions, layer_.batch, all + 3 * hidden}));
    args.sums = get_computed("sums", sums, {directions, layer_.batch, 2 * all + 2 * hidden});
    args.gates = get("gates", gates, layer_.gates());
  }

  // The shapes of so many values of each unit: [D, B, columns*H], and of every step.
  Shape states(int columns = 1) const { return layer_.states(columns * layer_.shape.hidden); }
  Shape steps(int columns = 1) const {
    return layer_.steps(layer_.shape.directions * columns * layer_.shape.hidden);
  }
  Kernels kernels() const { return kernels_of(layer_.cell, layer_.shape.dtype); }

  // The memory of a tensor in the type of x, and of one in the type that is computed in.
  template <class Given>
  void* get(const char* name, const Given& tensor, const Shape& shape) const {
    return memory(layer_, name, tensor, shape, layer_.element());
  }
  template <class Given>
  void* get_computed(const char* name, const Given& tensor, const Shape& shape) const {
    return memory(layer_, name, tensor, shape, layer_.state_element());
  }

  // Where a tensor lies that a pass writes, in the type of x: a new one if none is given but
  // wanted. Returns the tensor, or None.
  py::object write(const char* name, const Optional& given, bool wanted, const Shape& shape,
                   void*& target) const {
    target = get(name, given, shape);
    if (given) return py::reinterpret_borrow<py::object>(given->object);
    if (!wanted) return py::none();
    py::object made = make_tensor(layer_.x, shape, layer_.element());
    target = view(made).data;
    return made;
  }

  // launch(where) with the GIL released.
  template <class F>
  void run(F&& launch) const {
    const int64_t words = Layout(problem_, plan_).workspace / int64_t{sizeof(int64_t)};
    const py::object workspace = make_tensor(layer_.x, {words}, Element::kInt64);
    const Cuda where{device_, current_stream(layer_.x), plan_, view(workspace).data};
    py::gil_scoped_release release;
    if (!is_possible(problem_, device_info(device_), plan_)) {
      throw std::invalid_argument("this plan cannot run this problem on this device");
    }
    set_device(device_);
    launch(where);
  }

 private:
  const LayerCall layer_;
  const int device_;
  const Plan& plan_;
  const Problem& problem_;
};

// gates: W_ih x + b_ih of all steps; what is saved may take their place.
void forward(int device, const Plan& plan, py::handle record, const Optional& parameters,
             const Norm& norm, const Tensor& gates, const Results& results, const Tables& tables,
             const Part& part) {
  RecurrenceForward args{};
  const Scan scan(Pass::kForward, device, plan, record, parameters, norm, tables, part, args);
  const LayerCall& layer = scan.layer();
  const CellTraits& traits = layer.traits();
  const auto& [output, h_n, c_n, extra, saved] = results;
  args.gates = scan.get("gates", gates, layer.gates());
  (layer.layer_norm ? args.layer_norm.raw : args.saved) = scan.get("saved", saved, layer.saved());
  args.output = scan.get("output", output, scan.steps());
  args.h_n = scan.get("h_n", h_n, scan.states());
  args.c_n = scan.get("c_n", c_n, scan.states(traits.states));
  if (traits.has_cell_state()) required("c_n", args.c_n);
  args.extra = scan.get_computed("extra", extra, scan.steps(traits.extras));
  const auto run = scan.kernels().forward;
  scan.run([&](const Cuda& where) { run(where, args); });
}

// Returns d_gates, d_recurrent, d_h_0, d_c_0 and d_inputs, None for what is not needed.
py::tuple backward(int device, const Plan& plan, py::handle record, const Optional& parameters,
                   const Norm& norm, py::handle saved_record, const Gradients& gradients,
                   const Tables& tables, const Part& part) {
  RecurrenceBackward args{};
  const Scan scan(Pass::kBackward, device, plan, record, parameters, norm, tables, part, args);
  const LayerCall& layer = scan.layer();
  const CellTraits& traits = layer.traits();
  const SavedCall saved = read_saved(layer, saved_record);
  args.output = scan.get("output", saved.output, scan.steps());
  if (layer.layer_norm) {
    args.layer_norm.raw = required("saved", scan.get("saved", saved.saved, layer.saved()));
    required("sums", args.layer_norm.sums);
    required("gates", const_cast<void*>(args.layer_norm.gates));
  } else if (traits.saves_gates()) {
    args.saved = scan.get("saved", saved.saved, layer.saved());
  }
  if (traits.has_extra()) {
    args.extra = scan.get_computed("extra", saved.extra, scan.steps(traits.extras));
  }
  args.grad_scale = scan.get_computed("grad_scale", layer.grad_scale, layer.grad_scale.shape);
  args.grad_clip = layer.grad_clip;
  args.d_output = scan.get("d_output", saved.d_output, scan.steps());
  args.d_h_n = scan.get("d_h_n", saved.d_h_n, scan.states());
  args.d_c_n = scan.get("d_c_n", saved.d_c_n, scan.states(traits.states));
  args.d_extra = scan.get_computed("d_extra", saved.d_extra, scan.steps(traits.states));

  const auto& [split, d_gates, d_recurrent, d_h_0, d_c_0, d_inputs, d_parameters] = gradients;
  const int64_t directions = layer.directions, hidden = layer.shape.hidden;
  const bool splits = layer.layer_norm || (traits.splits_gradient && traits.recurrent > 0);
  const int all = splits ? traits.recurrent : 0;
  const bool may_be_one = splits && layer.cell < Cells::size && !layer.layer_norm;
  if (split != all && !(may_be_one && split == 1)) {
    fail("split", std::to_string(all) + ", got " + std::to_string(split));
  }
  args.split = split;
  const auto& wanted = saved.wanted;
  py::tuple made = py::make_tuple(
      scan.write("d_gates", d_gates, true, layer.gates(), args.d_gates),
      scan.write("d_recurrent", d_recurrent, split > 0, {directions, layer.rows, split * hidden},
                 args.d_recurrent),
      scan.write("d_h_0", d_h_0, wanted[1], scan.states(), args.d_h_0),
      scan.write("d_c_0", d_c_0, wanted[2], scan.states(traits.states), args.d_c_0),
      scan.write("d_inputs", d_inputs, wanted[3], scan.steps(traits.inputs), args.d_inputs));
  args.d_parameters = scan.get_computed("d_parameters", d_parameters,
                                        {directions, traits.parameters, layer.batch, hidden});
  const auto run = scan.kernels().backward;
  scan.run([&](const Cuda& where) { run(where, args); });
  return made;
}

// Copies int64 values of the CPU to a tensor on a device.
void upload_values(int device, const Tensor& values, const Tensor& to) {
  for (const Tensor& tensor : {values, to}) {
    if (tensor.element != Element::kInt64 || !tensor.is_contiguous) {
      fail("values", "contiguous torch.int64 tensors, got " + describe(tensor.object));
    }
  }
  if (!values.is_on_cpu() || !(values.shape == to.shape)) {
    fail("values",
         "a tensor on cpu of shape " + to.shape.text() + ", got " + describe(values.object));
  }
  void* const stream = current_stream(to);
  py::gil_scoped_release release;
  set_device(device);
  upload(static_cast<const int64_t*>(values.data), values.shape.count(),
         static_cast<int64_t*>(to.data), stream);
}

}  // namespace
}  // namespace fastrnn::cuda

PYBIND11_MODULE(FASTRNN_MODULE, m) {
  namespace py = pybind11;
  using namespace fastrnn::cuda;
  m.def("set_torch", &fastrnn::set_torch);

  py::native_enum<Kind>(m, "Kind", "enum.IntEnum")
      .value("STEP", Kind::kStep)
      .value("GRID", Kind::kGrid)
      .value("CLUSTER", Kind::kCluster)
      .finalize();

  py::class_<DeviceInfo>(m, "DeviceInfo")
      .def(py::init<int, int64_t, int>(), py::arg("processors"), py::arg("shared"),
           py::arg("capability"))
      .def(py::init<int, int64_t, int, const std::array<int, 4>&>(), py::arg("processors"),
           py::arg("shared"), py::arg("capability"), py::arg("clusters"))
      .def_readonly("clusters", &DeviceInfo::clusters)
      .def_readonly("processors", &DeviceInfo::processors)
      .def_readonly("shared", &DeviceInfo::shared)
      .def_readonly("capability", &DeviceInfo::capability);

  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::arg("backward"), py::arg("cell"), py::arg("dtype"),
           py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("directions"),
           py::arg("reverse"), py::arg("tf32"));

  py::class_<Plan>(m, "Plan")
      .def(py::init<Kind, int, int, int, int, bool, bool, int, bool>(), py::arg("kind"),
           py::arg("units"), py::arg("rows"), py::arg("slices"), py::arg("cluster"),
           py::arg("resident"), py::arg("tensor"), py::arg("kept") = 0, py::arg("mbarrier") = true)
      .def_readonly("kind", &Plan::kind)
      .def_readonly("units", &Plan::units)
      .def_readonly("rows", &Plan::rows)
      .def_readonly("slices", &Plan::slices)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("tensor", &Plan::tensor)
      .def_readonly("kept", &Plan::kept)
      .def_readonly("mbarrier", &Plan::mbarrier)
      .def("shared",
           [](const Plan& plan, const Problem& problem) { return Layout(problem, plan).shared; })
      .def("blocks", [](const Plan& plan, const Problem& problem) {
        return Layout(problem, plan).blocks(problem.directions);
      });

  py::class_<Terms>(m, "Terms")
      .def_readonly("states", &Terms::states)
      .def_readonly("product", &Terms::product)
      .def_readonly("sums", &Terms::sums)
      .def_readonly("cells", &Terms::cells)
      .def_readonly("hand_over", &Terms::hand_over)
      .def_readonly("turns", &Terms::turns)
      .def_property_readonly("cycles", &Terms::cycles);
  m.def("step_terms", &step_terms, py::arg("problem"), py::arg("device"), py::arg("plan"));

  m.def("make_plan", &make_plan, py::arg("problem"), py::arg("device"),
        py::arg("kind") = py::none(), py::arg("mbarrier") = true);
  m.def("is_possible", &is_possible, py::arg("problem"), py::arg("device"), py::arg("plan"));
  m.def("device_info", &device_info, py::arg("device"));
  m.attr("built_for") = built_for();
  m.def("upload", &upload_values, py::arg("device"), py::arg("values"), py::arg("to"));
  m.def("load_cell", &load_cell, py::arg("mode"), py::arg("address"));
  m.def("forward", &forward, py::arg("device"), py::arg("plan"), py::arg("layer"),
        py::arg("parameters"), py::arg("norm"), py::arg("gates"), py::arg("results"),
        py::arg("tables"), py::arg("part") = py::none());
  m.def("backward", &backward, py::arg("device"), py::arg("plan"), py::arg("layer"),
        py::arg("parameters"), py::arg("norm"), py::arg("saved"), py::arg("gradients"),
        py::arg("tables"), py::arg("part") = py::none());
}
