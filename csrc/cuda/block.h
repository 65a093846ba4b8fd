// What the forward and the backward scan share: which part of a scan a block does, where the steps
// of its rows lie, and how the blocks of a group exchange states.
#pragma once

#include <type_traits>

#include "../cells/general.h"
#include "multiply.h"
#include "scan.h"

namespace fastrnn::cuda {

// The argument of the kernels. A launch of kind kStep does the step `step` of all rows.
template <class Args>
struct Params {
  Args args;
  Plan plan;
  Layout layout;
  char* workspace;
  int64_t step;

  Params(const Cuda& device, const Args& a)
      : args(a),
        plan(device.plan),
        layout(a.problem, device.plan),
        workspace(static_cast<char*>(device.workspace)),
        step(0) {}
};

// Blocks of a group follow one another in the grid, so that they can be a cluster.
template <class Args>
Launch scan_launch(const Params<Args>& p, void* stream) {
  const Layout& l = p.layout;
  return {{static_cast<int>(l.unit_tiles * l.row_tiles), p.args.problem.directions, 1},
          kThreads,
          l.shared,
          p.plan.cluster,
          p.plan.kind == Kind::kGrid && p.args.problem.gates > 0,
          stream};
}

// The part of the scan that a block does, and a thread of it: its items are one unit of up to
// max_items rows.
template <class Args>
struct Block {
  const Params<Args>& p;
  const int64_t batch, hidden;
  const int direction;
  const int64_t unit_tile, row_tile, first_row;
  int64_t unit;          // of the thread, among all
  const int local_unit;  // and among the block's own
  const int local_row;   // of the thread's first item; the others follow at row_step
  const int row_step;
  const bool reverse;  // the direction runs from each row's last step to its first
  const bool ascends;  // t grows along the pass
  int64_t count;       // steps until no row of the block is alive

  FASTRNN_DEVICE explicit Block(const Params<Args>& params)
      : p(params),
        batch(params.args.problem.batch),
        hidden(params.args.problem.hidden),
        direction(block_index().y),
        unit_tile(static_cast<uint32_t>(block_index().x) %
                  static_cast<uint32_t>(params.layout.unit_tiles)),
        row_tile(static_cast<uint32_t>(block_index().x) /
                 static_cast<uint32_t>(params.layout.unit_tiles)),
        first_row(row_tile * params.layout.rows),
        unit(unit_tile * params.layout.units + thread_index() % params.layout.units),
        local_unit(thread_index() % params.layout.units),
        local_row(thread_index() / params.layout.units),
        row_step(kThreads / params.layout.units),
        reverse(direction == 1 || params.args.problem.reverse),
        ascends(reverse == (params.args.problem.pass == Pass::kBackward)),
        count(count_steps()) {}

  // A single row, whose units the thread takes one after the other: it sets `unit`.
  FASTRNN_DEVICE Block(const Params<Args>& params, int of_direction, int64_t row)
      : p(params),
        batch(params.args.problem.batch),
        hidden(params.args.problem.hidden),
        direction(of_direction),
        unit_tile(0),
        row_tile(static_cast<int>(row) / params.layout.rows),
        first_row(row_tile * params.layout.rows),
        unit(0),
        local_unit(0),
        local_row(static_cast<int>(row - first_row)),
        row_step(params.layout.rows),  // so that there is one item
        reverse(direction == 1 || params.args.problem.reverse),
        ascends(reverse == (params.args.problem.pass == Pass::kBackward)),
        count(count_steps()) {}

  // Which steps of its own the block runs in this launch, of `all`: [first, last).
  FASTRNN_DEVICE void range(int64_t all, int64_t& first, int64_t& last) const {
    first = 0;
    last = all;
    if (p.plan.kind != Kind::kStep) return;
    // Where t descends, rows that end early begin late.
    const int64_t i = ascends ? p.step : p.step - (p.args.problem.steps - count);
    first = i < 0 || i >= all ? all : i;
    last = i < 0 || i >= all ? all : i + 1;
  }

