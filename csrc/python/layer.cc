#include "layer.h"

#include <algorithm>
#include <deque>
#include <iterator>
#include <limits>
#include <string_view>
#include <vector>

#include "../cells/general.h"
#include "../cells/registry.h"

namespace fastrnn {

namespace {

// The cells of the registry, and after them those that were added since.
std::deque<CellTraits>& all_traits() {
  static std::deque<CellTraits> traits = [] {
    std::deque<CellTraits> built_in;
    for (int i = 0; i < Cells::size; ++i) {
      Cells::visit(i, [&](auto cell) { built_in.push_back(traits_of<decltype(cell)>(i)); });
    }
    return built_in;
  }();
  return traits;
}

Tensor view_field(const char* name, py::handle object) {
  if (!is_tensor(object)) fail(name, "expected a tensor, got ", describe(object));
  try {
    return view(object);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    fail(name, "expected a tensor with memory, got ", describe(object), ": ",
         std::string(py::str(error.value())));
  } catch (const py::value_error& error) {
    fail(name, error.what());
  }
}

int64_t to_int(const char* name, py::handle object, int64_t least) {
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    fail(name, "expected an integer of 64 bits, got ", describe(object));
  }
  if (value < least) {
    fail(name, "expected at least ", std::to_string(least), ", got ", std::to_string(value));
  }
  return value;
}

// At least 0, and below `limit`.
double to_float(const char* name, py::handle object, double limit) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    fail(name, "expected a number, got ", describe(object));
  }
  if (!(value >= 0 && value < limit)) {
    const std::string most = limit <= 1 ? "in [0, 1)" : "of at least 0";
    fail(name, "expected a finite number ", most, ", got ", std::string(py::repr(object)));
  }
  return value;
}

bool to_bool(const char* name, py::handle object) {
  const int value = PyObject_IsTrue(object.ptr());
  if (value < 0) {
    PyErr_Clear();
    fail(name, "expected a bool, got ", describe(object));
  }
  return value == 1;
}

}  // namespace

int find_cell(py::handle mode) {
  if (!PyUnicode_Check(mode.ptr())) fail("mode", "expected a str, got ", describe(mode));
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(mode.ptr(), &size);
  if (text != nullptr) return find_cell(std::string(text, size));
  PyErr_Clear();  // half of a surrogate pair, which is no text
  return find_cell(py::repr(mode));
}

