// The forward scan: multiply h_{t-1} by W_hh, run the cell, hand h_t on.
#pragma once

#include "../cells/registry.h"
#include "block.h"
#include "multiply.h"
#include "start.h"

namespace fastrnn::cuda {

template <class Cell, class S, bool Tensor, template <class, class> class Exchange>
FASTRNN_KERNEL(kThreads)
forward_kernel(FASTRNN_ARGUMENT Params<ForwardArgs> p) {
  if constexpr (is_compiled<S, Tensor>()) {
    constexpr int G = Cell::gates;
    using T = Compute<S>;
    using V = Scalar<T>;
    using Swap = Exchange<S, ForwardArgs>;
    const Block<ForwardArgs> block(p);
    int64_t first, last;
    block.range(block.count, first, last);
    if (first == last) return;  // all blocks of the group do

    const ForwardArgs& a = p.args;
    const int64_t hidden = block.hidden;
    T* sums = reinterpret_cast<T*>(dynamic_shared() + p.layout.shared_sums);
    S* all_gates = static_cast<S*>(a.gates);

    V bias[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const S* own = static_cast<const S*>(a.bias_hh[block.direction]);
      bias[g] =
          V(own == nullptr || block.unit >= hidden ? T(0) : widen(own[g * hidden + block.unit]));
    }
    Carried<Cell, T> carried(block);
    auto& [h, c] = carried;
    const char* weights = block_weights(block);
    Swap exchange(block);
    exchange.start();

    for (int64_t i = first; i < last; ++i) {
      // What does not depend on h_{t-1} is read while others finish it.
      const int64_t t = block.time(i);
      int64_t place[kItems];
      bool cut[kItems];
      V x[kItems][G];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        place[k] = -1;
        if (!block.owns(k)) continue;
        place[k] = block.place(t, k);
        if (place[k] < 0) continue;
        cut[k] = block.before(t, k) == kCut;
        const S* projected = all_gates + block.column(place[k], G);
#pragma unroll
        for (int g = 0; g < G; ++g) x[k][g] = V(widen(projected[g * hidden]));
      }

      exchange.wait(i);
      multiply<S, Tensor>(p.layout, weights, exchange.states(i), Swap::load_state, sums);
      sync_block();

#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (!block.owns(k)) continue;
        const int row = block.local_row + k * block.row_step;
        if (place[k] >= 0) {
          V r[G], kept(0);
#pragma unroll
          for (int g = 0; g < G; ++g) {
            r[g] = bias[g];
            if (cut[k]) continue;
            r[g] = r[g] + V(sum_slices(p.layout, sums, row, g * p.layout.units + block.local_unit));
          }
          if (Cell::has_cell_state && !cut[k]) kept = c[k];
          h[k] = Cell::forward(x[k], r, cut[k] ? V(0) : h[k], kept);
          const int64_t feature = block.feature(place[k]);
          narrow(h[k].value, static_cast<S*>(a.output)[feature]);
          if constexpr (Cell::has_extra) {
            if (a.extra != nullptr) static_cast<T*>(a.extra)[feature] = kept.value;
          }
          if constexpr (Cell::has_cell_state) c[k] = kept;
          if constexpr (Cell::saves_gates) {
            if (a.keep) {
              S* gates = all_gates + block.column(place[k], G);
#pragma unroll
              for (int g = 0; g < G; ++g) narrow(x[k][g].value, gates[g * hidden]);
            }
          }
        }
        S shown;
        narrow(h[k].value, shown);
        exchange.put(i, row, block.unit, shown);
        if (i == block.count - 1) {
          static_cast<S*>(a.h_n)[block.state(k)] = shown;
          if constexpr (Cell::has_cell_state) {
            narrow(c[k].value, static_cast<S*>(a.c_n)[block.state(k)]);
          }
        }
      }
      exchange.arrive();
    }
    exchange.finish();
    carried.leave(block);
  }
}

template <class Device, class Cell>
void forward_dev_impl(const Device& device, const ForwardArgs& args) {
  visit(args.problem.dtype, device.plan.tensor, [&](auto element, auto tensor) {
    using S = decltype(element);
    launch_pass<S>(device, args, args.problem.steps,
                   forward_kernel<Cell, S, tensor.value, ClusterExchange>,
                   forward_kernel<Cell, S, tensor.value, GridExchange>);
  });
}

}  // namespace fastrnn::cuda
