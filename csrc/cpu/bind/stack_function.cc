#include "stack_function.h"

#include <deque>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "inspector.h"
#include "run_function.h"
#include "run_stack.h"

namespace fastrnn {

namespace {

constexpr size_t kResults = 3;  // of each layer, that backward reads: output, extra and saved

// The states of all layers, or gradients of these.
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

// A stack, read from its record and checked as far as single layers do not check it.
class Given {
 public:
  Given(LayerFields fields, int layers, py::handle dropout) {
    py::handle& weights = fields.back();
    if (!PySequence_Check(weights.ptr())) {
      throw py::value_error("weights: expected a sequence of tensors, got " + describe(weights));
    }
    all_weights_ = py::reinterpret_steal<py::tuple>(PySequence_Tuple(weights.ptr()));
    if (!all_weights_) throw py::error_already_set();
    const CellTraits& traits = cell_traits(find_cell(fields[0]));
    const auto count = static_cast<int64_t>(all_weights_.size());
    if (layers < 1 || count < layers || !traits.has_weights(count, layers, false) ||
        traits.states > 1 || traits.inputs > 0) {
      throw py::value_error("weights: expected those of " + std::to_string(layers) +
                            " layers of a plain cell, got " + std::to_string(count) + " of " +
                            traits.mode);
    }
    const auto each = static_cast<size_t>(count / layers);
    const Tensor h_0 = take_states("h_0", fields, LayerField::kH0, layers);
    const Tensor c_0 = take_states("c_0", fields, LayerField::kC0, layers);
    const py::tuple first = all_weights_[py::slice(0, static_cast<py::ssize_t>(each), 1)];
    weights = first;
    LayerCall every = read_layer(fields);
    expect_cpu(every);
    expect_plain(every);
    for (const py::handle weight : all_weights_) {
      const Tensor viewed = view_optional("weights", weight);
      if (!viewed) throw py::value_error("weights: expected tensors, got None");
      weights_.push_back(viewed);
    }
    const Tensor factors = view_optional("dropout", dropout);
    if (factors) {
      Shape expected{layers - 1};
      const Shape output = every.steps(every.shape.proj);
      for (int i = 0; i < output.dims(); ++i) expected.push(output[i]);
      expect(every, "dropout", factors, expected, every.element());
    }
    x = every.x;
    every.weights[0] = {};
    stack = {std::move(every), layers, each, h_0, c_0, contiguous_view(factors, kept_),
             weights_.data()};
  }

  Stack stack;
  Tensor x;

 private:
  Contiguous kept_;
  py::tuple all_weights_;  // keeps them alive, whatever sequence they came in
  std::vector<Tensor> weights_;

  Tensor take_states(const char* name, LayerFields& fields, LayerField field, int layers) {
    py::handle& object = fields[static_cast<size_t>(field)];
    const Tensor states = view_optional(name, object);
    expect_states(name, states, layers);
    object = Py_None;
    return contiguous_view(states, kept_);
  }

