// Layer normalisation (Ba et al., arXiv:1607.06450) of W_hh h, over all recurrent gates and units
// of a row, and of the c that an LSTM's output reads. A row needs all its products before its cell,
// so that each step is two launches: one multiplies, and in the next a block takes a row. (W_ih x
// is normalised before the scan, and its gradient after it.)
//
// Of rows n = (v - mean) * inverse, where the gradient of gain * n + bias is d,
//   dv = inverse * (gain * d - mean(gain * d) - n * mean(gain * d * n))
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastrnn::cuda {

constexpr double kLayerNormEpsilon = 1e-5;

// The sum of what all threads of the block give, the same for each.
template <class T>
FASTRNN_DEVICE T sum_block(T value) {
  T* const values = reinterpret_cast<T*>(dynamic_shared());
  sync_block();
  values[thread_index()] = value;
  sync_block();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread_index() < half) values[thread_index()] += values[thread_index() + half];
    sync_block();
  }
  return values[0];
}

template <class T>
struct Moments {
  T mean, inverse;  // inverse: of the standard deviation

  FASTRNN_DEVICE T normalise(T value) const { return (value - mean) * inverse; }
};

// Of value(i), i in [0, count).
template <class T, class F>
FASTRNN_DEVICE Moments<T> moments_of(int64_t count, F&& value) {
  T sum = 0, squares = 0;
  for (int64_t i = thread_index(); i < count; i += kThreads) sum += value(i);
  const T mean = sum_block(sum) / static_cast<T>(count);
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    squares += (value(i) - mean) * (value(i) - mean);
  }
  const T variance = sum_block(squares) / static_cast<T>(count);
  return {mean, 1 / std::sqrt(variance + static_cast<T>(kLayerNormEpsilon))};
}

// A row's part of the buffers of LayerNormArgs.
template <class Cell, class S, class Args>
struct NormRow {
  using T = Compute<S>;
  using C = General<Cell>;
  static constexpr int R = C::recurrent;

  const Block<Args>& block;
  const int64_t hidden, all;  // all: R*H
  const S *gain_hh, *gain_c, *bias_c;
  // What the product has brought; backward then has the gradients of the gates from [H] on; c; and
  // its gradient. All of them are written and read by the same threads.
  T *product, *d_gates, *c, *d_c;
  T *d_gain_hh, *d_bias_hh, *d_gain_c, *d_bias_c;

  FASTRNN_DEVICE explicit NormRow(const Block<Args>& b)
      : block(b), hidden(b.hidden), all(R * b.hidden) {
    const LayerNormArgs& norm = b.p.args.layer_norm;
    const int64_t gains = all + (C::normalises_state ? 2 * hidden : 0);
    gain_hh = static_cast<const S*>(norm.gains) + b.direction * gains;
    gain_c = gain_hh + all;
    bias_c = gain_c + hidden;
    const int64_t row = b.direction * b.batch + b.row(0);
    product = static_cast<T*>(norm.scratch) + row * (all + 3 * hidden);
    d_gates = product + hidden;
    c = product + all + hidden;
    d_c = c + hidden;
    d_gain_hh = static_cast<T*>(norm.sums) + row * (2 * all + 2 * hidden);
    d_bias_hh = d_gain_hh + all;
    d_gain_c = d_bias_hh + all;
    d_bias_c = d_gain_c + hidden;
  }
  // [R*H] of the step that lies at `place`.
  FASTRNN_DEVICE S* raw(int64_t place) const {
    const int64_t row = block.direction * block.p.args.total + place;
    return static_cast<S*>(block.p.args.layer_norm.raw) + row * all;
  }
  FASTRNN_DEVICE T gain(int gate) const { return widen(gain_hh[gate * hidden + block.unit]); }
};

// The product of one step, into the scratch.
template <class S, bool Tensor, class Args>
FASTRNN_KERNEL(kThreads)
norm_product_kernel(FASTRNN_ARGUMENT Params<Args> p) {
  if constexpr (is_compiled<S, Tensor>()) {
    using T = Compute<S>;
    const Block<Args> block(p);
    const Problem& problem = p.args.problem;
    int64_t first, last;
    block.range(block.count + (problem.pass == Pass::kBackward ? 1 : 0), first, last);
    if (first == last) return;
    T* const sums = reinterpret_cast<T*>(dynamic_shared() + p.layout.shared_sums);
    const Product<S, Tensor, 2, true> product(p.layout, block_weights(block), sums);
    GridExchange<S, Args> exchange(block);
    product.run(exchange.states(first), GridExchange<S, Args>::load_state);
    sync_block();
    const SliceSum<T> sum(p.layout, sums);
    const int columns = problem.columns_per_unit();
    for (int k = 0; k < max_items(sizeof(S)); ++k) {
      if (!block.owns(k)) continue;
      T* const row =
          static_cast<T*>(p.args.layer_norm.scratch) +
          (block.direction * block.batch + block.row(k)) * (problem.gates + 3) * block.hidden;
      for (int g = 0; g < columns; ++g) {
        row[g * block.hidden + block.unit] =
            sum(block.local_row + k * block.row_step, g * p.layout.units + block.local_unit);
      }
    }
  }
}

