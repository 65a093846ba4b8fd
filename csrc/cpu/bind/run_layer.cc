#include "run_layer.h"

#include <numeric>
#include <utility>

#include "../variant.h"
#include "../workspace.h"
#include "modules.h"

namespace fastrnn {

Made make(const LayerCall& layer, const Shape& shape, Element element) {
  Made made{make_tensor(layer.x, shape, element), {}};
  made.tensor = view(made.object);
  return made;
}

namespace {

// The part of each direction, of a buffer that holds one after the other.
template <class Pointer, class Byte>
void set_parts(Pointer (&target)[kMaxDirections], Byte* whole, const LayerCall& layer,
               int64_t count) {
  if (whole == nullptr) return;
  for (int d = 0; d < layer.directions; ++d) {
    target[d] = whole + d * count * size_of(layer.shape.dtype);
  }
}

}  // namespace

void expect_cpu(const LayerCall& layer) {
  if (!layer.x.is_on_cpu()) {
    throw py::value_error("x: expected a tensor on cpu, got " + describe(layer.x.object));
  }
  if (layer.has_mask()) {
    throw py::value_error("batch_sizes: expected a torch.int64 tensor [T] on cpu, got " +
                          describe(layer.batch_sizes.object));
  }
}

Made make(const LayerCall& layer, const Shape& shape) {
  return make(layer, shape, layer.element());
}
Made make_if(bool is_wanted, const LayerCall& layer, const Shape& shape) {
  return is_wanted ? make(layer, shape) : Made{};
}

void set_layer(LayerArgs& args, const LayerCall& layer, Contiguous& contiguous) {
  static_cast<ScanShape&>(args) = layer.shape;
  args.traits = &layer.traits();
  args.loops = loops_of(layer.cell, layer.shape.dtype);
  if (layer.batch == 0) args.steps = 0;  // any number of them takes no memory, but time
  if (layer.batch_sizes) args.batch_sizes = static_cast<const int64_t*>(layer.batch_sizes.data);
  args.resets = static_cast<const bool*>(contiguous(layer.resets));
  args.x = contiguous(layer.x);
  for (int d = 0; d < layer.directions; ++d) {
    const LayerCall::Weights& w = layer.weights[d];
    args.weight_ih[d] = contiguous(w.ih);
    args.weight_hh[d] = contiguous(w.hh);
    args.bias_ih[d] = contiguous(w.bias_ih);
    args.bias_hh[d] = contiguous(w.bias_hh);
    args.weight_hr[d] = contiguous(w.hr);
    args.parameters[d] = contiguous(w.parameters);
  }
  args.h_0 = contiguous(layer.h_0);
  args.c_0 = contiguous(layer.c_0);
  args.inputs = contiguous(layer.inputs);
  args.h_mask = contiguous(layer.h_mask);
  args.zoneout_h = layer.zoneout_h;
  args.zoneout_c = layer.zoneout_c;
  args.seed = static_cast<const int64_t*>(contiguous(layer.seed));
  args.layer_norm = layer.layer_norm;
}

void run_forward(const ForwardArgs& args, const LayerCall& layer) {
  run_forward(args, layer, active_variant(layer.shape.dtype).forward);
}

void run_forward(const ForwardArgs& args, const LayerCall& layer, const Scan& scan) {
  const int threads = torch_threads();
  py::gil_scoped_release release;
  const int64_t features = layer.rows * args.directions * size_of(args.dtype);
  prefer_large_pages(args.output, features * args.proj);
  prefer_large_pages(args.extra, features * layer.traits().extras * args.hidden);
  for (int d = 0; d < args.directions; ++d) {
    prefer_large_pages(args.gates[d], layer.saves() * features * args.hidden / args.directions);
  }
  scan(args, threads);
}

StackPlan plan_stack(const ScanShape& shape, const int64_t* batch_sizes, int count) {
  if (count < 2 || shape.directions > 1) return {};
  // The outputs of all layers are there at once.
  constexpr int64_t kMostBytes = int64_t{256} << 20;
  const int64_t rows = batch_sizes == nullptr
                           ? shape.steps * shape.batch
                           : std::accumulate(batch_sizes, batch_sizes + shape.steps, int64_t{0});
  const int64_t bytes = rows * shape.proj * count * size_of(shape.dtype);
  const int threads = torch_threads();
  if (threads < 2 || bytes > kMostBytes) return {};
  ForwardArgs args{};
  static_cast<ScanShape&>(args) = shape;
  args.traits = &cell_traits(shape.cell);
  args.batch_sizes = batch_sizes;
  return active_variant(shape.dtype).plan_stack(args, count, threads);
}

void run_forward(const std::vector<ForwardArgs>& layers, const StackPlan& plan) {
  const int threads = torch_threads();
  py::gil_scoped_release release;
  active_variant(layers[0].dtype)
      .forward_stack(layers.data(), static_cast<int>(layers.size()), plan, threads);
}

Results forward(const LayerCall& layer) {
  return forward(layer, active_variant(layer.shape.dtype).forward);
}

Results make_steps(ForwardArgs& args, const LayerCall& layer) {
  const ScanShape& shape = layer.shape;
  const CellTraits& traits = layer.traits();
  Results results;
  results.output = make(layer, layer.steps(shape.directions * shape.proj));
  if (layer.keeps_extra()) {
    const Shape every = layer.steps(shape.directions * traits.extras * shape.hidden);
    results.extra = make(layer, every, layer.state_element());
  }
  if (layer.keeps_boundaries()) {
    results.saved = make(layer, layer.boundaries(), layer.state_element());
    args.boundaries = results.saved.tensor.data;
  } else if (layer.keeps_gates()) {
    results.saved = make(layer, layer.saved());
    set_parts(args.gates, static_cast<char*>(results.saved.tensor.data), layer,
              layer.rows * layer.saves() * shape.hidden);
  }
  args.output = results.output.tensor.data;
  args.extra = results.extra.tensor.data;
  return results;
}

Results forward(const LayerCall& layer, const Scan& scan) {
  expect_cpu(layer);
  const ScanShape& shape = layer.shape;
  Contiguous contiguous;
  ForwardArgs args{};
  set_layer(args, layer, contiguous);
  Results results = make_steps(args, layer);
  results.h_n = make(layer, layer.states(shape.proj));
  const CellTraits& traits = layer.traits();
  results.c_n = make_if(traits.has_cell_state(), layer, layer.states(traits.states * shape.hidden));
  args.h_n = results.h_n.tensor.data;
  args.c_n = results.c_n.tensor.data;
  run_forward(args, layer, scan);
  return results;
}

void set_given(BackwardArgs& args, const LayerCall& layer, const SavedCall& given,
               Contiguous& contiguous) {
  const CellTraits& traits = layer.traits();
  args.output = contiguous(given.output);
  if (layer.shape.checkpoint_every > 0) {
    args.boundaries = contiguous(given.saved);
  } else {
    if (traits.has_extra()) args.extra = contiguous(given.extra);
    if (layer.saves() > 0) {
      set_parts(args.gates, static_cast<const char*>(contiguous(given.saved)), layer,
                layer.rows * layer.saves() * layer.shape.hidden);
    }
  }
  args.d_output = contiguous(given.d_output);
  args.d_h_n = contiguous(given.d_h_n);
  args.d_c_n = contiguous(given.d_c_n);
  args.d_extra = contiguous(given.d_extra);
  args.grad_scale = contiguous(layer.grad_scale);
  args.grad_clip = layer.grad_clip;
}

void* Gradients::add(const Shape& shape, bool is_needed) {
  const bool is_wanted = wanted_[all_.size()];
  const Made made = make_if(is_wanted || is_needed, layer_, shape);
  all_.push_back(is_wanted ? made.object : py::none());
  if (is_needed && !is_wanted) unwanted_.push_back(made.object);
  return made.tensor.data;
}

void Gradients::add_biases(const Shape& ih, const Shape& hh, void*& d_bias_ih, void*& d_bias_hh) {
  const bool is_needed = wanted_[all_.size()] || wanted_[all_.size() + 1];
  d_bias_ih = add(ih, is_needed);
  d_bias_hh = add(hh, is_needed);
}

void Gradients::add_weights(BackwardArgs& args) {
  const ScanShape& shape = layer_.shape;
  const CellTraits& traits = layer_.traits();
  const int64_t gates = traits.gates * shape.hidden, recurrent = traits.recurrent * shape.hidden;
  for (int d = 0; d < shape.directions; ++d) {
    const LayerCall::Weights& w = layer_.weights[d];
    args.d_weight_ih[d] = add({gates, shape.input});
    if (w.hh) args.d_weight_hh[d] = add({recurrent, shape.proj});
    if (w.bias_ih && w.bias_hh) {
      add_biases({gates}, {recurrent}, args.d_bias_ih[d], args.d_bias_hh[d]);
    } else if (w.bias_ih) {
      args.d_bias_ih[d] = add({gates});
    }
    if (w.hr) args.d_weight_hr[d] = add({shape.proj, shape.hidden});
    for (const int64_t size : layer_.vector_sizes()) parameters_[d].push_back(add({size}));
    args.d_parameters[d] = parameters_[d].data();
  }
}

void run_backward(const std::vector<BackwardArgs>& layers) {
  const int threads = torch_threads();
  py::gil_scoped_release release;
  active_variant(layers[0].dtype)
      .backward_stack(layers.data(), static_cast<int>(layers.size()), threads);
}

namespace {

void run_backward(const BackwardArgs& args, const LayerCall& layer) {
  const int threads = torch_threads();
  py::gil_scoped_release release;
  const int64_t size = size_of(args.dtype);
  prefer_large_pages(args.d_x, args.directions * layer.rows * args.input * size);
  // glibc maps buffers from 32 MiB on anew each time; smaller ones mostly come with their pages.
  constexpr int64_t kMapped = int64_t{32} << 20;
  const int64_t column = layer.traits().gates * args.hidden * size;
  for (int d = 0; d < args.directions; ++d) {
    if (column * args.input >= kMapped)
      prefer_large_pages(args.d_weight_ih[d], column * args.input);
    if (column * args.proj >= kMapped) prefer_large_pages(args.d_weight_hh[d], column * args.proj);
  }
  active_variant(args.dtype).backward(args, threads);
}

}  // namespace

std::vector<py::object> backward(const LayerCall& layer, const SavedCall& given) {
  expect_cpu(layer);
  const ScanShape& shape = layer.shape;
  Contiguous contiguous;
  BackwardArgs args{};
  set_layer(args, layer, contiguous);
  set_given(args, layer, given, contiguous);

  Gradients gradients(layer, given.wanted);
  // Each direction writes a d_x of its own.
  const bool adds_up = shape.directions > 1;
  args.d_x =
      gradients.add(adds_up ? Shape{shape.directions, layer.rows, shape.input} : layer.x.shape);
  args.d_h_0 = gradients.add(layer.states(shape.proj));
  const CellTraits& traits = layer.traits();
  args.d_c_0 = gradients.add(layer.states(traits.states * shape.hidden));
  args.d_inputs = gradients.add(layer.inputs.shape);
  gradients.add_weights(args);
  run_backward(args, layer);

  std::vector<py::object>& all = gradients.all();
  if (given.wanted[0] && adds_up) {
    all[0] = all[0].attr("sum")(0).attr("view_as")(layer.x.object);
  }
  return std::move(all);
}

}  // namespace fastrnn
