#include "run_stack.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "inspector.h"

namespace fastrnn {

namespace {

// Part k of `parts` of a contiguous tensor, cut along its first dimension.
Tensor part_of(const Tensor& whole, int64_t k, int64_t parts, DType dtype) {
  if (!whole) return whole;
  Tensor part = whole;
  part.shape = {whole.shape[0] / parts, whole.shape[1], whole.shape[2]};
  part.data = static_cast<char*>(whole.data) + k * part.shape.count() * size_of(dtype);
  return part;
}

// Final states of all layers.
struct Finals {
  Made h_n, c_n;

  Finals(const Stack& stack, const LayerCall& layer) {
    const ScanShape& shape = layer.shape;
    const int64_t entries = int64_t{stack.layers} * stack.directions;
    h_n = make(layer, {entries, shape.batch, shape.proj});
    c_n = make_if(layer.traits().has_cell_state(), layer, {entries, shape.batch, shape.hidden});
  }
  void set(ForwardArgs& args, const Stack& stack, int k) const {
    args.h_n = part_of(h_n.tensor, k, stack.layers, args.dtype).data;
    args.c_n = part_of(c_n.tensor, k, stack.layers, args.dtype).data;
  }
};

// States of all layers, or gradients of these.
void expect_states(const char* name, const Tensor& states, int layers) {
  if (!states || (states.shape.dims() == 3 && states.shape[0] == layers)) return;
  throw py::value_error(std::string(name) + ": expected a tensor [" + std::to_string(layers) +
                        ", B, features], got " + describe(states.object));
}

// The tensor, contiguous.
Tensor contiguous_view(const Tensor& tensor, Contiguous& kept) {
  Tensor view = tensor;
  view.data = const_cast<void*>(kept(tensor));
  view.is_contiguous = true;
  return view;
}

constexpr int kResults = 3;  // of each layer, that backward reads: output, extra and saved
constexpr int kOthers = 3;   // before the weights: x, h_0 and c_0

// What the Function is given, from the `first` of all tensors on.
struct Given {
  std::vector<Tensor> tensors;
  Contiguous kept;
  Stack stack;

