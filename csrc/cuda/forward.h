// The forward scan: multiply h_{t-1} by W_hh, run the cell, exchange h_t with the group.
#pragma once

#include "../cells/registry.h"
#include "block.h"
#include "multiply.h"
#include "options.h"
#include "start.h"

namespace fastrnn::cuda {

struct AsReturned {
  template <class V>
  FASTRNN_DEVICE V operator()(V h, const V*, const V*) const {
    return h;
  }
};

// A thread's items in the forward pass: what a step reads, and what it makes of the product.
template <class Cell, class S>
class ForwardItems {
 public:
  using T = Compute<S>;
  using V = Value<S>;
  using C = General<Cell>;
  static constexpr int G = C::gates, R = C::recurrent, K = C::saves, Z = C::inputs;
  static constexpr int Q = C::parameters, E = C::extras, kItems = max_items(sizeof(S));

  FASTRNN_DEVICE explicit ForwardItems(const Block<RecurrenceForward>& block)
      : block_(block), args_(block.p.args), carried_(block), zoneout_(args_.zoneout) {
    const S* bias = static_cast<const S*>(args_.bias_hh[block.direction]);
    const bool has_bias = bias != nullptr && block.unit < block.hidden;
#pragma unroll
    for (int g = 0; g < R; ++g) {
      bias_[g] = V(has_bias ? widen(bias[g * block.hidden + block.unit]) : T(0));
    }
    read_parameters<Q, S>(block, parameters_);
  }

  // Reads what does not depend on h_{t-1}.
  FASTRNN_DEVICE void read(int64_t t) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      place_[k] = block_.owns(k) ? block_.place(t, k) : -1;
      if (place_[k] < 0) continue;
      resets_.set(k, block_.before(t, k) == kReset);
      const S* gates = static_cast<const S*>(args_.gates) + block_.column(place_[k], G);
#pragma unroll
      for (int g = 0; g < G; ++g) gates_[k][g] = gates[g * block_.hidden];
      if constexpr (Z > 0) {
        const S* inputs = static_cast<const S*>(args_.inputs) + block_.feature(place_[k], Z);
#pragma unroll
        for (int z = 0; z < Z; ++z) inputs_[k][z] = inputs[z * block_.hidden];
      }
    }
    zoneout_.draw(block_, t);
  }

  // Step i, for which total(row, gate) is W_hh h_{t-1}: what others wait for. output(h, saved,
  // extra) is the h that the cell's forward is taken to have returned.
  template <class Total, class Exchange, class Output>
  FASTRNN_DEVICE void finish(int64_t i, Total&& total, Exchange&& exchange, Output&& output) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block_.owns(k)) continue;
      const int row = block_.local_row + k * block_.row_step;
      if (place_[k] >= 0) {
        run_cell(k, [&](int gate) { return total(row, gate); }, output);
      }
      exchange.put(i, row, block_.unit, narrowed<S>(factor(k)));
    }
  }

  // And what nobody waits for.
  FASTRNN_DEVICE void store(int64_t i) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (place_[k] >= 0) store_step(k);
      if (i == block_.count - 1 && block_.owns(k)) {
        narrow(carried_.h[k].value, static_cast<S*>(args_.h_n)[block_.state(k)]);
#pragma unroll
        for (int j = 0; j < C::states; ++j) {
          S* c_n = static_cast<S*>(args_.c_n) + block_.states(k, C::states);
          narrow(carried_.c[k][j].value, c_n[j * block_.hidden]);
        }
      }
    }
  }

  FASTRNN_DEVICE void save_carried(bool is_last) { carried_.save(block_, is_last); }

  // Of the first item, the first of the other states as the cell leaves it, before zoneout.
  template <class Total>
  FASTRNN_DEVICE T next_state(Total&& total) {
    T state = 0;
    const auto output = [&](V h, const V*, const V* extra) {
      state = extra[0].value;
      return h;
    };
    run_cell(0, [&](int gate) { return total(block_.local_row, gate); }, output);
    return state;
  }

 private:
  // The h that W_hh multiplies.
  FASTRNN_DEVICE T factor(int k) const {
    return masked<S>(carried_.h[k].value, args_, block_.state(k));
  }

  // total(gate): of W_hh h_{t-1}.
  template <class Total, class Output>
  FASTRNN_DEVICE void run_cell(int k, Total&& total, Output&& output) {
    auto& [h, c] = carried_;
    V x[G], r[room(R)], inputs[room(Z)], extra[room(E)], saved[room(K)];
    extra[0] = V(0);
#pragma unroll
    for (int g = 0; g < R; ++g) r[g] = bias_[g] + V(resets_[k] ? T(0) : total(g));
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] = V(widen_now(gates_[k][g]));
#pragma unroll
    for (int z = 0; z < Z; ++z) inputs[z] = V(widen_now(inputs_[k][z]));
