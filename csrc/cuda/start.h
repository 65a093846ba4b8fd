// Before a scan, in one launch: the weights in the order in which blocks read them, the states that
// the first step reads, and flags at zero.
#pragma once

#include "options.h"

namespace fastrnn::cuda {

// One thread's share of a launch, in which blocks along x, y and z take parts, tiles of units and
// directions. Divisions of 64 bits are calls of some hundred instructions: there are none here, not
// even by the compiler, which would find out how often an unrolled loop runs.
struct Share {
  Index3 block, blocks;
  FASTRNN_DEVICE Share() : block(block_index()), blocks(grid_size()) {}
  FASTRNN_DEVICE int64_t all_blocks() const { return int64_t{blocks.x} * blocks.y * blocks.z; }
  FASTRNN_DEVICE int64_t own_block() const {
    return (int64_t{block.z} * blocks.y + block.y) * blocks.x + block.x;
  }
  // f(i) for this thread's i of [0, count) of all threads'.
  template <class F>
  FASTRNN_DEVICE void for_each(int64_t count, F&& f) const {
    const int64_t threads = all_blocks() * kThreads;
#pragma unroll 1
    for (int64_t i = own_block() * kThreads + thread_index(); i < count; i += threads) f(i);
  }
};

// 16 bytes of packed weights: elements of column c of a tile, zero beyond H and the depth.
template <class S, class Args>
FASTRNN_DEVICE Vector16 packed_weights(const Params<Args>& p, int direction, int64_t tile, int c,
                                       int64_t quarter) {
  constexpr int count = 16 / sizeof(S);
  const Problem& problem = p.args.problem;
  const bool is_forward = problem.pass == Pass::kForward;
  const int gate = c / p.layout.units;
  const int64_t unit = tile * p.layout.units + c % p.layout.units, first = quarter * count;
  const bool is_there = gate < problem.columns_per_unit() && unit < problem.hidden;
  const S* weight = static_cast<const S*>(p.args.weight_hh[direction]) +
                    (is_forward ? (gate * problem.hidden + unit) * problem.hidden + first
                                : first * problem.hidden + unit);
  const int64_t step = is_forward ? 1 : problem.hidden, depth = problem.depth();
  S values[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (is_there && first + i < depth) {
      values[i] = weight[i * step];
    } else {
      narrow(Compute<S>(0), values[i]);
    }
    if constexpr (sizeof(S) == 4) {
      if (p.plan.tensor) values[i] = round_to_tf32(values[i]);
    }
  }
  Vector16 bits;
  __builtin_memcpy(&bits, values, sizeof(bits));
  return bits;
}

// The weights of the tile that the thread's block has. Neighbouring threads read neighbouring
// elements: along the depth in the forward pass, along the units in the backward one.
template <class S, class Args>
FASTRNN_DEVICE void pack(const Params<Args>& p, const Share& share) {
  const Layout& l = p.layout;
  const bool along_depth = p.args.problem.pass == Pass::kForward;
  const auto quarters = static_cast<uint32_t>(l.depth_blocks * 4);
  const auto columns = static_cast<uint32_t>(l.columns);
  const int64_t whole = share.block.z * l.unit_tiles + share.block.y;
  char* const packed = p.workspace + l.packed + whole * quarters * columns * 16;
  const uint32_t inner = along_depth ? quarters : columns;
  for (uint32_t i = share.block.x * kThreads + thread_index(); i < quarters * columns;
       i += share.blocks.x * kThreads) {
    const uint32_t outer = i / inner, within = i - outer * inner;
    const uint32_t quarter = along_depth ? within : outer, c = along_depth ? outer : within;
    store(packed + (int64_t{quarter / 4} * columns + c) * kBlockBytes + quarter % 4 * 16,
          packed_weights<S>(p, share.block.z, share.block.y, static_cast<int>(c), quarter));
  }
}

// h and c, or their gradients: those before the first step of the pass, and the buffers of those
// after the last one.
FASTRNN_DEVICE const void* first_states(const RecurrenceForward& a, int which) {
  return which == 0 ? a.h_0 : a.c_0;
}
FASTRNN_DEVICE const void* first_states(const RecurrenceBackward& a, int which) {
  return which == 0 ? a.d_h_n : a.d_c_n;
}
// One element of them: of state j, h being the first, of a unit in row `row` of [D*B, H].
struct StateOf {
  int64_t carried, own;  // in [1+C, D, B, H], and in h_0 [D, B, H] or c_0 [D, B, C*H]
  bool is_h;
  FASTRNN_DEVICE StateOf(const Problem& p, int j, int64_t row, int64_t unit)
      : carried((j * p.directions * p.batch + row) * p.hidden + unit),
        own((j == 0 ? row : row * p.states + j - 1) * p.hidden + unit),
        is_h(j == 0) {}
};
template <class S, class Args>
FASTRNN_DEVICE Compute<S> first_state(const Args& args, const StateOf& at) {
  if (args.carried != nullptr) return static_cast<const Compute<S>*>(args.carried)[at.carried];
  const S* first = static_cast<const S*>(first_states(args, at.is_h ? 0 : 1));
  return first == nullptr ? Compute<S>(0) : widen(first[at.own]);
}
// Set already here, for rows without any step.
FASTRNN_DEVICE void* last_states(const RecurrenceForward& a, int which) {
  return which == 0 ? a.h_n : a.c_n;
}
FASTRNN_DEVICE void* last_states(const RecurrenceBackward&, int) { return nullptr; }

// The exchanged states that the first step reads, a row by each block in turn. Both buffers are
// set, as only one of two writes those beyond the batch.
template <class S, class Args>
FASTRNN_DEVICE void start_exchange(const Params<Args>& p, const Share& share) {
  const Layout& l = p.layout;
  const Problem& problem = p.args.problem;
  S* const first = reinterpret_cast<S*>(p.workspace + l.exchange);
  const int64_t rows = l.row_tiles * l.rows, second = problem.directions * rows * l.stride;
  for (int direction = 0; direction < problem.directions; ++direction) {
    for (int64_t row = share.own_block(); row < rows; row += share.all_blocks()) {
      S* const exchange = first + (direction * rows + row) * l.stride;
      const bool has_states = problem.pass == Pass::kForward && row < problem.batch;
      for (int64_t unit = thread_index(); unit < l.stride; unit += kThreads) {
        Compute<S> value = 0;
        if (has_states && unit < problem.hidden) {
          const StateOf h(problem, 0, direction * problem.batch + row, unit);
          value = masked<S>(first_state<S>(p.args, h), p.args, h.own);
        }
        narrow(value, exchange[unit]);
        exchange[second + unit] = exchange[unit];
      }
    }
  }
}

// What the first step finds in Carried.
template <class S, class Args>
FASTRNN_DEVICE void start_carried(const Params<Args>& p, const Share& share) {
  using T = Compute<S>;
  T* const carry = reinterpret_cast<T*>(p.workspace + p.layout.carry);
  const Problem& problem = p.args.problem;
  const int64_t rows = problem.directions * problem.batch;
  for (int j = 0; j <= problem.states; ++j) {
    S* const last = static_cast<S*>(last_states(p.args, j == 0 ? 0 : 1));
    for (int64_t row = share.own_block(); row < rows; row += share.all_blocks()) {
      for (int64_t unit = thread_index(); unit < problem.hidden; unit += kThreads) {
        const StateOf state(problem, j, row, unit);
        const T value = carry[state.carried] = first_state<S>(p.args, state);
        if (last != nullptr) narrow(value, last[state.own]);
      }
    }
  }
}

template <class S, class Args>
FASTRNN_KERNEL(kThreads)
start_kernel(FASTRNN_ARGUMENT Params<Args> p) {
  const Layout& l = p.layout;
  const Share share;
  pack<S>(p, share);
  start_exchange<S>(p, share);
  start_carried<S>(p, share);
  int64_t* flags = reinterpret_cast<int64_t*>(p.workspace + l.flags);
  share.for_each(p.args.problem.directions * l.row_tiles * l.unit_tiles,
                 [&](int64_t i) { flags[i] = 0; });
}

// Blocks along x: a thread for each 16 bytes of a tile, but some 4096 blocks in all. Without
// weights there are states to start with.
inline Launch start_launch(const Layout& l, int directions, void* stream) {
  const int64_t tiles = l.unit_tiles * directions;
  const int64_t enough = l.columns == 0 ? 1 : divide_up(l.depth_blocks * 4 * l.columns, kThreads);
  const int64_t most = divide_up(4096, tiles);
  return {
      {static_cast<int>(enough < most ? enough : most), static_cast<int>(l.unit_tiles), directions},
      kThreads,
      0,
      1,
      false,
      stream};
}

// All launches of a pass of `steps` steps; its kernel exchanges states in a cluster or in the grid.
template <class S, class Args>
void launch_pass(const Cuda& device, const Args& args, int64_t steps,
                 void (*in_cluster)(Params<Args>), void (*in_grid)(Params<Args>)) {
  Params<Args> params(device, args);
  launch(start_kernel<S, Args>, start_launch(params.layout, args.problem.directions, device.stream),
         params);

  const Kind kind = device.plan.kind;
  const int64_t launches = kind == Kind::kStep ? steps : 1;
  for (; params.step < launches; ++params.step) {
    launch(kind == Kind::kCluster ? in_cluster : in_grid, scan_launch(params, device.stream),
           params);
  }
}

}  // namespace fastrnn::cuda