namespace {

// Direction by direction, see read_direction.
void read_weights(LayerCall& layer, py::handle sequence) {
  if (!PySequence_Check(sequence.ptr())) {
    fail("weights", "expected a sequence of tensors, got ", describe(sequence));
  }
  PyObject* const items = PySequence_Tuple(sequence.ptr());
  if (items == nullptr) throw py::error_already_set();
  layer.own_weights = py::reinterpret_steal<py::tuple>(items);
  const auto count = static_cast<int64_t>(layer.own_weights.size());
  const CellTraits& traits = layer.traits();
  if (layer.layer_norm && traits.norms == 0) {
    fail("layer_norm", "expected False for ", traits.mode, ", got True");
  }
  expect_weights(traits, count, layer.directions, layer.layer_norm);
  const int64_t each = count / layer.directions;
  Py_ssize_t next = 0;
  for (int d = 0; d < layer.directions; ++d) {
    const int vectors = traits.vectors(layer.layer_norm);
    read_direction(layer.weights[d], traits, each, vectors,
                   [&](const char* name, const char* reverse) {
                     return view_field(d == 0 ? name : reverse, PyTuple_GET_ITEM(items, next++));
                   });
  }
}

struct Field {
  const char* name;
  void (*read)(LayerCall& layer, py::handle value);
};
constexpr Field kFields[] = {
    {"mode", [](LayerCall& l, py::handle v) { l.cell = find_cell(v); }},
    {"directions",
     [](LayerCall& l, py::handle v) {
       const int64_t directions = to_int("directions", v, 1);
       if (directions > kMaxDirections) {
         fail("directions", "expected 1 or 2, got ", std::to_string(directions));
       }
       l.directions = static_cast<int>(directions);
     }},
    {"batch", [](LayerCall& l, py::handle v) { l.batch = to_int("batch", v, 0); }},
    {"reverse", [](LayerCall& l, py::handle v) { l.reverse = to_bool("reverse", v); }},
    {"checkpoint_every",
     [](LayerCall& l, py::handle v) { l.checkpoint_every = to_int("checkpoint_every", v, 0); }},
    {"keep", [](LayerCall& l, py::handle v) { l.keep = to_bool("keep", v); }},
    {"all_c", [](LayerCall& l, py::handle v) { l.all_c = to_bool("all_c", v); }},
    {"grad_clip",
     [](LayerCall& l, py::handle v) {
       l.grad_clip = to_float("grad_clip", v, std::numeric_limits<double>::infinity());
     }},
    {"zoneout_h", [](LayerCall& l, py::handle v) { l.zoneout_h = to_float("zoneout_h", v, 1); }},
    {"zoneout_c", [](LayerCall& l, py::handle v) { l.zoneout_c = to_float("zoneout_c", v, 1); }},
    {"layer_norm", [](LayerCall& l, py::handle v) { l.layer_norm = to_bool("layer_norm", v); }},
    {"x", [](LayerCall& l, py::handle v) { l.x = view_field("x", v); }},
    {"h_0", [](LayerCall& l, py::handle v) { l.h_0 = view_optional("h_0", v); }},
    {"c_0", [](LayerCall& l, py::handle v) { l.c_0 = view_optional("c_0", v); }},
    {"batch_sizes",
     [](LayerCall& l, py::handle v) { l.batch_sizes = view_optional("batch_sizes", v); }},
    {"resets", [](LayerCall& l, py::handle v) { l.resets = view_optional("resets", v); }},
    {"grad_scale",
     [](LayerCall& l, py::handle v) { l.grad_scale = view_optional("grad_scale", v); }},
    {"h_mask", [](LayerCall& l, py::handle v) { l.h_mask = view_optional("h_mask", v); }},
    {"seed", [](LayerCall& l, py::handle v) { l.seed = view_optional("seed", v); }},
    {"inputs", [](LayerCall& l, py::handle v) { l.inputs = view_optional("inputs", v); }},
    {"weights", read_weights},
};

static_assert(std::size(kFields) == kLayerFields);
static_assert(kFields[static_cast<int>(LayerField::kX)].name == std::string_view("x"));
static_assert(kFields[static_cast<int>(LayerField::kWeights)].name == std::string_view("weights"));

// T and N, of a sequence [T, B, I], or ragged [N, I].
void check_rows(LayerCall& layer) {
  const Tensor& x = layer.x;
  ScanShape& shape = layer.shape;
  if (!layer.batch_sizes || layer.has_mask()) {
    if (x.shape.dims() != 3 || x.shape[1] != layer.batch) {
      fail("x", "expected [T, ", std::to_string(layer.batch), ", features], got ", x.shape.text());
    }
    shape.steps = x.shape[0];
    layer.rows = x.shape[0] * x.shape[1];
    if (layer.has_mask()) {
      expect(layer, "mask", layer.batch_sizes, {shape.steps, layer.batch}, Element::kBool);
    }
    return;
  }
  if (x.shape.dims() != 2) fail("x", "expected [N, features], got ", x.shape.text());
  const Tensor& sizes = layer.batch_sizes;
  if (sizes.element != Element::kInt64 || sizes.shape.dims() != 1 || !sizes.is_on_cpu() ||
      !sizes.is_contiguous) {
    fail("batch_sizes", "expected a contiguous torch.int64 tensor [T] on cpu, got ",
         describe(sizes.object));
  }
  shape.steps = sizes.shape[0];
  layer.rows = x.shape[0];
  const auto* alive = static_cast<const int64_t*>(sizes.data);
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t most = layer.batch, sum = 0;
  for (int64_t t = 0; t < shape.steps; ++t) {
    if (alive[t] < 0 || alive[t] > most) {
      fail("batch_sizes", "expected not to increase and to lie in [0, ",
           std::to_string(layer.batch), "], got ", std::to_string(alive[t]), " at step ",
           std::to_string(t));
    }
    most = alive[t];
    sum = alive[t] > kMost - sum ? kMost : sum + alive[t];
  }
  if (sum != layer.rows) {
    fail("batch_sizes", "expected to add up to the ", std::to_string(layer.rows),
         " rows of x, got ", std::to_string(sum));
  }
}

// x but for its rows.
void check_features(const LayerCall& layer) {
  const Shape& shape = layer.x.shape;
  if (shape.dims() < 2 || shape[shape.dims() - 1] < 1) {
    fail("x", "expected at least one feature per step, got ", shape.text());
  }
  if (layer.reverse && layer.directions != 1) {
    fail("reverse", "expected False for 2 directions, got True");
  }
}

// Rows without any step are in no tensor that must be given, yet the kernels allot them states of
// up to `features`.
void check_batch(const LayerCall& layer, int64_t features) {
  constexpr int64_t kMostElements = int64_t{1} << 56;
  const int64_t most = kMostElements / features;
  if (layer.batch > most) {
    fail("batch", "expected at most ", std::to_string(most), ", got ", std::to_string(layer.batch));
  }
}

// What stands beside x: marks of steps, initial states, masks, inputs.
void check_states(const LayerCall& layer) {
  const char* const mode = layer.traits().mode;
  Shape marks;
  for (int i = 0; i + 1 < layer.x.shape.dims(); ++i) marks.push(layer.x.shape[i]);
  if (layer.resets) expect(layer, "resets", layer.resets, marks, Element::kBool);
  if (layer.grad_scale) {
    expect(layer, "grad_scale", layer.grad_scale, marks, layer.state_element());
  }
  if (layer.h_mask && layer.traits().recurrent == 0) {
    fail("h_mask", "expected None for ", mode, ", which has no weight_hh, got ",
         describe(layer.h_mask.object));
  }
  if (layer.h_mask) {
    expect(layer, "h_mask", layer.h_mask, layer.states(layer.shape.proj), layer.element());
  }
  if (layer.seed) expect(layer, "seed", layer.seed, {1}, Element::kInt64);
  if (layer.zoneout_c > 0 && !layer.traits().rebuilds_cell_state) {
    fail("zoneout_c", "expected 0 for ", mode, ", got ", std::to_string(layer.zoneout_c));
  }
  if (layer.h_0) expect(layer, "h_0", layer.h_0, layer.states(layer.shape.proj), layer.element());
  if (layer.c_0 && !layer.traits().has_cell_state()) {
    fail("c_0", "expected None for ", mode, ", which has no cell state, got ",
         describe(layer.c_0.object));
  }
  const int64_t hidden = layer.shape.hidden;
  if (layer.c_0) {
    expect(layer, "c_0", layer.c_0, layer.states(layer.traits().states * hidden), layer.element());
  }
  if (const int64_t width = layer.directions * layer.traits().inputs * hidden; width > 0) {
    if (!layer.inputs) fail("inputs", "expected a tensor for ", mode, ", got None");
    expect(layer, "inputs", layer.inputs, layer.steps(width), layer.element());
  } else if (layer.inputs) {
    fail("inputs", "expected None for ", mode, ", which has none, got ",
         describe(layer.inputs.object));
  }
}

void check_weights(const LayerCall& layer) {
  const auto [cell, dtype, steps, batch, input, hidden, proj, directions, reverse, every] =
      layer.shape;
  const CellTraits& traits = layer.traits();
  const int64_t gates = traits.gates * hidden, recurrent = traits.recurrent * hidden;
  for (int d = 0; d < directions; ++d) {
    const LayerCall::Weights& w = layer.weights[d];
    expect(layer, "weight_ih", w.ih, {gates, input}, layer.element());
    if (recurrent > 0) expect(layer, "weight_hh", w.hh, {recurrent, proj}, layer.element());
    if (w.bias_ih) expect(layer, "bias_ih", w.bias_ih, {gates}, layer.element());
    if (w.bias_hh) expect(layer, "bias_hh", w.bias_hh, {recurrent}, layer.element());
    if (w.hr) expect(layer, "weight_hr", w.hr, {proj, hidden}, layer.element());
    const std::vector<int64_t> sizes = layer.vector_sizes();
    for (size_t q = 0; q < sizes.size(); ++q) {
      expect(layer, "parameter", w.parameters[q], {sizes[q]}, layer.element());
    }
  }
}

// What forward made, as far as backward reads it.
void check_results(const LayerCall& layer, const SavedCall& given) {
  const CellTraits& traits = layer.traits();
  const ScanShape& shape = layer.shape;
  const Element element = layer.element(), state = layer.state_element();
  const bool recomputes = shape.checkpoint_every > 0;
  const auto expect_if = [&](bool is_read, const char* name, const Tensor& tensor,
                             const Shape& expected, Element type) {
    if (!is_read) return;
    if (!tensor) fail(name, "expected a tensor, got None");
    expect(layer, name, tensor, expected, type);
  };
  expect_if(true, "output", given.output, layer.steps(shape.directions * shape.proj), element);
  expect_if(traits.has_extra() && !recomputes, "extra", given.extra,
            layer.steps(shape.directions * traits.extras * shape.hidden), state);
  expect_if(recomputes, "saved", given.saved, layer.boundaries(), state);
  expect_if(layer.saves() > 0 && !recomputes, "saved", given.saved, layer.saved(), element);
}

void check_incoming(const LayerCall& layer, const SavedCall& given) {
  const ScanShape& shape = layer.shape;
  const Element element = layer.element();
  const auto expect_given = [&](const char* name, const Tensor& tensor, const Shape& expected,
                                Element type) {
    if (tensor) expect(layer, name, tensor, expected, type);
  };
  expect_given("d_output", given.d_output, layer.steps(shape.directions * shape.proj), element);
  expect_given("d_h_n", given.d_h_n, layer.states(shape.proj), element);
  if (const int64_t width = layer.traits().states * shape.hidden; width > 0) {
    expect_given("d_c_n", given.d_c_n, layer.states(width), element);
    expect_given("d_extra", given.d_extra, layer.steps(shape.directions * width),
                 layer.state_element());
  } else if (given.d_c_n || given.d_extra) {
    fail(given.d_c_n ? "d_c_n" : "d_extra", "expected None for ", layer.traits().mode,
         ", which has no cell state, got ",
         describe((given.d_c_n ? given.d_c_n : given.d_extra).object));
  }
}

void check_wanted(const LayerCall& layer, const SavedCall& given) {
  const size_t inputs = 4 + layer.own_weights.size();
  if (given.wanted.size() != inputs) {
    fail("wanted", "expected ", std::to_string(inputs),
         " entries, of x, h_0, c_0, inputs and each weight, got ",
         std::to_string(given.wanted.size()));
  }
  if (given.wanted[2] && !layer.traits().has_cell_state()) {
    fail("wanted", "expected False for c_0 of ", layer.traits().mode,
         ", which has no cell state, got True");
  }
  if (given.wanted[3] && layer.traits().inputs == 0) {
    fail("wanted", "expected False for inputs of ", layer.traits().mode,
         ", which has none, got True");
  }
}

}  // namespace

