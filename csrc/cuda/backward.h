// The backward scan: multiply the gradients of the gates at t+1 by W_hh^T, which with what goes
// straight through is dh_t, run the cell backward, hand its gate gradients on. A step of no time
// after the last finds the gradients of the initial states.
#pragma once

#include "../cells/registry.h"
#include "block.h"
#include "multiply.h"
#include "start.h"

namespace fastrnn::cuda {

template <class Cell, class S, bool Tensor, template <class, class> class Exchange>
FASTRNN_KERNEL(kThreads)
backward_kernel(FASTRNN_ARGUMENT Params<BackwardArgs> p) {
  if constexpr (is_compiled<S, Tensor>()) {
    constexpr int G = Cell::gates;
    using T = Compute<S>;
    using V = Scalar<T>;
    using Swap = Exchange<S, BackwardArgs>;
    const Block<BackwardArgs> block(p);
    int64_t first, last;
    block.range(block.count + 1, first, last);
    if (first == last) return;  // all blocks of the group do

    const BackwardArgs& a = p.args;
    const int64_t hidden = block.hidden;
    T* sums = reinterpret_cast<T*>(dynamic_shared() + p.layout.shared_sums);
    const auto read = [](const void* base, int64_t i) {
      return V(base == nullptr ? T(0) : widen(static_cast<const S*>(base)[i]));
    };
    const auto read_wide = [](const void* base, int64_t i) {
      return V(base == nullptr ? T(0) : static_cast<const T*>(base)[i]);
    };

    Carried<Cell, T> carried(block);
    auto& [dh, dc] = carried;
    const char* weights = block_weights(block);
    Swap exchange(block);
    exchange.start();

    for (int64_t i = first; i < last; ++i) {
      const int64_t t = block.time(i);
      int64_t place[kItems];
      bool cut[kItems];
      V gate[kItems][G], h_prev[kItems], h[kItems], extra_prev[kItems], extra[kItems];
      V d_output[kItems], d_extra[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        place[k] = -1;
        if (i == block.count || !block.owns(k)) continue;
        place[k] = block.place(t, k);
        if (place[k] < 0) continue;
        const int64_t before = block.before(t, k), feature = block.feature(place[k]);
        const bool is_first = before == kInitial;
        const int64_t previous = is_first ? block.state(k) : block.feature(before);
        cut[k] = before == kCut;
        h_prev[k] = h[k] = extra_prev[k] = extra[k] = V(0);
        if constexpr (Cell::saves_gates) {
#pragma unroll
          for (int g = 0; g < G; ++g) {
            gate[k][g] = read(a.gates, block.column(place[k], G) + g * hidden);
          }
        } else {
          h[k] = read(a.output, feature);
        }
        if constexpr (Cell::has_extra) extra[k] = read_wide(a.extra, feature);
        if (Cell::has_direct_path && !cut[k]) {
          h_prev[k] = read(is_first ? a.h_0 : a.output, previous);
        }
        if constexpr (Cell::has_cell_state) {
          if (!cut[k])
            extra_prev[k] = is_first ? read(a.c_0, previous) : read_wide(a.extra, previous);
          d_extra[k] = read_wide(a.d_extra, feature);
        }
        d_output[k] = read(a.d_output, feature);
      }

      exchange.wait(i);
      multiply<S, Tensor>(p.layout, weights, exchange.states(i), Swap::load_state, sums);
      sync_block();

#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (!block.owns(k)) continue;
        const int row = block.local_row + k * block.row_step;
        const V whole = dh[k] + V(sum_slices(p.layout, sums, row, block.local_unit));
        if (i == block.count) {
          const int64_t state = block.state(k);
          if (a.d_h_0 != nullptr) narrow(whole.value, static_cast<S*>(a.d_h_0)[state]);
          if constexpr (Cell::has_cell_state) {
            if (a.d_c_0 != nullptr) narrow(dc[k].value, static_cast<S*>(a.d_c_0)[state]);
          }
        } else if (place[k] < 0) {  // all goes on as it came
#pragma unroll
          for (int g = 0; g < G; ++g) {
            const int64_t column = g * hidden + block.unit;
            exchange.put(i, row, column, exchange.get(i, row, column));
          }
        } else {
          V dx[G], dr[G], d_kept(0);
          if constexpr (Cell::has_cell_state) d_kept = dc[k] + d_extra[k];
          const V direct = Cell::backward(gate[k], h_prev[k], h[k], extra_prev[k], extra[k],
                                          whole + d_output[k], d_kept, dx, dr);
          dh[k] = cut[k] ? V(0) : direct;
          if constexpr (Cell::has_cell_state) dc[k] = cut[k] ? V(0) : d_kept;
          S* d_gates = static_cast<S*>(a.d_gates) + block.column(place[k], G);
#pragma unroll
          for (int g = 0; g < G; ++g) {
            S shown;
            narrow(dx[g].value, d_gates[g * hidden]);
            narrow(cut[k] ? T(0) : dr[g].value, shown);
            exchange.put(i, row, g * hidden + block.unit, shown);
          }
          if constexpr (Cell::splits_gradient) {
            narrow(dr[G - 1].value, static_cast<S*>(a.d_recurrent)[block.column(place[k], 1)]);
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
void backward_dev_impl(const Device& device, const BackwardArgs& args) {
  visit(args.problem.dtype, device.plan.tensor, [&](auto element, auto tensor) {
    using S = decltype(element);
    launch_pass<S>(device, args, args.problem.steps + 1,
                   backward_kernel<Cell, S, tensor.value, ClusterExchange>,
                   backward_kernel<Cell, S, tensor.value, GridExchange>);
  });
}

}  // namespace fastrnn::cuda