  FASTRNN_DEVICE int64_t time(int64_t i) const { return ascends ? i : count - 1 - i; }
  FASTRNN_DEVICE int64_t row(int item) const { return first_row + local_row + item * row_step; }
  FASTRNN_DEVICE bool owns(int item) const {
    return local_row + item * row_step < p.layout.rows && row(item) < batch && unit < hidden;
  }
  // Row `row` of [D, B, H]
  FASTRNN_DEVICE int64_t state(int item) const {
    return (direction * batch + row(item)) * hidden + unit;
  }
  // In [D, B, columns*H]
  FASTRNN_DEVICE int64_t states(int item, int columns) const {
    return (direction * batch + row(item)) * columns * hidden + unit;
  }
  // In [N, D*columns*H]
  FASTRNN_DEVICE int64_t feature(int64_t n, int columns = 1) const {
    return (n * p.args.problem.directions + direction) * columns * hidden + unit;
  }
  // In [D, N, columns*H]
  FASTRNN_DEVICE int64_t column(int64_t n, int columns) const {
    return (direction * p.args.total + n) * columns * hidden + unit;
  }

  // Of the block's step i: where the row's step before it in the pass lies; -1 if there is none, or
  // if it is not valid.
  FASTRNN_DEVICE int64_t after(int64_t i, int item) const {
    return i == 0 ? -1 : place(time(i - 1), item);
  }
  // Where the row's step at time t lies in N; -1 if it is not valid.
  FASTRNN_DEVICE int64_t place(int64_t t, int item) const {
    const int64_t n = t * batch + row(item);
    return p.args.places.place == nullptr ? n : p.args.places.place[n];
  }
  // The same of the step that the direction has before it, kInitial or kReset.
  FASTRNN_DEVICE int64_t before(int64_t t, int item) const {
    const int64_t n = t * batch + row(item);
    const int64_t* table = p.args.places.before[direction];
    if (table != nullptr) return table[n];
    if (!reverse) return t == 0 ? kInitial : n - batch;
    return t == p.args.problem.steps - 1 ? kInitial : n + batch;
  }

 private:
  FASTRNN_DEVICE int64_t count_steps() const {
    const int64_t* lengths = p.args.places.lengths;
    if (lengths == nullptr) return p.args.problem.steps;
    int64_t most = 0;
    for (int64_t row = first_row; row < first_row + p.layout.rows && row < batch; ++row) {
      if (lengths[row] > most) most = lengths[row];
    }
    return most;
  }
};

// Yes or no of each of a thread's items, in one register.
class Marks {
 public:
  FASTRNN_DEVICE bool operator[](int item) const { return (bits_ >> item & 1) != 0; }
  FASTRNN_DEVICE void set(int item, bool value) {
    bits_ = (bits_ & ~(1u << item)) | (value ? 1u << item : 0u);
  }

 private:
  uint32_t bits_ = 0;
};

// What goes from step to step of a thread's items beside the product: h and the other states, or
// their gradients. From launch to launch it goes through the workspace.
template <class Cell, class S>
struct Carried {
  using T = Compute<S>;
  using V = Value<S>;
  static constexpr int C = General<Cell>::states, kItems = max_items(sizeof(S));
  V h[kItems], c[kItems][room(C)];

  template <class Args>
  FASTRNN_DEVICE explicit Carried(const Block<Args>& block) {
    for_each(block, between_launches(block), [](V& value, const T& saved) { value = V(saved); });
  }
  // For the next launch and, after the last step, for the caller.
  template <class Args>
  FASTRNN_DEVICE void save(const Block<Args>& block, bool is_last) {
    const auto store = [](const V& value, T& saved) { saved = value.value; };
    if (block.p.plan.kind == Kind::kStep) for_each(block, between_launches(block), store);
    if (is_last && block.p.args.carried != nullptr) {
      for_each(block, static_cast<T*>(block.p.args.carried), store);
    }
  }

 private:
  template <class Args>
  FASTRNN_DEVICE static T* between_launches(const Block<Args>& block) {
    return reinterpret_cast<T*>(block.p.workspace + block.p.layout.carry);
  }
  template <class Args, class F>
  FASTRNN_DEVICE void for_each(const Block<Args>& block, T* saved, F&& f) {
    const int64_t size = block.p.args.problem.directions * block.batch * block.hidden;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!block.owns(k)) continue;
      f(h[k], saved[block.state(k)]);
#pragma unroll
      for (int j = 0; j < C; ++j) f(c[k][j], saved[(1 + j) * size + block.state(k)]);
    }
  }
};