void expect_weights(const CellTraits& traits, int64_t count, int directions, bool layer_norm) {
  if (traits.has_weights(count, directions, layer_norm)) return;
  fail("weights", "expected ", std::to_string(traits.least_weights(layer_norm)), " to ",
       std::to_string(traits.most_weights(layer_norm)), " tensors per direction, got ",
       std::to_string(count), " for ", std::to_string(directions),
       directions == 1 ? " direction" : " directions");
}

const CellTraits& cell_traits(int cell) { return all_traits()[cell]; }

const CellTraits& declare_cell(CellTraits traits) {
  static std::deque<std::string> names;
  std::deque<CellTraits>& all = all_traits();
  for (const CellTraits& known : all) {
    if (std::string_view(known.mode) == traits.mode) return known;
  }
  traits.mode = names.emplace_back(traits.mode).c_str();
  traits.index = static_cast<int>(all.size());
  return all.emplace_back(traits);
}

const CellTraits& define_cell(CellTraits traits) {
  const CellTraits& declared = declare_cell(traits);
  traits.mode = declared.mode;
  traits.index = declared.index;
  return all_traits()[declared.index] = traits;
}

int find_cell(const std::string& mode) {
  std::string known;
  for (const CellTraits& cell : all_traits()) {
    if (mode == cell.mode) return cell.index;
    known += (known.empty() ? "" : ", ") + std::string(cell.mode);
  }
  fail("mode", "expected one of ", known, ", got ", mode);
}

