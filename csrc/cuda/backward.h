// The backward scan: multiply the gradients of the gates at t+1 by W_hh^T, which with the direct
// part is dh_t, run the cell backward, exchange its gate gradients with the group. One more step,
// after all others, computes the gradients of the initial states.
#pragma once

#include "../cells/registry.h"
#include "block.h"
#include "multiply.h"
#include "options.h"
#include "start.h"

namespace fastrnn::cuda {

// A thread's items in the backward pass: what a step reads, and what it makes of the product.
template <class Cell, class S>
class BackwardItems {
 public:
  using T = Compute<S>;
  using V = Value<S>;
  static constexpr int G = Cell::gates, kItems = max_items(sizeof(S));

  FASTRNN_DEVICE explicit BackwardItems(const Block<RecurrenceBackward>& block)
      : block_(block), args_(block.p.args), carried_(block), zoneout_(args_.zoneout) {}

  // Reads what does not depend on the gradients at t+1.
  FASTRNN_DEVICE void read(int64_t t) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      place_[k] = block_.owns(k) ? block_.place(t, k) : -1;
      if (place_[k] >= 0) read_item(t, k);
    }
    zoneout_.draw(block_, t);
  }

  // Step i, for which `total` is W_hh^T times the gradients of the gates at t+1: what others wait
  // for.
  template <class Exchange>
  FASTRNN_DEVICE void finish(int64_t i, const SliceSum<T>& total, Exchange& exchange) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block_.owns(k)) continue;
      const int row = block_.local_row + k * block_.row_step;
      const V dh = dh_after(i, k, row, total);
      if (place_[k] >= 0) {
        run_cell(i, k, row, dh, exchange);
      } else {  // not a valid step: the gradients are those of the step before
        carried_.h[k] = dh;
#pragma unroll
        for (int g = 0; g < G; ++g) {
          exchange.put(i, row, g * block_.hidden + block_.unit, narrowed<S>(T(0)));
        }
      }
    }
  }

  // And what nobody waits for.
  FASTRNN_DEVICE void store() {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (place_[k] < 0) continue;
      S* d_gates = static_cast<S*>(args_.d_gates) + block_.column(place_[k], G);
#pragma unroll
      for (int g = 0; g < G; ++g) d_gates[g * block_.hidden] = gate_[k][g];
      if constexpr (Cell::splits_gradient) {
        static_cast<S*>(args_.d_recurrent)[block_.column(place_[k], 1)] = d_recurrent_[k];
      }
    }
  }

  // The gradients of the initial states, after all steps.
  FASTRNN_DEVICE void finish_states(int64_t i, const SliceSum<T>& total) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block_.owns(k)) continue;
      const int64_t state = block_.state(k);
      const V dh = carried_.h[k] = dh_after(i, k, block_.local_row + k * block_.row_step, total);
      if (args_.d_h_0 != nullptr) narrow(dh.value, static_cast<S*>(args_.d_h_0)[state]);
      if constexpr (Cell::has_cell_state) {
        if (args_.d_c_0 != nullptr) {
          narrow(carried_.c[k].value, static_cast<S*>(args_.d_c_0)[state]);
        }
      }
    }
  }

  FASTRNN_DEVICE void save_carried(bool is_last) { carried_.save(block_, is_last); }

 private:
  // Null means zero.
  FASTRNN_DEVICE static S read(const void* base, int64_t i) {
    return base == nullptr ? S{} : static_cast<const S*>(base)[i];
  }
  FASTRNN_DEVICE static T read_computed(const void* base, int64_t i) {
    return base == nullptr ? T(0) : static_cast<const T*>(base)[i];
  }

  FASTRNN_DEVICE S h_before(int64_t t, int k) const {
    const int64_t before = block_.before(t, k);
    if (before == kReset) return S{};
    return before == kInitial ? read(args_.h_0, block_.state(k))
                              : read(args_.output, block_.feature(before));
  }

  FASTRNN_DEVICE void read_item(int64_t t, int k) {
    const int64_t before = block_.before(t, k), feature = block_.feature(place_[k]);
    const bool is_first = before == kInitial;
    const int64_t previous = is_first ? block_.state(k) : block_.feature(before);
    resets_.set(k, before == kReset);
    h_[k] = S{};
    extra_prev_[k] = extra_[k] = d_extra_[k] = T(0);
    if constexpr (Cell::saves_gates) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        gate_[k][g] = read(args_.gates, block_.column(place_[k], G) + g * block_.hidden);
      }
    } else {
      h_[k] = read(args_.output, feature);
    }
    if constexpr (Cell::has_extra) extra_[k] = read_computed(args_.extra, feature);
    h_prev_[k] = Cell::has_direct_path ? h_before(t, k) : S{};
    if constexpr (Cell::has_cell_state) {
      first_.set(k, is_first);
      if (!resets_[k]) {
        if (is_first) {
          c_0_[k] = read(args_.c_0, previous);
        } else {
          extra_prev_[k] = read_computed(args_.extra, previous);
        }
      }
      d_extra_[k] = read_computed(args_.d_extra, feature);
    }
    d_output_[k] = read(args_.d_output, feature);
  }

  // The gradient of h from the step after, where there is one, else of the final state.
  FASTRNN_DEVICE V dh_after(int64_t i, int k, int row, const SliceSum<T>& total) const {
    const T sum = total(row, block_.local_unit);
    const V dh = carried_.h[k] + V(masked<S>(sum, args_, block_.state(k)));
    if (!has_edge()) return dh;
    const int64_t after = block_.after(i, k);
    return after < 0 ? dh : over_edge<T>(dh, args_, after);
  }
  FASTRNN_DEVICE bool has_edge() const {
    return args_.grad_scale != nullptr || args_.grad_clip > 0;
  }

  template <class Exchange>
  FASTRNN_DEVICE void run_cell(int64_t i, int k, int row, V from_after, Exchange& exchange) {
    auto& [dh, dc] = carried_;
    V gate[G], dx[G], dr[G], d_state(0), before(extra_prev_[k]);
#pragma unroll
    for (int g = 0; g < G; ++g) gate[g] = V(Cell::saves_gates ? widen_now(gate_[k][g]) : T(0));
    if constexpr (Cell::has_cell_state) {
      d_state = dc[k] + V(d_extra_[k]);
      if (first_[k]) before = V(widen_now(c_0_[k]));
    }
    V h(widen_now(h_[k])), extra(extra_[k]);
    V d_h = from_after + V(widen_now(d_output_[k])), kept_h(0), kept_c(0);
    // With zoneout a part of the gradients goes past the cell.
    const bool keeps_h = zoneout_.is_on(kOfH), keeps_c = zoneout_.is_on(kOfC);
    if (keeps_h) {
      const V weight(zoneout_.weight(kOfH, k));
      kept_h = weight * d_h;
      d_h = d_h - kept_h;
      if (!Cell::saves_gates && zoneout_.is_mean()) {
        h = zoneout_.unmixed(V(widen(h_before(block_.time(i), k))), h);
      }
    }
    if constexpr (Cell::has_cell_state) {
      if (keeps_c) {
        extra = Cell::cell_state(gate, before);
        kept_c = V(zoneout_.weight(kOfC, k)) * d_state;
        d_state = d_state - kept_c;
      }
    }
    V direct =
        Cell::backward(gate, V(widen_now(h_prev_[k])), h, before, extra, d_h, d_state, dx, dr);
    if (keeps_h) direct = direct + kept_h;
    dh[k] = resets_[k] ? V(0) : direct;
    if constexpr (Cell::has_cell_state) {
      if (keeps_c) d_state = d_state + kept_c;
      if (has_edge()) d_state = over_edge<T>(d_state, args_, place_[k]);
      dc[k] = resets_[k] ? V(0) : d_state;
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const S exchanged = narrowed<S>(resets_[k] ? T(0) : dr[g].value);
      exchange.put(i, row, g * block_.hidden + block_.unit, exchanged);
      narrow(dx[g].value, gate_[k][g]);
    }
    if constexpr (Cell::splits_gradient) narrow(dr[G - 1].value, d_recurrent_[k]);
  }

  const Block<RecurrenceBackward>& block_;
  const RecurrenceBackward& args_;
  Carried<Cell, S> carried_;  // the direct part of dh, or all of it, and dc
  Zoneout<T> zoneout_;
  int64_t place_[kItems];  // -1: no valid step
  Marks resets_;           // the step begins a new segment
  Marks first_;            // the initial state comes before the step
  // All as it is read: to widen it would wait for it. The gates, then their gradients.
  S gate_[kItems][G], h_prev_[kItems], h_[kItems], c_0_[kItems], d_output_[kItems];
  T extra_prev_[kItems], extra_[kItems], d_extra_[kItems];
  S d_recurrent_[kItems];
};