// The weights of the block, of which those that stay in its shared memory are copied there.
template <class Args>
FASTRNN_DEVICE const char* block_weights(const Block<Args>& block) {
  const Layout& l = block.p.layout;
  const int64_t bytes = l.depth_blocks * l.columns * kBlockBytes;
  const char* packed =
      block.p.workspace + l.packed + (block.direction * l.unit_tiles + block.unit_tile) * bytes;
  char* const shared = dynamic_shared();
  const auto keep = [&](char* to, const char* from, int64_t count) {
    for (int64_t i = 16 * thread_index(); i < count; i += 16 * kThreads) {
      store(to + i, load(from + i));
    }
  };
  if (l.resident) keep(shared, packed, bytes);
  if (l.kept == 0) return packed;
  const int size = l.columns * kBlockBytes, depth = static_cast<int>(l.depth_blocks);
  char* to = shared;
  for (int slice = 0; slice < l.slices; ++slice) {
    const int begin = depth * slice / l.slices, end = depth * (slice + 1) / l.slices;
    Passing passing(end - begin, l.kept);
    for (int i = 0; i < end - begin; ++i) {
      if (passing.is_at(i)) {
        passing.advance();
      } else {
        keep(to, packed + int64_t{begin + i} * size, size);
        to += size;
      }
    }
  }
  return packed;
}

// The states that a step reads and those it leaves for the next, rows of `stride`. Step i reads
// states(i) after wait(i), puts its own for the next step, and arrives.

// Through global memory. Each block of a group has a flag, the number of its arrivals, and the
// threads of the others look at one each; or blocks are launched step by step.
template <class S, class Args>
class GridExchange {
 public:
  FASTRNN_DEVICE explicit GridExchange(const Block<Args>& block)
      : layout_(block.p.layout), has_barrier_(block.p.plan.kind == Kind::kGrid) {
    const int64_t group = block.direction * layout_.row_tiles + block.row_tile;
    const int64_t bytes = layout_.rows * layout_.stride * sizeof(S);
    states_ = block.p.workspace + layout_.exchange + group * bytes;
    second_ = block.p.args.problem.directions * layout_.row_tiles * bytes;
    flags_ =
        reinterpret_cast<int64_t*>(block.p.workspace + layout_.flags) + group * layout_.unit_tiles;
    own_ = static_cast<int>(block.unit_tile);
  }
  FASTRNN_DEVICE void start(int64_t) {}
  FASTRNN_DEVICE void wait(int64_t i) {
    if (has_barrier_) {
      for (int64_t other = thread_index(); other < layout_.unit_tiles; other += kThreads) {
        wait_for(flags_ + other, i);
      }
    }
    sync_block();
  }
  FASTRNN_DEVICE void arrive() {
    if (!has_barrier_) return;
    sync_block();
    ++arrivals_;
    if (thread_index() == 0) release(flags_ + own_, arrivals_);
  }
  FASTRNN_DEVICE void finish() {}

  FASTRNN_DEVICE const char* states(int64_t i) const { return states_ + i % 2 * second_; }
  FASTRNN_DEVICE static Vector16 load_state(const char* p, bool condition) {
    return load_shared_cache_if(condition, p);
  }
  FASTRNN_DEVICE void put(int64_t i, int row, int64_t column, S value) {
    reinterpret_cast<S*>(states_ + (i + 1) % 2 * second_)[row * layout_.stride + column] = value;
  }

 private:
  const Layout& layout_;
  const bool has_barrier_;
  char* states_;
  int64_t second_;  // from the first buffer to the second, in bytes
  int64_t* flags_;
  int own_;
  int64_t arrivals_ = 0;
};

// Through shared memory: every block of the cluster has all states of its rows. Two mbarriers, one
// for each of two buffers, count the bytes that come for a step, or blocks meet at the cluster's
// barrier.
//
// With mbarriers nothing else is waited for: a block sends the states of step i + 1 when all its
// threads have read those of step i - 1, which lie in the same buffer, and no other block sends
// those of step i + 1 before it has all of step i. The last step sends nothing, as no block may end
// while bytes are on their way to it.
template <class S, class Args>
class ClusterExchange {
 public:
  FASTRNN_DEVICE explicit ClusterExchange(const Block<Args>& block)
      : layout_(block.p.layout), cluster_(block.p.plan.cluster) {
    const int64_t group = block.direction * layout_.row_tiles + block.row_tile;
    bytes_ = layout_.rows * layout_.stride * sizeof(S);
    states_ = dynamic_shared() + layout_.shared_exchange;
    initial_ = block.p.workspace + layout_.exchange + group * bytes_;
    second_initial_ = block.p.args.problem.directions * layout_.row_tiles * bytes_;
    const int64_t left = block.batch - block.first_row;
    expected_ = static_cast<int>((left < layout_.rows ? left : layout_.rows) *
                                 block.p.args.problem.depth() * int64_t{sizeof(S)});
  }
  FASTRNN_DEVICE void start(int64_t steps) {
    steps_ = steps;
    for (int64_t i = 16 * thread_index(); i < bytes_; i += 16 * kThreads) {
      store(states_ + i, load(initial_ + i));
      store(states_ + bytes_ + i, load(initial_ + second_initial_ + i));
    }
    if (layout_.mbarrier && thread_index() == 0) {
      for (int64_t i = 0; i < 2; ++i) begin_mbarrier(mbarrier(i));
      for (int64_t i = 1; i <= 2; ++i) expect(i);
    }
    arrive_at_barrier();
  }
  FASTRNN_DEVICE void wait(int64_t i) {
    if (!layout_.mbarrier || i == 0) return wait_at_barrier();
    wait_for_bytes(mbarrier(i), static_cast<int>((i - 1) / 2 % 2));
    if (thread_index() == 0) expect(i + 2);
  }
  FASTRNN_DEVICE void arrive() {
    if (!layout_.mbarrier) arrive_at_barrier();
  }
  // No block may end while another still writes to it.
  FASTRNN_DEVICE void finish() {
    if (!layout_.mbarrier) wait_at_barrier();
  }