Shape LayerCall::steps(int64_t features) const {
  Shape shape;
  for (int i = 0; i + 1 < x.shape.dims(); ++i) shape.push(x.shape[i]);
  shape.push(features);
  return shape;
}

Shape LayerCall::states(int64_t features) const { return {directions, batch, features}; }

Shape LayerCall::gates() const { return {directions, rows, traits().gates * shape.hidden}; }
Shape LayerCall::saved() const { return {directions, rows, saves() * shape.hidden}; }

std::vector<int64_t> LayerCall::vector_sizes() const {
  const CellTraits& t = traits();
  std::vector<int64_t> sizes(t.vectors(layer_norm), shape.hidden);
  if (layer_norm) {
    sizes[0] *= t.gates;
    sizes[1] *= t.recurrent;
  }
  return sizes;
}

Shape LayerCall::boundaries() const {
  const int64_t segments =
      (shape.steps + shape.checkpoint_every - 1) / std::max<int64_t>(1, shape.checkpoint_every);
  const int64_t features = shape.proj + traits().states * shape.hidden;
  return {std::max<int64_t>(0, segments - 1), directions, batch, features};
}

bool LayerCall::keeps_extra() const {
  const CellTraits& t = traits();
  if (!t.has_extra()) return false;
  return (all_c && t.has_cell_state()) || (keep && shape.checkpoint_every == 0);
}