  Given(const std::string& mode, int layers, const py::tuple& all, size_t first) {
    const int cell = find_cell(mode);
    const CellTraits& traits = cell_traits(cell);
    const int64_t count = static_cast<int64_t>(all.size() - first) - kOthers;
    if (layers < 1 || count < layers || !traits.has_weights(count, layers, false) ||
        traits.states > 1 || traits.inputs > 0) {
      throw py::value_error("tensors: expected x, h_0, c_0 and the weights of " +
                            std::to_string(layers) + " layers, got " + std::to_string(all.size()));
    }
    for (size_t i = first; i < all.size(); ++i) tensors.push_back(view_optional("tensors", all[i]));
    if (x().shape.dims() != 3) {
      throw py::value_error("x: expected a tensor [T, B, I], got " + describe(all[first]));
    }
    expect_states("h_0", tensors[1], layers);
    expect_states("c_0", tensors[2], layers);
    stack = {cell,
             layers,
             1,
             static_cast<size_t>(count / layers),
             contiguous_view(tensors[1], kept),
             contiguous_view(tensors[2], kept),
             tensors.data() + kOthers};
  }
  const Tensor& x() const { return tensors[0]; }
};

}  // namespace

LayerCall Stack::layer(int k, const Tensor& x) const {
  LayerCall layer;
  layer.cell = cell;
  layer.directions = directions;
  layer.batch = x.shape[1];
  layer.x = x;
  const DType dtype = static_cast<DType>(x.element);
  layer.h_0 = part_of(h_0, k, layers, dtype);
  layer.c_0 = part_of(c_0, k, layers, dtype);
  const Tensor* next = weights + k * weights_per_layer;
  for (int d = 0; d < directions; ++d) {
    read_direction(layer.weights[d], layer.traits(), weights_per_layer / directions,
                   layer.traits().parameters, [&](const char*, const char*) { return *next++; });
  }
  layer.complete();
  return layer;
}

StackPlan plan_stack(const Stack& stack, const Tensor& x) {
  if (stack.layers < 2 || stack.directions > 1) return {};
  return plan_stack(stack.layer(0, x).shape, stack.layers);
}

std::array<py::object, 3> infer(const Stack& stack, Tensor x) {
  std::deque<Contiguous> kept;
  std::vector<ForwardArgs> waiting;  // for others, to run side by side
  std::vector<Made> outputs;         // of each layer, which the next one reads
  StackPlan plan;
  std::optional<Finals> finals;
  for (int k = 0; k < stack.layers; ++k) {
    const LayerCall layer = stack.layer(k, x);
    ForwardArgs args{};
    set_layer(args, layer, kept.emplace_back());
    if (k == 0) {
      finals.emplace(stack, layer);
      plan = plan_stack(args, stack.layers);
    }
    const bool waits = plan.threads > 1;
    // One after the other, the outputs of two layers are enough.
    if (!waits && k > 1) outputs.erase(outputs.begin());
    outputs.push_back(make(layer, layer.steps(layer.directions * layer.shape.proj)));
    args.output = outputs.back().tensor.data;
    finals->set(args, stack, k);
    if (waits) {
      waiting.push_back(args);
    } else {
      run_forward(args, layer);
    }
    x = outputs.back().tensor;
  }
  if (!waiting.empty()) run_forward(waiting, plan);
  return {outputs.back().object, finals->h_n.object, finals->c_n.object};
}

py::tuple record_stack(py::handle ctx, const std::string& mode, int layers,
                       const py::args& tensors) {
  const Given given(mode, layers, tensors, 0);
  const Stack& stack = given.stack;
  std::deque<Contiguous> kept;
  std::vector<ForwardArgs> all;
  std::vector<Results> results;
  std::optional<Finals> finals;
  Tensor x = given.x();
  for (int k = 0; k < layers; ++k) {
    LayerCall layer = stack.layer(k, x);
    layer.keep = true;
    expect_cpu(layer);
    if (k == 0) finals.emplace(stack, layer);
    ForwardArgs& args = all.emplace_back();
    set_layer(args, layer, kept.emplace_back());
    results.push_back(make_steps(args, layer));
    finals->set(args, stack, k);
    x = results.back().output.tensor;
  }
  StackPlan plan = plan_stack(all[0], layers);
  if (plan.threads < 2)
    plan = {1, 1, std::max<int64_t>(all[0].steps, 1)};  // threads were taken away meanwhile
  run_forward(all, plan);

  static const Method set_materialize_grads("set_materialize_grads");
  static const Method save_for_backward("save_for_backward");
  std::vector<PyObject*> saved{ctx.ptr()};
  for (const Results& each : results) {
    for (const Made* made : {&each.output, &each.extra, &each.saved}) {
      saved.push_back(made->object.ptr());
    }
  }
  for (const py::handle tensor : tensors) saved.push_back(tensor.ptr());
  save_for_backward.call(saved);
  PyObject* no_zeros[] = {ctx.ptr(), Py_False};
  set_materialize_grads.call(no_zeros);
  ctx.attr("options") = py::make_tuple(mode, layers);

  const py::object& output = results.back().output.object;
  if (!finals->c_n.tensor) return py::make_tuple(output, finals->h_n.object);
  return py::make_tuple(output, finals->h_n.object, finals->c_n.object);
}

namespace {

// backward of one layer of a stack, until it has run.
struct LayerBackward {
  LayerBackward(LayerCall call, std::vector<bool> wants)
      : layer(std::move(call)), wanted(std::move(wants)), gradients(layer, wanted) {}