template <class Cell, class S, bool Tensor, template <class, class> class Exchange>
FASTRNN_KERNEL(kThreads)
backward_kernel(FASTRNN_ARGUMENT Params<RecurrenceBackward> p) {
  if constexpr (is_compiled<S, Tensor>()) {
    using StateExchange = Exchange<S, RecurrenceBackward>;
    const Block<RecurrenceBackward> block(p);
    int64_t first, last;
    block.range(block.count + 1, first, last);
    if (first == last) return;  // as do all blocks of the group

    auto* const sums = reinterpret_cast<Compute<S>*>(dynamic_shared() + p.layout.shared_sums);
    BackwardItems<Cell, S> items(block);
    const Product<S, Tensor, 1> product(p.layout, block_weights(block), sums);
    const SliceSum<Compute<S>> total(p.layout, sums);
    StateExchange exchange(block);
    exchange.start();
    for (int64_t i = first; i < last; ++i) {
      const bool is_step = i < block.count;
      if (is_step) items.read(block.time(i));  // while others finish the gradients at t+1
      exchange.wait(i);
      product.run(exchange.states(i), StateExchange::load_state);
      sync_block();
      if (is_step) {
        items.finish(i, total, exchange);
      } else {
        items.finish_states(i, total);
      }
      exchange.arrive();
      if (is_step) items.store();
    }
    product.finish();
    exchange.finish();
    items.save_carried(last == block.count + 1);
  }
}

template <class Device, class Cell>
void backward_dev_impl(const Device& device, const RecurrenceBackward& args) {
  visit(args.problem.dtype, device.plan.tensor, [&](auto element, auto tensor) {
    using S = decltype(element);
    launch_pass<S>(device, args, args.problem.steps + 1,
                   backward_kernel<Cell, S, tensor.value, ClusterExchange>,
                   backward_kernel<Cell, S, tensor.value, GridExchange>);
  });
}

}  // namespace fastrnn::cuda