void LayerCall::complete() {
  if (element() > Element::kFloat16) {
    fail("x", "expected torch.float32, float64, bfloat16 or float16, got ", describe(x.object));
  }
  check_features(*this);
  // H is read off W_hh, if there is one: it knows P, too.
  const bool has_hh = traits().recurrent > 0;
  const Tensor& hh = has_hh ? weights[0].hh : weights[0].ih;
  const int gates = has_hh ? traits().recurrent : traits().gates;
  if (hh.shape.dims() != 2 || hh.shape[0] < gates || hh.shape[0] % gates != 0 || hh.shape[1] < 1) {
    fail(has_hh ? "weight_hh" : "weight_ih", "expected [", std::to_string(gates),
         has_hh ? " * H, H], got " : " * H, I], got ", hh.shape.text());
  }
  shape = {cell,
           static_cast<DType>(element()),
           0,
           batch,
           x.shape[x.shape.dims() - 1],
           hh.shape[0] / gates,
           has_hh ? hh.shape[1] : hh.shape[0] / gates,
           directions,
           reverse,
           checkpoint_every};
  if (weights[0].hr && !traits().can_project()) {
    fail("weight_hr", "expected None for ", traits().mode, ", which has no projection, got ",
         describe(weights[0].hr.object));
  }
  if (!weights[0].hr && shape.proj != shape.hidden) {
    fail("weight_hh", "expected ", std::to_string(shape.hidden), " columns, got ", hh.shape.text());
  }
  check_batch(*this, std::max({hh.shape[0], hh.shape[1], shape.input}));
  check_rows(*this);
  // A single segment is the plain scan, and so is a cell whose backward reads the output alone.
  if (shape.checkpoint_every >= shape.steps || saves() == 0) shape.checkpoint_every = 0;
  check_weights(*this);
  check_states(*this);
}