  const LayerCall layer;
  const std::vector<bool> wanted;
  Gradients gradients;
  Contiguous kept;
  Made d_x;
};

// The gradient of all layers' states, and its part of each.
Made make_like(const Tensor& states, bool is_wanted, const LayerCall& layer) {
  return make_if(is_wanted && bool(states), layer, states.shape);
}

}  // namespace

py::object replay_stack(py::handle ctx, const py::args& incoming) {
  static const Attribute saved_tensors("saved_tensors"), needs_input_grad("needs_input_grad"),
      options("options");
  if (is_grad_enabled()) return py::none();
  const py::tuple saved = saved_tensors(ctx), needed = needs_input_grad(ctx);
  const auto [mode, layers] = py::object(options(ctx)).cast<std::pair<std::string, int>>();
  const size_t first = static_cast<size_t>(kResults) * std::max(layers, 1);
  if (saved.size() < first + kOthers || needed.size() != saved.size() - first + 2 ||
      incoming.size() > 3) {
    throw py::value_error("saved_tensors: expected those of " + std::to_string(layers) +
                          " layers, got " + std::to_string(saved.size()));
  }
  Inspector inspector;
  for (const py::handle gradient : incoming) inspector.add_other(gradient);
  for (const py::handle tensor : saved) inspector.add_other(tensor);
  if (inspector.call() == Call::kWatched) return py::none();

  const Given given(mode, layers, saved, first);
  const Stack& stack = given.stack;
  const auto wants = [&](size_t i) { return PyTuple_GET_ITEM(needed.ptr(), 2 + i) == Py_True; };
  Contiguous kept;
  Tensor d_output, d_finals[2];  // of h_n and c_n
  if (!incoming.empty()) d_output = view_optional("d_output", incoming[0]);
  for (size_t i = 1; i < incoming.size(); ++i) {
    const char* const name = i == 1 ? "d_h_n" : "d_c_n";
    const Tensor d_final = view_optional(name, incoming[i]);
    expect_states(name, d_final, layers);
    d_finals[i - 1] = contiguous_view(d_final, kept);
  }
  Made d_h_0, d_c_0;
  std::deque<LayerBackward> all;  // the highest layer first
  std::vector<BackwardArgs> args(layers);
  for (int k = layers; k-- > 0;) {
    const auto result = [&](int i) {
      return view_optional("saved_tensors", saved[kResults * k + i]);
    };
    const Tensor x =
        k == 0 ? given.x() : view_optional("saved_tensors", saved[size_t{kResults} * (k - 1)]);
    LayerCall call = stack.layer(k, x);
    call.keep = true;
    // Of x, h_0, c_0 and inputs somebody else takes care.
    std::vector<bool> wanted(4, false);
    for (size_t i = 0; i < stack.weights_per_layer; ++i) {
      wanted.push_back(wants(kOthers + k * stack.weights_per_layer + i));
    }
    if (k < layers - 1) d_output = all.back().d_x.tensor;
    LayerBackward& own = all.emplace_back(std::move(call), std::move(wanted));
    const DType dtype = own.layer.shape.dtype;
    expect_cpu(own.layer);
    const SavedCall saved_call{result(0),
                               result(1),
                               result(2),
                               d_output,
                               part_of(d_finals[0], k, layers, dtype),
                               part_of(d_finals[1], k, layers, dtype),
                               {},
                               {}};
    expect_saved(own.layer, saved_call);
    set_layer(args[k], own.layer, own.kept);
    set_given(args[k], own.layer, saved_call, own.kept);
    if (k == layers - 1) {
      d_h_0 = make_like(stack.h_0, wants(1), own.layer);
      d_c_0 = make_like(stack.c_0, wants(2), own.layer);
    }
    own.d_x = make_if(k > 0 || wants(0), own.layer, own.layer.x.shape);
    args[k].d_x = own.d_x.tensor.data;
    args[k].d_h_0 = part_of(d_h_0.tensor, k, layers, dtype).data;
    args[k].d_c_0 = part_of(d_c_0.tensor, k, layers, dtype).data;
    for (int i = 0; i < 4; ++i) own.gradients.skip();
    own.gradients.add_weights(args[k]);
  }
  run_backward(args);

  py::list made;
  for (int i = 0; i < 2; ++i) made.append(py::none());  // of mode and layers
  for (const py::object& each : {all.back().d_x.object, d_h_0.object, d_c_0.object}) {
    made.append(each);
  }
  for (auto own = all.rbegin(); own != all.rend(); ++own) {
    const std::vector<py::object>& found = own->gradients.all();
    for (size_t i = 4; i < found.size(); ++i) made.append(found[i]);
  }
  return py::tuple(made);
}

}  // namespace fastrnn