  FASTRNN_DEVICE const char* states(int64_t i) const { return states_ + i % 2 * bytes_; }
  FASTRNN_DEVICE static Vector16 load_state(const char* p, bool condition) {
    return load_shared_if(condition, p);
  }
  FASTRNN_DEVICE void put(int64_t i, int row, int64_t column, S value) {
    S* own = reinterpret_cast<S*>(states_ + (i + 1) % 2 * bytes_) + row * layout_.stride + column;
    if (cluster_ == 1) {
      *own = value;
    } else if (!layout_.mbarrier) {
      for (int rank = 0; rank < cluster_; ++rank) store_in_cluster(own, rank, value);
    } else if (i + 1 < steps_) {
      send_to_all(own, value, mbarrier(i + 1));
    }
  }

 private:
  // Of those that count the bytes of step i.
  FASTRNN_DEVICE uint64_t* mbarrier(int64_t i) const {
    return reinterpret_cast<uint64_t*>(dynamic_shared() + layout_.shared_mbarriers) + i % 2;
  }
  FASTRNN_DEVICE void expect(int64_t i) const {
    if (i < steps_) expect_bytes(mbarrier(i), expected_);
  }
  // Two lanes have a pair of neighbouring units: each sends both, to every other block.
  FASTRNN_DEVICE void send_to_all(S* own, S value, const uint64_t* mbarrier) const {
    if constexpr (sizeof(S) == 2) {
      const int odd = thread_index() % 2;
      const uint32_t bits = value.bits, other = swap_with_neighbour(bits);
      const uint32_t pair = odd == 0 ? bits | other << 16 : other | bits << 16;
      auto* const first = reinterpret_cast<uint32_t*>(own - odd);
      for (int rank = odd; rank < cluster_; rank += 2) send(first, rank, pair, mbarrier);
    } else {
      for (int rank = 0; rank < cluster_; ++rank) send(own, rank, value, mbarrier);
    }
  }
  FASTRNN_DEVICE void wait_at_barrier() const {
    if (cluster_ > 1) {
      wait_cluster();
    } else {
      sync_block();
    }
  }
  // To release what was written takes a fence that waits for every store before it: one warp does
  // it for its block, whose threads it has waited for.
  FASTRNN_DEVICE void arrive_at_barrier() const {
    if (cluster_ == 1) return;
    sync_block();
    arrive_cluster(thread_index() < 32);
  }

  const Layout& layout_;
  const int cluster_;
  int expected_;            // bytes of a step
  int64_t steps_ = 0;       // of the pass
  int64_t bytes_;           // of each of two buffers
  int64_t second_initial_;  // from the initial states of the first to those of the second
  char* states_;
  const char* initial_;
};

// What a cell without recurrent gates has in their place: nothing to multiply, nobody to wait for.
struct NoExchange {
  template <class S>
  FASTRNN_DEVICE void put(int64_t, int, int64_t, S) const {}
};

// Whether kernels like this one are compiled for the architecture at hand.
template <class S, bool Tensor>
constexpr bool is_compiled() {
  return Tensor ? kHasTensorCores : sizeof(S) > 2 || kHasNarrowFma;
}

// Calls f(tensor) for a plan and elements S.
template <class S, class F>
void visit_tensor(bool tensor, F&& f) {
  if constexpr (sizeof(S) == 8) {
    f(std::false_type{});
  } else {
    tensor ? f(std::true_type{}) : f(std::false_type{});
  }
}

// Calls f(element) for a dtype.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace fastrnn::cuda