void LayerCall::complete(const ScanShape& own) {
  const std::string mode = traits().mode;
  if (cell != own.cell) fail("mode", "expected ", cell_traits(own.cell).mode, ", got ", mode);
  if (directions != own.directions) {
    fail("directions", "expected ", std::to_string(own.directions), ", got ",
         std::to_string(directions));
  }
  if (element() != static_cast<Element>(own.dtype)) {
    fail("x", "expected ", describe(static_cast<Element>(own.dtype)), ", got ", describe(x.object));
  }
  check_features(*this);
  shape = own;
  shape.batch = batch;
  shape.reverse = reverse;
  if (x.shape[x.shape.dims() - 1] != own.input) {
    fail("x", "expected ", std::to_string(own.input), " features, got ", x.shape.text());
  }
  check_batch(*this, std::max({traits().gates * own.hidden, own.proj, own.input}));
  check_rows(*this);
  check_states(*this);
}

py::tuple layer_fields() {
  py::tuple names(std::size(kFields));
  for (size_t i = 0; i < std::size(kFields); ++i) names[i] = kFields[i].name;
  return names;
}

LayerFields record_fields(py::handle record) {
  if (!PyTuple_Check(record.ptr()) || PyTuple_GET_SIZE(record.ptr()) != kLayerFields) {
    fail("layer", "expected a Layer of ", std::to_string(kLayerFields), " fields, got ",
         describe(record));
  }
  LayerFields fields;
  for (int i = 0; i < kLayerFields; ++i) fields[i] = PyTuple_GET_ITEM(record.ptr(), i);
  return fields;
}

LayerCall read_layer(py::handle record) { return read_layer(record_fields(record)); }

LayerCall read_layer(py::handle record, const ScanShape& own) {
  const LayerFields fields = record_fields(record);
  LayerCall layer;
  for (int i = 0; i < static_cast<int>(LayerField::kWeights); ++i) {
    kFields[i].read(layer, fields[i]);
  }
  layer.complete(own);
  return layer;
}

LayerCall read_layer(const LayerFields& fields) {
  LayerCall layer;
  for (int i = 0; i < kLayerFields; ++i) kFields[i].read(layer, fields[i]);
  layer.complete();
  return layer;
}

SavedCall read_saved(const LayerCall& layer, py::handle record) {
  constexpr int kTensors = std::tuple_size_v<SavedFields>;
  if (!PyTuple_Check(record.ptr()) || PyTuple_GET_SIZE(record.ptr()) != kTensors + 1) {
    fail("saved", "expected a Saved of 8 fields, got ", describe(record));
  }
  SavedFields fields;
  for (int i = 0; i < kTensors; ++i) fields[i] = PyTuple_GET_ITEM(record.ptr(), i);
  const py::handle last = PyTuple_GET_ITEM(record.ptr(), kTensors);
  if (!PySequence_Check(last.ptr())) {
    fail("wanted", "expected a sequence of bool, got ", describe(last));
  }
  std::vector<bool> wanted;
  for (const py::handle want : last) wanted.push_back(to_bool("wanted", want));
  return read_saved(layer, fields, wanted);
}

SavedCall read_saved(const LayerCall& layer, const SavedFields& fields,
                     const std::vector<bool>& wanted) {
  static constexpr const char* names[] = {"output", "extra", "saved",  "d_output",
                                          "d_h_n",  "d_c_n", "d_extra"};
  Tensor tensors[std::tuple_size_v<SavedFields>];
  for (size_t i = 0; i < fields.size(); ++i) tensors[i] = view_optional(names[i], fields[i]);
  const SavedCall given{tensors[0], tensors[1], tensors[2], tensors[3],
                        tensors[4], tensors[5], tensors[6], wanted};
  expect_saved(layer, given);
  check_wanted(layer, given);
  return given;
}

void expect_saved(const LayerCall& layer, const SavedCall& given) {
  check_results(layer, given);
  check_incoming(layer, given);
}

void expect(const LayerCall& layer, const char* name, const Tensor& tensor, const Shape& shape,
            Element element) {
  if (tensor.shape == shape && tensor.element == element && tensor.has_device_of(layer.x)) return;
  const std::string device = py::str(layer.x.object.attr("device"));
  fail(name, "expected a ", describe(element), " tensor of shape ", shape.text(), " on ", device,
       ", got ", describe(tensor.object));
}

Tensor view_optional(const char* name, py::handle object) {
  return object.is_none() ? Tensor{} : view_field(name, object);
}

}  // namespace fastrnn