  static void expect_plain(const LayerCall& every) {
    const std::pair<const char*, bool> others[] = {
        {"directions", every.directions > 1},
        {"reverse", every.reverse},
        {"checkpoint_every", every.checkpoint_every > 0},
        {"zoneout_h", every.zoneout_h > 0},
        {"zoneout_c", every.zoneout_c > 0},
        {"layer_norm", every.layer_norm},
        {"h_mask", bool(every.h_mask)},
        {"seed", bool(every.seed)},
    };
    for (const auto& [name, is_given] : others) {
      if (!is_given) continue;
      throw py::value_error(std::string(name) +
                            ": expected none of layers that run side by side, got one");
    }
  }
};

}  // namespace

StackPlan plan_stack(py::handle record, int layers) {
  const Given given(record_fields(record), layers, py::none());
  return plan_stack(given.stack, given.x);
}

py::tuple forward_stack(py::handle record, int layers, py::handle dropout) {
  const Given given(record_fields(record), layers, dropout);
  return forward(given.stack, given.x).tuple(given.stack);
}

py::tuple record_stack(py::handle ctx, int layers, py::handle options, py::handle dropout,
                       const py::args& tensors) {
  const FunctionFields fields(options, tensors);
  Given given(fields.all, layers, dropout);
  given.stack.every.keep = true;
  const StackResults results = forward(given.stack, given.x);
  std::vector<PyObject*> saved;
  for (const Results& each : results.layers) {
    for (const Made* made : {&each.output, &each.extra, &each.saved}) {
      saved.push_back(made->object.ptr());
    }
  }
  saved.push_back(dropout.ptr());
  for (const py::handle tensor : tensors) saved.push_back(tensor.ptr());
  for (const Made& dropped : results.dropped) saved.push_back(dropped.object.ptr());
  save(ctx, py::make_tuple(layers, options), saved);
  return results.tuple(given.stack);
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

// What record_stack() saved of `layers` layers, and what each of its arguments needs.
struct SavedStack {
  int layers;
  py::object options;
  py::tuple saved, needed;

  explicit SavedStack(py::handle ctx) {
    static const Attribute saved_tensors("saved_tensors"), needs_input_grad("needs_input_grad"),
        options_of("options");
    saved = saved_tensors(ctx);
    needed = needs_input_grad(ctx);
    std::tie(layers, options) = py::object(options_of(ctx)).cast<std::pair<int, py::object>>();
    if (layers < 1 || needed.size() < kArguments || saved.size() < first() + tensors_count() ||
        saved.size() != first() + tensors_count() + dropped_count()) {
      throw py::value_error("saved_tensors: expected those of " + std::to_string(layers) +
                            " layers, got " + std::to_string(saved.size()));
    }
  }

  static constexpr size_t kArguments = 3;  // before the tensors: layers, options and dropout

  py::handle dropout() const { return saved[first() - 1]; }
  py::tuple tensors() const {
    return saved[py::slice(static_cast<py::ssize_t>(first()),
                           static_cast<py::ssize_t>(first() + tensors_count()), 1)];
  }
  Tensor result(int k, int i) const { return at(kResults * k + i); }
  // What layer k took, but the first.
  Tensor x_of(int k) const {
    return dropped_count() > 0 ? at(first() + tensors_count() + k - 1) : result(k - 1, 0);
  }
  bool wants(size_t tensor) const {
    return PyTuple_GET_ITEM(needed.ptr(), kArguments + tensor) == Py_True;
  }
  size_t tensors_count() const { return needed.size() - kArguments; }

 private:
  size_t first() const { return kResults * layers + 1; }
  size_t dropped_count() const { return dropout().is_none() ? 0 : layers - 1; }
  Tensor at(size_t i) const { return view_optional("saved_tensors", saved[i]); }
};

// The gradients of what StackResults::tuple() gives.
struct Incoming {
  Tensor h_n, c_n;
  std::vector<Tensor> outputs, extras;  // of each layer, mostly none

  Incoming(const py::args& gradients, const Stack& stack, Contiguous& kept) {
    const bool has_cell_state = stack.every.traits().has_cell_state();
    const size_t finals = 2 + has_cell_state, layers = stack.layers;
    const size_t of_steps = stack.every.all_c ? layers - 1 + layers * has_cell_state : 0;
    if (gradients.size() > finals + of_steps) {
      throw py::value_error("gradients: expected at most " + std::to_string(finals + of_steps) +
                            ", got " + std::to_string(gradients.size()));
    }
    const auto read = [&](const char* name, size_t i) {
      return i < gradients.size() ? view_optional(name, gradients[i]) : Tensor{};
    };
    const auto read_final = [&](const char* name, size_t i) {
      const Tensor final = read(name, i);
      expect_states(name, final, stack.layers);
      return contiguous_view(final, kept);
    };
    h_n = read_final("d_h_n", 1);
    if (has_cell_state) c_n = read_final("d_c_n", 2);
    for (size_t k = 0; k < layers; ++k) {
      outputs.push_back(read("d_output", k + 1 < layers ? finals + k : 0));
      extras.push_back(read("d_extra", finals + layers - 1 + k));
    }
  }
};

// The gradient of all layers' states.
Made make_like(const Tensor& states, bool is_wanted, const LayerCall& layer) {
  return make_if(is_wanted && bool(states), layer, states.shape);
}

}  // namespace

py::object replay_stack(py::handle ctx, const py::args& gradients) {
  if (is_grad_enabled()) return py::none();
  const SavedStack all_saved(ctx);
  Inspector inspector;
  for (const py::handle gradient : gradients) inspector.add_other(gradient);
  for (const py::handle tensor : all_saved.saved) inspector.add_other(tensor);
  if (inspector.call() == Call::kWatched) return py::none();

  const int layers = all_saved.layers;
  const py::tuple tensors = all_saved.tensors();
  const FunctionFields fields(all_saved.options, tensors);
  Given given(fields.all, layers, all_saved.dropout());
  Stack& stack = given.stack;
  stack.every.keep = true;
  Contiguous kept;
  const Incoming incoming(gradients, stack, kept);
  Made d_h_0, d_c_0;
  std::deque<LayerBackward> all;  // the highest layer first
  std::vector<BackwardArgs> args(layers);
  for (int k = layers; k-- > 0;) {
    const bool is_highest = k == layers - 1;
    // Of x, h_0, c_0 and inputs somebody else takes care.
    std::vector<bool> wanted(4, false);
    for (size_t i = 0; i < stack.weights_per_layer; ++i) {
      wanted.push_back(all_saved.wants(FunctionFields::kSingle + k * stack.weights_per_layer + i));
    }
    const Tensor d_output = is_highest ? incoming.outputs[k] : all.back().d_x.tensor;
    LayerBackward& own =
        all.emplace_back(stack.layer(k, k == 0 ? given.x : all_saved.x_of(k)), std::move(wanted));
    const SavedCall saved_call{all_saved.result(k, 0),
                               all_saved.result(k, 1),
                               all_saved.result(k, 2),
                               d_output,
                               part_of(incoming.h_n, k, layers),
                               part_of(incoming.c_n, k, layers),
                               incoming.extras[k],
                               {}};
    expect_saved(own.layer, saved_call);
    set_layer(args[k], own.layer, own.kept);
    set_given(args[k], own.layer, saved_call, own.kept);
    if (is_highest) {
      d_h_0 = make_like(stack.h_0, all_saved.wants(1), own.layer);
      d_c_0 = make_like(stack.c_0, all_saved.wants(2), own.layer);
    } else {
      args[k].dropout = part_of(stack.dropout, k, layers - 1).data;
      if (const Tensor& d_result = incoming.outputs[k]) {
        expect(own.layer, "d_output", d_result, d_output.shape, own.layer.element());
        args[k].d_result = own.kept(d_result);
      }
    }
    own.d_x = make_if(k > 0 || all_saved.wants(0), own.layer, own.layer.x.shape);
    args[k].d_x = own.d_x.tensor.data;
    args[k].d_h_0 = part_of(d_h_0.tensor, k, layers).data;
    args[k].d_c_0 = part_of(d_c_0.tensor, k, layers).data;
    for (int i = 0; i < 4; ++i) own.gradients.skip();
    own.gradients.add_weights(args[k]);
  }
  run_backward(args);

  py::list made;
  for (size_t i = 0; i < SavedStack::kArguments; ++i) made.append(py::none());
  for (const py::object& each : {all.back().d_x.object, d_h_0.object, d_c_0.object}) {
    made.append(each);
  }
  for (size_t i = 3; i < FunctionFields::kSingle; ++i) made.append(py::none());
  for (auto own = all.rbegin(); own != all.rend(); ++own) {
    const std::vector<py::object>& found = own->gradients.all();
    for (size_t i = 4; i < found.size(); ++i) made.append(found[i]);
  }
  return py::tuple(made);
}

}  // namespace fastrnn
