#include "run_function.h"

#include <string>
#include <tuple>
#include <vector>

#include "inspector.h"
#include "run_layer.h"

namespace fastrnn {

namespace {

// The places of what is not differentiated among the Function's arguments: the options are the
// first one, the layer's tensors follow.
bool is_constant(size_t argument) {
  constexpr auto place = [](LayerField field) {
    return 1 + static_cast<size_t>(field) - static_cast<size_t>(LayerField::kX);
  };
  return argument == 0 || (argument >= place(kFirstConstant) && argument <= place(kLastConstant));
}

}  // namespace

FunctionFields::FunctionFields(py::handle options, const py::tuple& tensors) {
  if (!PyTuple_Check(options.ptr()) || PyTuple_GET_SIZE(options.ptr()) != kOptions) {
    throw py::value_error("options: expected a tuple of " + std::to_string(kOptions) + ", got " +
                          describe(options));
  }
  if (tensors.size() < kSingle) {
    throw py::value_error("tensors: expected at least " + std::to_string(kSingle) + ", got " +
                          std::to_string(tensors.size()));
  }
  for (size_t i = 0; i < kOptions; ++i) all[i] = PyTuple_GET_ITEM(options.ptr(), i);
  for (size_t i = 0; i < kSingle; ++i) all[kOptions + i] = PyTuple_GET_ITEM(tensors.ptr(), i);
  weights_ = tensors[py::slice(kSingle, tensors.size(), 1)];
  all.back() = weights_;
}

void save(py::handle ctx, py::handle options, const std::vector<PyObject*>& tensors) {
  static const Method set_materialize_grads("set_materialize_grads");
  static const Method save_for_backward("save_for_backward");
  std::vector<PyObject*> arguments;
  arguments.reserve(1 + tensors.size());
  arguments.push_back(ctx.ptr());
  arguments.insert(arguments.end(), tensors.begin(), tensors.end());
  save_for_backward.call(arguments);
  PyObject* no_zeros[] = {ctx.ptr(), Py_False};
  set_materialize_grads.call(no_zeros);
  ctx.attr("options") = options;
}

py::tuple record(py::handle ctx, py::handle options, const py::args& tensors) {
  const LayerCall layer = read_layer(FunctionFields(options, tensors).all);
  const Results results = forward(layer);
  std::vector<PyObject*> saved{results.output.object.ptr(), results.extra.object.ptr(),
                               results.saved.object.ptr()};
  for (const py::handle tensor : tensors) saved.push_back(tensor.ptr());
  save(ctx, options, saved);

  if (!layer.traits().has_cell_state())
    return py::make_tuple(results.output.object, results.h_n.object);
  if (!layer.all_c) {
    return py::make_tuple(results.output.object, results.h_n.object, results.c_n.object);
  }
  return py::make_tuple(results.output.object, results.h_n.object, results.c_n.object,
                        results.extra.object);
}

py::object replay(py::handle ctx, const py::args& gradients) {
  static const Attribute saved_tensors("saved_tensors"), needs_input_grad("needs_input_grad"),
      options("options");
  if (is_grad_enabled()) return py::none();
  const py::tuple saved = saved_tensors(ctx), needed = needs_input_grad(ctx);
  constexpr size_t kSaved = 3;  // output, extra and saved come before the layer's tensors
  constexpr size_t kGradients = std::tuple_size_v<SavedFields> - kSaved;
  if (saved.size() < kSaved) {
    throw py::value_error("saved_tensors: expected at least " + std::to_string(kSaved) + ", got " +
                          std::to_string(saved.size()));
  }
  if (gradients.size() > kGradients) {
    throw py::value_error("gradients: expected at most " + std::to_string(kGradients) + ", got " +
                          std::to_string(gradients.size()));
  }
  Inspector inspector;
  for (const py::handle gradient : gradients) inspector.add_other(gradient);
  for (const py::handle tensor : saved) inspector.add_other(tensor);
  if (inspector.call() == Call::kWatched) return py::none();

  const py::tuple tensors = saved[py::slice(kSaved, saved.size(), 1)];
  const py::object given_options = options(ctx);
  const LayerCall layer = read_layer(FunctionFields(given_options, tensors).all);
  SavedFields given;
  given.fill(py::none());
  for (size_t i = 0; i < kSaved; ++i) given[i] = saved[i];
  for (size_t i = 0; i < gradients.size(); ++i) given[kSaved + i] = gradients[i];
  std::vector<bool> wanted;
  for (size_t i = 0; i < needed.size(); ++i) {
    if (!is_constant(i)) wanted.push_back(PyTuple_GET_ITEM(needed.ptr(), i) == Py_True);
  }
  const std::vector<py::object> found = backward(layer, read_saved(layer, given, wanted));
  py::tuple result(needed.size());
  size_t next = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = is_constant(i) ? py::none() : found[next++];
  }
  return result;
}

}  // namespace fastrnn
