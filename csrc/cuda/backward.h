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
  using C = General<Cell>;
  static constexpr int G = C::gates, R = C::recurrent, K = C::saves, Z = C::inputs;
  static constexpr int Q = C::parameters, E = C::extras, kItems = max_items(sizeof(S));
  // The gates of W_hh h + b_hh whose gradients are not those of W_ih x + b_ih: of the built-in
  // cells only the last.
  static constexpr int kSplit = !C::splits_gradient ? 0 : is_general<Cell> ? R : 1;

  FASTRNN_DEVICE explicit BackwardItems(const Block<RecurrenceBackward>& block)
      : block_(block), args_(block.p.args), carried_(block), zoneout_(args_.zoneout) {
    read_parameters<Q, S>(block, parameters_);
#pragma unroll
    for (int q = 0; q < Q; ++q)
      d_parameters_[q] = V(has_sums() ? sums()[q * stride_of_sums()] : T(0));
  }

  // Reads what does not depend on the gradients at t+1.
  FASTRNN_DEVICE void read(int64_t t) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      place_[k] = block_.owns(k) ? block_.place(t, k) : -1;
      if (place_[k] >= 0) read_item(t, k);
    }
    zoneout_.draw(block_, t);
  }

  // Step i, for which total(row) is W_hh^T times the gradients of the gates at t+1: what others
  // wait for.
  template <class Total, class Exchange>
  FASTRNN_DEVICE void finish(int64_t i, Total&& total, Exchange&& exchange) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block_.owns(k)) continue;
      const int row = block_.local_row + k * block_.row_step;
      const V dh = dh_after(i, k, total(row));
      const auto put = [&](int gate, S value) {
        exchange.put(i, row, gate * block_.hidden + block_.unit, value);
      };
      if (place_[k] >= 0) {
        run_cell(i, k, dh, put);
      } else {  // not a valid step: the gradients are those of the step before
        carried_.h[k] = dh;
#pragma unroll
        for (int g = 0; g < R; ++g) put(g, narrowed<S>(T(0)));
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
      if (Z > 0 && args_.d_inputs != nullptr) {
        S* d_inputs = static_cast<S*>(args_.d_inputs) + block_.feature(place_[k], Z);
#pragma unroll
        for (int z = 0; z < Z; ++z) d_inputs[z * block_.hidden] = inputs_[k][z];
      }
      if constexpr (kSplit > 0) {
        if (args_.layer_norm.is_on()) continue;  // it stores what becomes of them
        S* d_recurrent = static_cast<S*>(args_.d_recurrent) + block_.column(place_[k], args_.split);
        if (args_.split == R) {
#pragma unroll
          for (int g = 0; g < R - kSplit; ++g) d_recurrent[g * block_.hidden] = gate_[k][g];
          d_recurrent += (R - kSplit) * block_.hidden;
        }
#pragma unroll
        for (int g = 0; g < kSplit; ++g) d_recurrent[g * block_.hidden] = d_recurrent_[k][g];
      }
    }
  }

  // The gradients of the initial states, after all steps.
  template <class Total>
  FASTRNN_DEVICE void finish_states(int64_t i, Total&& total) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (block_.owns(k)) {
        const int row = block_.local_row + k * block_.row_step;
        store_states(i, k, total(row));
      }
    }
  }

  FASTRNN_DEVICE void save_carried(bool is_last) {
    carried_.save(block_, is_last);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      if (has_sums()) sums()[q * stride_of_sums()] = d_parameters_[q].value;
    }
  }

 private:
  // Null means zero.
  FASTRNN_DEVICE static S read(const void* base, int64_t i) {
    return base == nullptr ? S{} : static_cast<const S*>(base)[i];
  }
  FASTRNN_DEVICE static T read_computed(const void* base, int64_t i) {
    return base == nullptr ? T(0) : static_cast<const T*>(base)[i];
  }

  // Where the thread's sums of the gradients of learned vectors lie, in the row of its first item.
  FASTRNN_DEVICE bool has_sums() const { return args_.d_parameters != nullptr && block_.owns(0); }
  FASTRNN_DEVICE T* sums() const {
    const int64_t first = block_.direction * Q * block_.batch + block_.row(0);
    return static_cast<T*>(args_.d_parameters) + first * block_.hidden + block_.unit;
  }
  FASTRNN_DEVICE int64_t stride_of_sums() const { return block_.batch * block_.hidden; }

  FASTRNN_DEVICE void store_states(int64_t i, int k, T total) {
    const V dh = carried_.h[k] = dh_after(i, k, total);
    if (args_.d_h_0 != nullptr) narrow(dh.value, static_cast<S*>(args_.d_h_0)[block_.state(k)]);
    if (C::states > 0 && args_.d_c_0 != nullptr) {
      S* d_c_0 = static_cast<S*>(args_.d_c_0) + block_.states(k, C::states);
#pragma unroll
      for (int j = 0; j < C::states; ++j) narrow(carried_.c[k][j].value, d_c_0[j * block_.hidden]);
    }
  }

  FASTRNN_DEVICE S h_before(int64_t t, int k) const {
    const int64_t before = block_.before(t, k);
    if (before == kReset) return S{};
    return before == kInitial ? read(args_.h_0, block_.state(k))
                              : read(args_.output, block_.feature(before));
  }

  FASTRNN_DEVICE void read_item(int64_t t, int k) {
    const int64_t before = block_.before(t, k), hidden = block_.hidden;
    resets_.set(k, before == kReset);
    first_.set(k, before == kInitial);
    h_[k] = C::reads_output ? read(args_.output, block_.feature(place_[k])) : S{};
    h_prev_[k] = C::has_direct_path ? h_before(t, k) : S{};
    d_output_[k] = read(args_.d_output, block_.feature(place_[k]));
#pragma unroll
    for (int j = 0; j < K; ++j) {
      gate_[k][j] = read(args_.saved, block_.column(place_[k], K) + j * hidden);
    }
#pragma unroll
    for (int z = 0; z < Z; ++z) {
      inputs_[k][z] = read(args_.inputs, block_.feature(place_[k], Z) + z * hidden);
    }
#pragma unroll
    for (int j = 0; j < E; ++j) {
      extra_[k][j] = read_computed(args_.extra, block_.feature(place_[k], E) + j * hidden);
    }
#pragma unroll
    for (int j = 0; j < C::states; ++j) {
      extra_prev_[k][j] = T(0);
      if (first_[k]) {
        c_0_[k][j] = read(args_.c_0, block_.states(k, C::states) + j * hidden);
      } else if (!resets_[k]) {
        extra_prev_[k][j] = read_computed(args_.extra, block_.feature(before, E) + j * hidden);
      }
      d_extra_[k][j] =
          read_computed(args_.d_extra, block_.feature(place_[k], C::states) + j * hidden);
    }
  }

  // The gradient of h from the step after, where there is one, else of the final state; total: of
  // the product.
  FASTRNN_DEVICE V dh_after(int64_t i, int k, T total) const {
    const V dh = carried_.h[k] + V(masked<S>(total, args_, block_.state(k)));
    if (!has_edge()) return dh;
    const int64_t after = block_.after(i, k);
    return after < 0 ? dh : over_edge<T>(dh, args_, after);
  }
  FASTRNN_DEVICE bool has_edge() const {
    return args_.grad_scale != nullptr || args_.grad_clip > 0;
  }

  // put(gate, gradient): for the product of the step before.
  template <class Put>
  FASTRNN_DEVICE void run_cell(int64_t i, int k, V from_after, Put&& put) {
    CellInputs in = load_cell(i, k, from_after);
    finish_cell(k, in,
                [&](int gate, T value) { put(gate, narrowed<S>(resets_[k] ? T(0) : value)); });
  }

 public:
  // What the cell's backward takes of an item, and what goes past it.
  struct CellInputs {
    V gate[room(K)], inputs[room(Z)], h_prev, h, before[room(E)], extra[room(E)];
    V dh, d_state[room(E)];
    V kept_h, kept_c;
  };

  FASTRNN_DEVICE CellInputs load_cell(int64_t i, int k, V from_after) const {
    CellInputs in;
    in.before[0] = in.extra[0] = in.d_state[0] = V(0);
#pragma unroll
    for (int j = 0; j < K; ++j) in.gate[j] = V(widen_now(gate_[k][j]));
#pragma unroll
    for (int z = 0; z < Z; ++z) in.inputs[z] = V(widen_now(inputs_[k][z]));
#pragma unroll
    for (int j = 0; j < E; ++j) in.extra[j] = V(extra_[k][j]);
#pragma unroll
    for (int j = 0; j < C::states; ++j) {
      in.d_state[j] = carried_.c[k][j] + V(d_extra_[k][j]);
      in.before[j] = first_[k] ? V(widen_now(c_0_[k][j])) : V(extra_prev_[k][j]);
    }
    in.h_prev = V(widen_now(h_prev_[k]));
    in.h = V(widen_now(h_[k]));
    in.dh = from_after + V(widen_now(d_output_[k]));
    // With zoneout a part of the gradients goes past the cell.
    in.kept_h = in.kept_c = V(0);
    if (keeps_h()) {
      const V weight(zoneout_.weight(kOfH, k));
      in.kept_h = weight * in.dh;
      in.dh = in.dh - in.kept_h;
      if (C::reads_output && zoneout_.is_mean()) {
        in.h = zoneout_.unmixed(V(widen(h_before(block_.time(i), k))), in.h);
      }
    }
    if constexpr (C::rebuilds_cell_state) {
      if (keeps_c()) {
        in.extra[0] = C::cell_state(in.gate, in.before[0]);
        in.kept_c = V(zoneout_.weight(kOfC, k)) * in.d_state[0];
        in.d_state[0] = in.d_state[0] - in.kept_c;
      }
    }
    return in;
  }

  // The cell's backward, and what becomes of its results; put(gate, gradient): those of W_hh h.
  template <class Put>
  FASTRNN_DEVICE void finish_cell(int k, CellInputs& in, Put&& put) {
    V dx[G], dr[room(R)], d_inputs[room(Z)], d_parameters[room(Q)];
    V direct = C::backward(in.gate, in.inputs, parameters_, in.h_prev, in.h, in.before, in.extra,
                           in.dh, in.d_state, dx, dr, d_inputs, d_parameters);
    if (keeps_h()) direct = direct + in.kept_h;
    if (keeps_c()) in.d_state[0] = in.d_state[0] + in.kept_c;
    carried_.h[k] = resets_[k] ? V(0) : direct;
#pragma unroll
    for (int j = 0; j < C::states; ++j) {
      if (has_edge()) in.d_state[j] = over_edge<T>(in.d_state[j], args_, place_[k]);
      carried_.c[k][j] = resets_[k] ? V(0) : in.d_state[j];
    }
    const V* const recurrent = C::splits_gradient ? dr : dx;
#pragma unroll
    for (int g = 0; g < R; ++g) put(g, recurrent[g].value);
#pragma unroll
    for (int g = 0; g < G; ++g) narrow(dx[g].value, gate_[k][g]);
#pragma unroll
    for (int g = 0; g < kSplit; ++g) narrow(dr[R - kSplit + g].value, d_recurrent_[k][g]);
#pragma unroll
    for (int z = 0; z < Z; ++z) narrow(d_inputs[z].value, inputs_[k][z]);
#pragma unroll
    for (int q = 0; q < Q; ++q) d_parameters_[q] = d_parameters_[q] + d_parameters[q];
  }

  // Of the first item with layer normalisation, what forward computed, from x[G] and r[R]; and the
  // gradient of its h, of which the product has brought `total`.
  FASTRNN_DEVICE CellInputs recompute_cell(int64_t i, T total, V* x, const V* r) const {
    CellInputs in = load_cell(i, 0, dh_after(i, 0, total));
#pragma unroll
    for (int j = 0; j < C::states; ++j) in.extra[j] = in.before[j];
    in.h = C::forward(x, r, in.inputs, parameters_, in.h_prev, in.extra, in.gate);
    return in;
  }

 private:
  FASTRNN_DEVICE bool keeps_h() const { return zoneout_.is_on(kOfH); }
  FASTRNN_DEVICE bool keeps_c() const { return C::rebuilds_cell_state && zoneout_.is_on(kOfC); }

  const Block<RecurrenceBackward>& block_;
  const RecurrenceBackward& args_;
  Carried<Cell, S> carried_;  // the direct part of dh, or all of it, and dc
  Zoneout<T> zoneout_;
  V parameters_[room(Q)], d_parameters_[room(Q)];
  int64_t place_[kItems];  // -1: no valid step
  Marks resets_;           // the step begins a new segment
  Marks first_;            // the initial state comes before the step
  // All as it is read: to widen it would wait for it. What forward saved, then the gradients of the
  // gates; the inputs, then theirs.
  S gate_[kItems][G > K ? G : K], inputs_[kItems][room(Z)];
  S h_prev_[kItems], h_[kItems], c_0_[kItems][room(C::states)], d_output_[kItems];
  T extra_prev_[kItems][room(C::states)], extra_[kItems][room(E)], d_extra_[kItems][room(E)];
  S d_recurrent_[kItems][room(kSplit)];
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

    BackwardItems<Cell, S> items(block);
    if constexpr (General<Cell>::recurrent == 0) {
      const auto total = [](int) { return Compute<S>(0); };
      for (int64_t i = first; i < last; ++i) {
        if (i == block.count) {
          items.finish_states(i, total);
          break;
        }
        items.read(block.time(i));
        items.finish(i, total, NoExchange{});
        items.store();
      }
    } else {
      auto* const sums = reinterpret_cast<Compute<S>*>(dynamic_shared() + p.layout.shared_sums);
      const Product<S, Tensor, 1> product(p.layout, block_weights(block), sums);
      const SliceSum<Compute<S>> sum(p.layout, sums);
      const auto total = [&](int row) { return sum(row, block.local_unit); };
      StateExchange exchange(block);
      exchange.start(last);
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
    }
    items.save_carried(last == block.count + 1);
  }
}

// With layer normalisation: see layer_norm.h.
template <class Cell, class S>
void run_normalised(const Cuda& device, const RecurrenceBackward& args);

template <class Cell, class S>
void run_backward(const Cuda& device, const RecurrenceBackward& args) {
  if constexpr (General<Cell>::recurrent > 0) {
    if (args.layer_norm.is_on()) return run_normalised<Cell, S>(device, args);
  }
  visit_tensor<S>(device.plan.tensor, [&](auto tensor) {
    const auto in_grid = backward_kernel<Cell, S, tensor.value, GridExchange>;
    auto in_cluster = in_grid;
    if constexpr (General<Cell>::recurrent > 0) {
      in_cluster = backward_kernel<Cell, S, tensor.value, ClusterExchange>;
    }
    launch_pass<S>(device, args, args.problem.steps + 1, in_cluster, in_grid);
  });
}

template <class Device, class Cell>
void backward_dev_impl(const Device& device, const RecurrenceBackward& args) {
  visit(args.problem.dtype,
        [&](auto element) { run_backward<Cell, decltype(element)>(device, args); });
}

}  // namespace fastrnn::cuda
