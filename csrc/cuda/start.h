// Before a scan, in one launch: the weights in the order in which blocks read them, the states that
// the first step reads, and flags at zero.
#pragma once

#include "options.h"

namespace fastrnn::cuda {

// Element (column c of a block, depth k) of the packed weights; zero beyond H and the depth.
template <class S, class Args>
FASTRNN_DEVICE S weight_at(const Params<Args>& p, int direction, int64_t tile, int c, int64_t k) {
  const Layout& l = p.layout;
  const Problem& problem = p.args.problem;
  const int64_t gate = c / l.units, unit = tile * l.units + c % l.units;
  S zero;
  narrow(Compute<S>(0), zero);
  if (gate >= problem.columns_per_unit() || unit >= problem.hidden || k >= problem.depth()) {
    return zero;
  }
  const S* weight = static_cast<const S*>(p.args.weight_hh[direction]);
  S value = problem.pass == Pass::kForward
                ? weight[(gate * problem.hidden + unit) * problem.hidden + k]
                : weight[k * problem.hidden + unit];
  if constexpr (sizeof(S) == 4) {
    if (p.plan.tensor) value = round_to_tf32(value);
  }
  return value;
}

// 16 bytes of packed weights. Neighbouring threads read neighbouring elements: along the depth in
// the forward pass, along the units in the backward one.
template <class S, class Args>
FASTRNN_DEVICE void pack(const Params<Args>& p, int64_t index) {
  constexpr int count = 16 / sizeof(S);
  const Layout& l = p.layout;
  const bool along_depth = p.args.problem.pass == Pass::kForward;
  const int64_t quarters = l.depth_blocks * 4;
  const int64_t quarter = along_depth ? index % quarters : index / l.columns % quarters;
  const int c = static_cast<int>(along_depth ? index / quarters % l.columns : index % l.columns);
  const int64_t whole = index / quarters / l.columns;
  const int64_t tile = whole % l.unit_tiles;
  const int direction = static_cast<int>(whole / l.unit_tiles);
  S values[count];
  for (int i = 0; i < count; ++i) {
    values[i] = weight_at<S>(p, direction, tile, c, quarter * count + i);
  }
  Vector16 bits;
  __builtin_memcpy(&bits, values, sizeof(bits));
  const int64_t block = (whole * l.depth_blocks + quarter / 4) * l.columns + c;
  store(p.workspace + l.packed + block * kBlockBytes + quarter % 4 * 16, bits);
}

// h and c, or their gradients: those before the first step of the pass, and the buffers of those
// after the last one.
FASTRNN_DEVICE const void* first_states(const RecurrenceForward& a, int which) {
  return which == 0 ? a.h_0 : a.c_0;
}
FASTRNN_DEVICE const void* first_states(const RecurrenceBackward& a, int which) {
  return which == 0 ? a.d_h_n : a.d_c_n;
}
// Where element i of [1+C, D, B, H] lies in [D, B, C*H], of the states beside h.
struct OtherStates {
  int64_t size, hidden;
  int states;
  FASTRNN_DEVICE explicit OtherStates(const Problem& p)
      : size(p.directions * p.batch * p.hidden), hidden(p.hidden), states(p.states) {}
  FASTRNN_DEVICE int64_t operator()(int64_t i) const {
    const int64_t row = i % size / hidden, state = i / size - 1;
    return (row * states + state) * hidden + i % hidden;
  }
};

// One element of them, of [1+C, D, B, H].
template <class S, class Args>
FASTRNN_DEVICE Compute<S> first_state(const Args& args, int64_t i) {
  if (args.carried != nullptr) return static_cast<const Compute<S>*>(args.carried)[i];
  const OtherStates others(args.problem);
  const bool is_h = i < others.size;
  const S* first = static_cast<const S*>(first_states(args, is_h ? 0 : 1));
  return first == nullptr ? Compute<S>(0) : widen(first[is_h ? i : others(i)]);
}
// Set already here, for rows without any step.
FASTRNN_DEVICE void* last_states(const RecurrenceForward& a, int which) {
  return which == 0 ? a.h_n : a.c_n;
}
FASTRNN_DEVICE void* last_states(const RecurrenceBackward&, int) { return nullptr; }

// The exchanged states that the first step reads. Both buffers are set, as only one of two writes
// those beyond the batch.
template <class S, class Args>
FASTRNN_DEVICE void start_exchange(const Params<Args>& p, int64_t thread, int64_t threads) {
  const Layout& l = p.layout;
  const Problem& problem = p.args.problem;
  S* exchange = reinterpret_cast<S*>(p.workspace + l.exchange);
  const int64_t rows = l.row_tiles * l.rows;
  const int64_t states = problem.directions * rows * l.stride;
  for (int64_t i = thread; i < states; i += threads) {
    const int64_t unit = i % l.stride, row = i / l.stride % rows, direction = i / l.stride / rows;
    Compute<S> value = 0;
    if (problem.pass == Pass::kForward && row < problem.batch && unit < problem.hidden) {
      const int64_t state = (direction * problem.batch + row) * problem.hidden + unit;
      value = masked<S>(first_state<S>(p.args, state), p.args, state);
    }
    narrow(value, exchange[i]);
    exchange[states + i] = exchange[i];
  }
}

// What the first step finds in Carried.
template <class S, class Args>
FASTRNN_DEVICE void start_carried(const Params<Args>& p, int64_t thread, int64_t threads) {
  using T = Compute<S>;
  T* carry = reinterpret_cast<T*>(p.workspace + p.layout.carry);
  const Problem& problem = p.args.problem;
  const OtherStates others(problem);
  for (int64_t i = thread; i < problem.carried(); i += threads) {
    const bool is_h = i < others.size;
    S* last = static_cast<S*>(last_states(p.args, is_h ? 0 : 1));
    const T value = carry[i] = first_state<S>(p.args, i);
    if (last != nullptr) narrow(value, last[is_h ? i : others(i)]);
  }
}

template <class S, class Args>
FASTRNN_KERNEL(kThreads)
start_kernel(FASTRNN_ARGUMENT Params<Args> p) {
  const Layout& l = p.layout;
  const int64_t thread = grid_thread(), threads = grid_threads();
  const int64_t vectors = (l.exchange - l.packed) / 16;
  for (int64_t i = thread; i < vectors; i += threads) pack<S>(p, i);

  start_exchange<S>(p, thread, threads);
  start_carried<S>(p, thread, threads);

  int64_t* flags = reinterpret_cast<int64_t*>(p.workspace + l.flags);
  for (int64_t i = thread; i < p.args.problem.directions * l.row_tiles * l.unit_tiles;
       i += threads) {
    flags[i] = 0;
  }
}

// All launches of a pass of `steps` steps; its kernel exchanges states in a cluster or in the grid.
template <class S, class Args>
void launch_pass(const Cuda& device, const Args& args, int64_t steps,
                 void (*in_cluster)(Params<Args>), void (*in_grid)(Params<Args>)) {
  Params<Args> params(device, args);
  const int64_t blocks = divide_up(params.layout.workspace / 16, kThreads);
  const int grid = static_cast<int>(blocks < 4096 ? blocks : 4096);
  launch(start_kernel<S, Args>, {{grid, 1, 1}, kThreads, 0, 1, false, device.stream}, params);

  const Kind kind = device.plan.kind;
  const int64_t launches = kind == Kind::kStep ? steps : 1;
  for (; params.step < launches; ++params.step) {
    launch(kind == Kind::kCluster ? in_cluster : in_grid, scan_launch(params, device.stream),
           params);
  }
}

}  // namespace fastrnn::cuda
