#include "run_stack.h"

#include <algorithm>
#include <deque>
#include <utility>

namespace fastrnn {

namespace {

// Memory for the final states of all layers.
void make_finals(StackResults& results, const Stack& stack, const LayerCall& layer) {
  const ScanShape& shape = layer.shape;
  const CellTraits& traits = layer.traits();
  const int64_t entries = int64_t{stack.layers} * layer.directions;
  results.h_n = make(layer, {entries, shape.batch, shape.proj});
  results.c_n =
      make_if(traits.has_cell_state(), layer, {entries, shape.batch, traits.states * shape.hidden});
}

}  // namespace

Tensor part_of(const Tensor& whole, int64_t k, int64_t parts) {
  if (!whole) return whole;
  Tensor part = whole;
  part.shape = {whole.shape[0] / parts};
  for (int i = 1; i < whole.shape.dims(); ++i) part.shape.push(whole.shape[i]);
  part.data = static_cast<char*>(whole.data) +
              k * part.shape.count() * size_of(static_cast<DType>(whole.element));
  return part;
}

LayerCall Stack::layer(int k, const Tensor& x) const {
  LayerCall layer = every;
  layer.x = x;
  layer.h_0 = part_of(h_0, k, layers);
  layer.c_0 = part_of(c_0, k, layers);
  const Tensor* next = weights + k * weights_per_layer;
  for (int d = 0; d < layer.directions; ++d) {
    read_direction(layer.weights[d], layer.traits(), weights_per_layer / layer.directions,
                   layer.traits().parameters, [&](const char*, const char*) { return *next++; });
  }
  layer.complete();
  return layer;
}

StackPlan plan_stack(const Stack& stack, const Tensor& x) {
  if (stack.layers < 2 || stack.every.directions > 1) return {};
  const LayerCall layer = stack.layer(0, x);
  return plan_stack(layer.shape, static_cast<const int64_t*>(layer.batch_sizes.data), stack.layers);
}

StackResults forward(const Stack& stack, Tensor x) {
  const bool keeps_all = stack.every.keep || stack.every.all_c;
  std::deque<Contiguous> kept;
  std::vector<ForwardArgs> waiting;  // for others, to run side by side
  StackResults results;
  results.layers.reserve(stack.layers);
  StackPlan plan;
  for (int k = 0; k < stack.layers; ++k) {
    const LayerCall layer = stack.layer(k, x);
    ForwardArgs args{};
    set_layer(args, layer, kept.emplace_back());
    if (k == 0) {
      make_finals(results, stack, layer);
      plan = plan_stack(args, args.batch_sizes, stack.layers);
      if (plan.threads < 2 && (stack.every.keep || stack.dropout)) {
        plan = {1, 1, std::max<int64_t>(args.steps, 1)};
      }
    }
    const bool waits = plan.chunk > 0;
    // One after the other, the outputs of two layers are enough.
    if (!waits && !keeps_all && k > 1) results.layers[k - 2] = {};
    results.layers.push_back(make_steps(args, layer));
    x = results.layers.back().output.tensor;
    if (stack.dropout && k + 1 < stack.layers) {
      args.dropout = part_of(stack.dropout, k, stack.layers - 1).data;
      results.dropped.push_back(make(layer, x.shape));
      x = results.dropped.back().tensor;
      args.dropped = x.data;
    }
    args.h_n = part_of(results.h_n.tensor, k, stack.layers).data;
    args.c_n = part_of(results.c_n.tensor, k, stack.layers).data;
    if (waits) {
      waiting.push_back(args);
    } else {
      run_forward(args, layer);
    }
  }
  if (!waiting.empty()) run_forward(waiting, plan);
  return results;
}

py::tuple StackResults::tuple(const Stack& stack) const {
  const bool has_cell_state = stack.every.traits().has_cell_state();
  py::list all;
  all.append(layers.back().output.object);
  all.append(h_n.object);
  if (has_cell_state) all.append(c_n.object);
  if (!stack.every.all_c) return py::tuple(std::move(all));
  for (size_t k = 0; k + 1 < layers.size(); ++k) all.append(layers[k].output.object);
  if (has_cell_state) {
    for (const Results& layer : layers) all.append(layer.extra.object);
  }
  return py::tuple(std::move(all));
}

}  // namespace fastrnn
