// The forward scan: multiply h_{t-1} by W_hh, run the cell, exchange h_t with the group.
#pragma once

#include "../cells/registry.h"
#include "block.h"
#include "multiply.h"
#include "options.h"
#include "start.h"

namespace fastrnn::cuda {

// A thread's items in the forward pass: what a step reads, and what it makes of the product.
template <class Cell, class S>
class ForwardItems {
 public:
  using T = Compute<S>;
  using V = Value<S>;
  static constexpr int G = Cell::gates, kItems = max_items(sizeof(S));

  FASTRNN_DEVICE explicit ForwardItems(const Block<RecurrenceForward>& block)
      : block_(block), args_(block.p.args), carried_(block), zoneout_(args_.zoneout) {
    const S* bias = static_cast<const S*>(args_.bias_hh[block.direction]);
    const bool has_bias = bias != nullptr && block.unit < block.hidden;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      bias_[g] = V(has_bias ? widen(bias[g * block.hidden + block.unit]) : T(0));
    }
  }

  // Reads what does not depend on h_{t-1}.
  FASTRNN_DEVICE void read(int64_t t) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      place_[k] = block_.owns(k) ? block_.place(t, k) : -1;
      if (place_[k] < 0) continue;
      resets_.set(k, block_.before(t, k) == kReset);
      const S* projected = gates(k);
#pragma unroll
      for (int g = 0; g < G; ++g) gates_[k][g] = projected[g * block_.hidden];
    }
    zoneout_.draw(block_, t);
  }

  // Step i, for which `total` is W_hh h_{t-1}: what others wait for.
  template <class Exchange>
  FASTRNN_DEVICE void finish(int64_t i, const SliceSum<T>& total, Exchange& exchange) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block_.owns(k)) continue;
      const int row = block_.local_row + k * block_.row_step;
      if (place_[k] >= 0) run_cell(k, row, total);
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
        if constexpr (Cell::has_cell_state) {
          narrow(carried_.c[k].value, static_cast<S*>(args_.c_n)[block_.state(k)]);
        }
      }
    }
  }

  FASTRNN_DEVICE void save_carried(bool is_last) { carried_.save(block_, is_last); }

 private:
  FASTRNN_DEVICE S* gates(int k) const {
    return static_cast<S*>(args_.gates) + block_.column(place_[k], G);
  }

  // The h that W_hh multiplies.
  FASTRNN_DEVICE T factor(int k) const {
    return masked<S>(carried_.h[k].value, args_, block_.state(k));
  }

  FASTRNN_DEVICE void run_cell(int k, int row, const SliceSum<T>& total) {
    const Layout& layout = block_.p.layout;
    auto& [h, c] = carried_;
    V x[G], r[G], extra(0);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const T product = total(row, g * layout.units + block_.local_unit);
      r[g] = bias_[g] + V(resets_[k] ? T(0) : product);
      x[g] = V(widen_now(gates_[k][g]));
    }
    if (Cell::has_cell_state && !resets_[k]) extra = c[k];
    const V h_prev = resets_[k] ? V(0) : h[k], c_prev = extra;
    h[k] = Cell::forward(x, r, h_prev, extra);
    if (zoneout_.is_on(kOfH)) h[k] = mix(V(zoneout_.weight(kOfH, k)), h_prev, h[k]);
    if constexpr (Cell::has_cell_state) {
      if (zoneout_.is_on(kOfC)) extra = mix(V(zoneout_.weight(kOfC, k)), c_prev, extra);
      c[k] = extra;
    }
    if constexpr (Cell::has_extra) extra_[k] = extra;
    if constexpr (Cell::saves_gates) {
#pragma unroll
      for (int g = 0; g < G; ++g) narrow(x[g].value, gates_[k][g]);
    }
  }

  FASTRNN_DEVICE void store_step(int k) {
    const int64_t feature = block_.feature(place_[k]);
    narrow(carried_.h[k].value, static_cast<S*>(args_.output)[feature]);
    if constexpr (Cell::has_extra) {
      if (args_.extra != nullptr) static_cast<T*>(args_.extra)[feature] = extra_[k].value;
    }
    if constexpr (Cell::saves_gates) {
      if (!args_.keep) return;
      S* saved = gates(k);
#pragma unroll
      for (int g = 0; g < G; ++g) saved[g * block_.hidden] = gates_[k][g];
    }
  }

  const Block<RecurrenceForward>& block_;
  const RecurrenceForward& args_;
  Carried<Cell, S> carried_;
  Zoneout<T> zoneout_;
  V bias_[G];
  int64_t place_[kItems];  // -1: no valid step
  Marks resets_;           // the step begins a new segment
  // W_ih x + b_ih as they are read: to widen them would wait for them. Then the activated gates.
  S gates_[kItems][G];
  V extra_[kItems];
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

    auto* const sums = reinterpret_cast<Compute<S>*>(dynamic_shared() + p.layout.shared_sums);
    ForwardItems<Cell, S> items(block);
    const Product<S, Tensor, 2> product(p.layout, block_weights(block), sums);
    const SliceSum<Compute<S>> total(p.layout, sums);
    StateExchange exchange(block);
    exchange.start();
    for (int64_t i = first; i < last; ++i) {
      items.read(block.time(i));  // while others finish h_{t-1}
      exchange.wait(i);
      product.run(exchange.states(i), StateExchange::load_state);
      sync_block();
      items.finish(i, total, exchange);
      exchange.arrive();
      items.store(i);
    }
    product.finish();
    exchange.finish();
    items.save_carried(last == block.count);
  }
}

template <class Device, class Cell>
void forward_dev_impl(const Device& device, const RecurrenceForward& args) {
  visit(args.problem.dtype, device.plan.tensor, [&](auto element, auto tensor) {
    using S = decltype(element);
    launch_pass<S>(device, args, args.problem.steps,
                   forward_kernel<Cell, S, tensor.value, ClusterExchange>,
                   forward_kernel<Cell, S, tensor.value, GridExchange>);
  });
}

}  // namespace fastrnn::cuda