// The cell on a row whose product is complete.
template <class Cell, class S>
FASTRNN_KERNEL(kThreads)
norm_forward_kernel(FASTRNN_ARGUMENT Params<RecurrenceForward> p) {
  using T = Compute<S>;
  using V = Value<S>;
  using C = General<Cell>;
  Block<RecurrenceForward> block(p, block_index().y, block_index().x);
  int64_t i, last;
  block.range(block.count, i, last);
  if (i == last) return;
  const NormRow<Cell, S, RecurrenceForward> row(block);
  const int64_t t = block.time(i), place = block.place(t, 0);
  const bool resets = block.before(t, 0) == kReset;
  const auto product = [&](int64_t j) { return resets ? T(0) : row.product[j]; };
  if (place >= 0 && p.args.layer_norm.raw != nullptr) {
    S* const raw = row.raw(place);
    for (int64_t j = thread_index(); j < row.all; j += kThreads) narrow(product(j), raw[j]);
  }
  const Moments<T> moments = moments_of<T>(row.all, product);
  const auto total = [&](int, int gate) {
    return moments.normalise(product(gate * row.hidden + block.unit)) * row.gain(gate);
  };
  Moments<T> of_c{};
  if constexpr (C::normalises_state) {
    if (place >= 0) {
      for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
        ForwardItems<Cell, S> items(block);
        items.read(t);
        row.c[block.unit] = items.next_state(total);
      }
    }
    of_c = moments_of<T>(row.hidden, [&](int64_t j) { return row.c[j]; });
  }
  const auto output = [&](V h, const V* saved, const V*) {
    if constexpr (C::normalises_state) {
      const V c(of_c.normalise(row.c[block.unit]) * widen(row.gain_c[block.unit]) +
                widen(row.bias_c[block.unit]));
      return C::hidden(saved, &c);
    } else {
      return h;
    }
  };
  GridExchange<S, RecurrenceForward> exchange(block);
  for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
    ForwardItems<Cell, S> items(block);
    items.read(t);
    items.finish(i, total, exchange, output);
    items.store(i);
    items.save_carried(last == block.count);
  }
}

template <class Cell, class S>
FASTRNN_KERNEL(kThreads)
norm_backward_kernel(FASTRNN_ARGUMENT Params<RecurrenceBackward> p) {
  using T = Compute<S>;
  using V = Value<S>;
  using C = General<Cell>;
  using Items = BackwardItems<Cell, S>;
  constexpr int G = C::gates, R = C::recurrent;
  Block<RecurrenceBackward> block(p, block_index().y, block_index().x);
  int64_t i, last;
  block.range(block.count + 1, i, last);
  if (i == last) return;
  const NormRow<Cell, S, RecurrenceBackward> row(block);
  const auto total = [&](int) { return row.product[block.unit]; };
  GridExchange<S, RecurrenceBackward> exchange(block);
  const int64_t t = i < block.count ? block.time(i) : 0;
  const int64_t place = i < block.count ? block.place(t, 0) : -1;
  if (place < 0) {  // no step of this row, or none at all
    for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
      Items items(block);
      if (i < block.count) {
        items.read(t);
        items.finish(i, total, exchange);
      } else {
        items.finish_states(i, total);
      }
      items.save_carried(last == block.count + 1);
    }
    return;
  }

  const bool resets = block.before(t, 0) == kReset;
  const S* const raw = row.raw(place);
  const S* const gates = static_cast<const S*>(p.args.layer_norm.gates) +
                         (block.direction * p.args.total + place) * G * row.hidden;
  const S* const bias = static_cast<const S*>(p.args.bias_hh[block.direction]);
  const Moments<T> moments = moments_of<T>(row.all, [&](int64_t j) { return widen(raw[j]); });
  const auto recompute = [&](Items& items) {
    items.read(t);
    V x[G], r[R];
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] = V(widen(gates[g * row.hidden + block.unit]));
#pragma unroll
    for (int g = 0; g < R; ++g) {
      const int64_t j = g * row.hidden + block.unit;
      r[g] = V(moments.normalise(widen(raw[j])) * row.gain(g) +
               (bias == nullptr ? T(0) : widen(bias[j])));
    }
    return items.recompute_cell(i, row.product[block.unit], x, r);
  };

  Moments<T> of_c{};
  T plain = 0, weighted = 0;
  const auto normalised = [&] { return of_c.normalise(row.c[block.unit]); };
  const auto read_c = [&] {  // by the output
    return V(normalised() * widen(row.gain_c[block.unit]) + widen(row.bias_c[block.unit]));
  };
  if constexpr (C::normalises_state) {
    for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
      Items items(block);
      row.c[block.unit] = recompute(items).extra[0].value;
    }
    of_c = moments_of<T>(row.hidden, [&](int64_t j) { return row.c[j]; });
    for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
      Items items(block);
      const auto in = recompute(items);
      const T d = row.d_c[block.unit] = C::hidden_gradient(in.gate, read_c(), in.dh).value;
      plain += d * widen(row.gain_c[block.unit]);
      weighted += d * widen(row.gain_c[block.unit]) * normalised();
    }
    plain = sum_block(plain) / static_cast<T>(row.hidden);
    weighted = sum_block(weighted) / static_cast<T>(row.hidden);
  }
  for (block.unit = thread_index(); block.unit < row.hidden; block.unit += kThreads) {
    Items items(block);
    auto in = recompute(items);
    if constexpr (C::normalises_state) {
      // The cell's backward adds d, as if c were not normalised.
      const T d = row.d_c[block.unit], n = normalised(), gain = widen(row.gain_c[block.unit]);
      in.d_state[0] = in.d_state[0] + V(of_c.inverse * (gain * d - plain - n * weighted) - d);
      in.extra[0] = read_c();
      row.d_gain_c[block.unit] += d * n;
      row.d_bias_c[block.unit] += d;
    }
    items.finish_cell(
        0, in, [&](int gate, T value) { row.d_gates[gate * row.hidden + block.unit] = value; });
    items.store();
    items.save_carried(false);
  }

  plain = weighted = 0;
  const auto add = [&](int64_t j) {
    const T scaled = widen(row.gain_hh[j]) * row.d_gates[j];
    plain += scaled;
    weighted += scaled * moments.normalise(widen(raw[j]));
  };
  sync_block();
  for (int64_t j = thread_index(); j < row.all; j += kThreads) add(j);
  plain = sum_block(plain) / static_cast<T>(row.all);
  weighted = sum_block(weighted) / static_cast<T>(row.all);
  S* const d_recurrent =
      static_cast<S*>(p.args.d_recurrent) + (block.direction * p.args.total + place) * row.all;
  for (int64_t j = thread_index(); j < row.all; j += kThreads) {
    const T d = row.d_gates[j], n = moments.normalise(widen(raw[j]));
    const T value = moments.inverse * (widen(row.gain_hh[j]) * d - plain - n * weighted);
    exchange.put(i, block.local_row, j, narrowed<S>(resets ? T(0) : value));
    narrow(value, d_recurrent[j]);
    row.d_gain_hh[j] += d * n;
    row.d_bias_hh[j] += d;
  }
}

