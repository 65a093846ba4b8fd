#include "run_module.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "../../cells/registry.h"
#include "inspector.h"
#include "modules.h"
#include "run_stack.h"

namespace fastrnn {

namespace {

// An RNN module, as far as run_module takes it.
struct Model {
  py::handle mode;
  int cell, layers, directions;
  bool batch_first;
  std::vector<py::object> weights;  // kept: another thread may put others in their place

  size_t weights_per_layer() const { return weights.size() / layers; }
};

// An item of a dictionary, or null.
PyObject* find_item(PyObject* dict, PyObject* key) {
  PyObject* const item = PyDict_GetItemWithError(dict, key);
  if (item == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return item;
}

// Reads a module's __dict__; no model where anything but its parameters makes its weights.
std::optional<Model> read_model(py::handle module) {
  if (!PyDict_Check(module.ptr())) return std::nullopt;
  static PyObject* const names[] = {PyUnicode_InternFromString("mode"),
                                    PyUnicode_InternFromString("num_layers"),
                                    PyUnicode_InternFromString("bidirectional"),
                                    PyUnicode_InternFromString("batch_first"),
                                    PyUnicode_InternFromString("_parameters"),
                                    PyUnicode_InternFromString("_flat_weights_names"),
                                    PyUnicode_InternFromString("_flat_weights"),
                                    PyUnicode_InternFromString("dropout"),
                                    PyUnicode_InternFromString("training")};
  PyObject* values[std::size(names)];
  for (size_t i = 0; i < std::size(names); ++i) {
    values[i] = find_item(module.ptr(), names[i]);
    if (values[i] == nullptr) return std::nullopt;
  }
  const auto [mode, layers, bidirectional, batch_first, parameters, flat, listed, dropout,
              training] = values;
  const long count_of_layers = PyLong_Check(layers) ? PyLong_AsLong(layers) : 0;
  constexpr long kMostLayers = std::numeric_limits<int>::max();
  if (count_of_layers < 1 || count_of_layers > kMostLayers) {
    PyErr_Clear();  // too many for a long
    return std::nullopt;
  }
  Model model{mode,
              find_cell(mode),
              static_cast<int>(count_of_layers),
              bidirectional == Py_True ? 2 : 1,
              batch_first == Py_True,
              {}};
  if (training == Py_True && model.layers > 1) {
    const int drops = PyObject_IsTrue(dropout);
    if (drops < 0) throw py::error_already_set();
    if (drops == 1) return std::nullopt;
  }
  if (!PyDict_CheckExact(parameters) || !PyList_CheckExact(flat) || !PyList_CheckExact(listed) ||
      PyList_GET_SIZE(listed) != PyList_GET_SIZE(flat)) {
    return std::nullopt;
  }
  for (const py::handle name : py::handle(flat)) {
    PyObject* const weight = find_item(parameters, name.ptr());
    const auto i = static_cast<Py_ssize_t>(model.weights.size());
    // Where the two differ, the module says which is newer.
    if (weight == nullptr || weight != PyList_GET_ITEM(listed, i)) return std::nullopt;
    model.weights.push_back(py::reinterpret_borrow<py::object>(weight));
  }
  const int64_t entries = int64_t{model.layers} * model.directions;
  const auto count = static_cast<int64_t>(model.weights.size());
  if (!cell_traits(model.cell).has_weights(count, entries, false)) return std::nullopt;
  return model;
}

// The states of layer k of all layers' [L * D, B, features], differentiable.
py::object states_of(const Model& model, int k, py::handle states) {
  if (states.is_none() || model.layers == 1) return py::reinterpret_borrow<py::object>(states);
  return states.attr("narrow")(0, k * model.directions, model.directions);
}

// The options of a layer's record.
py::tuple options_of(const Model& model, py::handle x, py::handle checkpoint_every) {
  return py::make_tuple(model.mode, model.directions, view(x).shape[1], /*reverse=*/false,
                        checkpoint_every, /*keep=*/true, /*all_c=*/false, /*grad_clip=*/0.0,
                        /*zoneout_h=*/0.0, /*zoneout_c=*/0.0, /*layer_norm=*/false);
}

// Calls an autograd Function with `first` arguments, and after them x, states and weights of a
// record without any other tensors.
template <class Weights>
py::tuple apply(py::handle function, std::initializer_list<PyObject*> first, py::handle x,
                py::handle h_0, py::handle c_0, const Weights& weights) {
  constexpr int kOthers =
      static_cast<int>(LayerField::kWeights) - static_cast<int>(LayerField::kBatchSizes);
  std::vector<PyObject*> arguments;
  arguments.reserve(first.size() + 3 + kOthers + weights.size());
  arguments.insert(arguments.end(), first);
  for (const py::handle tensor : {x, h_0, c_0}) arguments.push_back(tensor.ptr());
  arguments.insert(arguments.end(), kOthers, Py_None);
  for (const py::object& weight : weights) arguments.push_back(weight.ptr());
  PyObject* const made =
      PyObject_Vectorcall(function.ptr(), arguments.data(), arguments.size(), nullptr);
  if (made == nullptr) throw py::error_already_set();
  const py::object results = py::reinterpret_steal<py::object>(made);
  return py::reinterpret_borrow<py::tuple>(results);
}

// Output, h_n and c_n or None, layer by layer: function(options, *tensors) is the autograd Function
// of one.
std::array<py::object, 3> train(const Model& model, py::object x, py::handle h_0, py::handle c_0,
                                const py::object& checkpoint_every, py::handle function) {
  py::list finals[2];
  const py::tuple options = options_of(model, x, checkpoint_every);
  for (int k = 0; k < model.layers; ++k) {
    const py::object h = states_of(model, k, h_0), c = states_of(model, k, c_0);
    const py::object* const weights = model.weights.data() + k * model.weights_per_layer();
    const py::tuple results =
        apply(function, {options.ptr()}, x, h, c, std::span(weights, model.weights_per_layer()));
    x = results[0];
    for (size_t i = 1; i < results.size(); ++i) finals[i - 1].append(results[i]);
  }
  const auto join = [&](const py::list& parts) -> py::object {
    if (parts.size() < 2) return parts.empty() ? py::none() : py::object(parts[0]);
    static const py::object& cat = *new py::object(py::module_::import("torch").attr("cat"));
    return cat(parts);
  };
  return {x, join(finals[0]), join(finals[1])};
}

// The same by the autograd Function of all layers: stack(layers, options, dropout, *tensors).
std::array<py::object, 3> train_stack(const Model& model, const py::object& x, py::handle h_0,
                                      py::handle c_0, const py::object& stack) {
  const py::int_ layers(model.layers);
  const py::tuple options = options_of(model, x, py::int_(0));
  const py::tuple results =
      apply(stack, {layers.ptr(), options.ptr(), Py_None}, x, h_0, c_0, model.weights);
  return {results[0], results[1],
          results.size() > 2 ? py::object(results[2]) : py::object(py::none())};
}

// Whether backward needs to go through all layers.
bool all_require_grad(const std::vector<py::object>& weights) {
  static const Attribute requires_grad("requires_grad");
  return std::all_of(weights.begin(), weights.end(),
                     [](const py::object& weight) { return requires_grad.is_true(weight); });
}

// All layers of an RNN module on plain tensors: what the module's forward returns. None where the
// call is more than that; throws ValueError where it is not right.
py::object run_checked(py::handle module, py::handle input, py::handle hx,
                       const py::object& checkpoint_every, const py::dict& functions,
                       const py::object& stack_function) {
  const std::optional<Model> model = read_model(module);
  if (!model) return py::none();
  const CellTraits& traits = cell_traits(model->cell);
  if (traits.states > 1 || traits.inputs > 0) return py::none();
  const bool has_cell_state = traits.has_cell_state();
  py::handle given[2] = {Py_None, Py_None};  // h_0 and c_0
  const size_t given_states = hx.is_none() ? 0 : 1 + has_cell_state;
  if (given_states == 1) {
    given[0] = hx;
  } else if (given_states == 2) {
    if (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != 2) return py::none();
    for (int i = 0; i < 2; ++i) given[i] = PyTuple_GET_ITEM(hx.ptr(), i);
  }
  Inspector inspector;
  inspector.add(input);
  for (const py::handle state : given) inspector.add(state);
  for (const py::handle weight : model->weights) inspector.add(weight);
  if (inspector.call() == Call::kWatched) return py::none();
  if (inspector.tensors().size() != 1 + given_states + model->weights.size()) {
    return py::none();  // some are None
  }

  const Tensor* next = inspector.tensors().data();
  Tensor x = *next++;
  if (x.shape.dims() != 3 || x.shape.count() == 0) return py::none();
  if (model->cell >= Cells::size && !has_module(model->cell, static_cast<DType>(x.element))) {
    return py::none();  // is compiled, or said to be missing
  }
  py::object by_step = py::reinterpret_borrow<py::object>(input);
  if (model->batch_first) {
    by_step = by_step.attr("transpose")(0, 1);
    x = view(by_step);
  }
  Tensor states[2];
  for (size_t i = 0; i < given_states; ++i) {
    states[i] = *next++;
    const Shape& shape = states[i].shape;
    if (shape.dims() != 3 || shape[0] != model->layers * model->directions ||
        !states[i].is_contiguous) {
      return py::none();
    }
  }
  LayerCall every;
  every.cell = model->cell;
  every.directions = model->directions;
  every.batch = x.shape[1];
  const Stack stack{every, model->layers, model->weights_per_layer(), states[0], states[1],
                    {},    next};
  const auto run = [&]() -> std::array<py::object, 3> {
    if (inspector.call() == Call::kPlain) {
      const StackResults results = forward(stack, x);
      return {results.layers.back().output.object, results.h_n.object, results.c_n.object};
    }
    if (model->layers > 1 && !PyObject_IsTrue(checkpoint_every.ptr()) &&
        all_require_grad(model->weights) && plan_stack(stack, x).threads > 1) {
      return train_stack(*model, by_step, given[0], given[1], stack_function);
    }
    return train(*model, by_step, given[0], given[1], checkpoint_every, functions[model->mode]);
  };
  const auto [output, h_n, c_n] = run();
  const py::object result =
      model->batch_first ? py::object(output.attr("transpose")(0, 1)) : output;
  if (!has_cell_state) return py::make_tuple(result, h_n);
  return py::make_tuple(result, py::make_tuple(h_n, c_n));
}

}  // namespace

py::object run_module(py::handle module, py::handle input, py::handle hx,
                      const py::object& checkpoint_every, const py::dict& functions,
                      const py::object& stack) {
  try {
    return run_checked(module, input, hx, checkpoint_every, functions, stack);
  } catch (const py::value_error&) {
    return py::none();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError)) throw;
    return py::none();
  }
}

}  // namespace fastrnn