#pragma unroll
    for (int j = 0; j < C::states; ++j) extra[j] = resets_[k] ? V(0) : c[k][j];
    const V h_prev = resets_[k] ? V(0) : h[k], c_prev = extra[0];
    h[k] = output(C::forward(x, r, inputs, parameters_, h_prev, extra, saved), saved, extra);
    if (zoneout_.is_on(kOfH)) h[k] = mix(V(zoneout_.weight(kOfH, k)), h_prev, h[k]);
    if constexpr (C::rebuilds_cell_state) {
      if (zoneout_.is_on(kOfC)) extra[0] = mix(V(zoneout_.weight(kOfC, k)), c_prev, extra[0]);
    }
#pragma unroll
    for (int j = 0; j < C::states; ++j) c[k][j] = extra[j];
#pragma unroll
    for (int j = 0; j < E; ++j) extra_[k][j] = extra[j];
#pragma unroll
    for (int j = 0; j < K; ++j) narrow(saved[j].value, gates_[k][j]);
  }

  FASTRNN_DEVICE void store_step(int k) {
    narrow(carried_.h[k].value, static_cast<S*>(args_.output)[block_.feature(place_[k])]);
    if constexpr (E > 0) {
      if (args_.extra != nullptr) {
        T* extra = static_cast<T*>(args_.extra) + block_.feature(place_[k], E);
#pragma unroll
        for (int j = 0; j < E; ++j) extra[j * block_.hidden] = extra_[k][j].value;
      }
    }
    if constexpr (K > 0) {
      if (args_.saved == nullptr) return;
      S* saved = static_cast<S*>(args_.saved) + block_.column(place_[k], K);
#pragma unroll
      for (int j = 0; j < K; ++j) saved[j * block_.hidden] = gates_[k][j];
    }
  }

  const Block<RecurrenceForward>& block_;
  const RecurrenceForward& args_;
  Carried<Cell, S> carried_;
  Zoneout<T> zoneout_;
  V bias_[room(R)], parameters_[room(Q)];
  int64_t place_[kItems];  // -1: no valid step
  Marks resets_;           // the step begins a new segment
  // W_ih x + b_ih as they are read: to widen them would wait for them. Then what is saved.
  S gates_[kItems][G > K ? G : K], inputs_[kItems][room(Z)];
  V extra_[kItems][room(E)];
};

template <class Cell, class S, bool Tensor, template <class, class> class Exchange>
FASTRNN_KERNEL(kThreads)
forward_kernel(FASTRNN_ARGUMENT Params<RecurrenceForward> p) {
  if constexpr (is_compiled<S, Tensor>()) {
    using StateExchange = Exchange<S, RecurrenceForward>;
    const Block<RecurrenceForward> block(p);
    int64_t first, last;
    block.range(block.count, first, last);
    if (first == last) return;  // as do all blocks of the group

    ForwardItems<Cell, S> items(block);
    if constexpr (General<Cell>::recurrent == 0) {
      const auto total = [](int, int) { return Compute<S>(0); };
      for (int64_t i = first; i < last; ++i) {
        items.read(block.time(i));
        items.finish(i, total, NoExchange{}, AsReturned{});
        items.store(i);
      }
    } else {
      auto* const sums = reinterpret_cast<Compute<S>*>(dynamic_shared() + p.layout.shared_sums);
      const Product<S, Tensor, 2> product(p.layout, block_weights(block), sums);
      const SliceSum<Compute<S>> sum(p.layout, sums);
      const auto total = [&](int row, int gate) {
        return sum(row, gate * p.layout.units + block.local_unit);
      };
      StateExchange exchange(block);
      exchange.start(last);
      for (int64_t i = first; i < last; ++i) {
        items.read(block.time(i));  // while others finish h_{t-1}
        exchange.wait(i);
        product.run(exchange.states(i), StateExchange::load_state);
        sync_block();
        items.finish(i, total, exchange, AsReturned{});
        exchange.arrive();
        items.store(i);
      }
      product.finish();
      exchange.finish();
    }
    items.save_carried(last == block.count);
  }
}

// With layer normalisation: see layer_norm.h.
template <class Cell, class S>
void run_normalised(const Cuda& device, const RecurrenceForward& args);

template <class Cell, class S>
void run_forward(const Cuda& device, const RecurrenceForward& args) {
  if constexpr (General<Cell>::recurrent > 0) {
    if (args.layer_norm.is_on()) return run_normalised<Cell, S>(device, args);
  }
  visit_tensor<S>(device.plan.tensor, [&](auto tensor) {
    const auto in_grid = forward_kernel<Cell, S, tensor.value, GridExchange>;
    auto in_cluster = in_grid;
    if constexpr (General<Cell>::recurrent > 0) {
      in_cluster = forward_kernel<Cell, S, tensor.value, ClusterExchange>;
    }
    launch_pass<S>(device, args, args.problem.steps, in_cluster, in_grid);
  });
}

template <class Device, class Cell>
void forward_dev_impl(const Device& device, const RecurrenceForward& args) {
  visit(args.problem.dtype,
        [&](auto element) { run_forward<Cell, decltype(element)>(device, args); });
}

}  // namespace fastrnn::cuda