// All launches of a pass of `steps` steps, by a plan of kind kStep. It knows no cell: layer_norm.cu
// has it for all.
template <class S, bool Tensor, class Args>
void launch_norm_pass(const Cuda& device, const Args& args, int64_t steps,
                      void (*row_kernel)(Params<Args>)) {
  Params<Args> params(device, args);
  const Problem& problem = args.problem;
  launch(start_kernel<S, Args>, start_launch(params.layout, problem.directions, device.stream),
         params);
  const Launch rows{{static_cast<int>(problem.batch), problem.directions, 1},
                    kThreads,
                    kThreads * problem.compute(),
                    1,
                    false,
                    device.stream};
  for (; params.step < steps; ++params.step) {
    launch(norm_product_kernel<S, Tensor, Args>, scan_launch(params, device.stream), params);
    launch(row_kernel, rows, params);
  }
}

#define FASTRNN_NORM_PASS(declare, Args, S, tensor)                                 \
  declare void launch_norm_pass<S, tensor, Args>(const Cuda&, const Args&, int64_t, \
                                                 void (*)(Params<Args>));
#define FASTRNN_NORM_PASSES(declare, Args)          \
  FASTRNN_NORM_PASS(declare, Args, float, false)    \
  FASTRNN_NORM_PASS(declare, Args, float, true)     \
  FASTRNN_NORM_PASS(declare, Args, double, false)   \
  FASTRNN_NORM_PASS(declare, Args, BFloat16, false) \
  FASTRNN_NORM_PASS(declare, Args, BFloat16, true)  \
  FASTRNN_NORM_PASS(declare, Args, Float16, false)  \
  FASTRNN_NORM_PASS(declare, Args, Float16, true)

template <class Cell, class S>
void run_normalised(const Cuda& device, const RecurrenceForward& args) {
  visit_tensor<S>(device.plan.tensor, [&](auto tensor) {
    launch_norm_pass<S, tensor.value>(device, args, args.problem.steps,
                                      norm_forward_kernel<Cell, S>);
  });
}

template <class Cell, class S>
void run_normalised(const Cuda& device, const RecurrenceBackward& args) {
  visit_tensor<S>(device.plan.tensor, [&](auto tensor) {
    launch_norm_pass<S, tensor.value>(device, args, args.problem.steps + 1,
                                      norm_backward_kernel<Cell, S>);
  });
}

}  // namespace fastrnn::cuda
