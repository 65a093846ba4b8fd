// The backward scan on the CPU, in the shape of the forward one: a register tile computes the part
// of dh_t that comes through W_hh from the following step, and the cell turns dh_t into gate
// gradients. Some steps at a time, these go on into the gradients of the input and of the weights.
// Where h is projected, its gradient is completed first and a second product per step takes it to
// the units.
#pragma once

#include <optional>

#include "layer_gradients.h"
#include "math.h"
#include "recomputation.h"
#include "saved.h"
#include "weight.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class BackwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using Kept = Saved<const S, const T>;
  static constexpr int G = Cell::gates;
  // Rows of gate gradients in a chunk: a panel of as many rows, one register tile wide, fits into
  // L1.
  static constexpr int64_t kChunkRows = 128;

 public:
  BackwardScan(const BackwardArgs& args, const Steps& steps, int threads, Workspace& workspace)
      : args_(args),
        steps_(steps),
        projects_(args.weight_hr[0] != nullptr),
        gate_columns_(G * args.hidden),
        chunk_steps_(max_of(1, min_of(args.steps, kChunkRows / max_of(1, args.batch)))),
        // One step alone has none after it.
        hh_(args.weight_hh, args.steps > 1 || args.d_h_0 != nullptr, gate_columns_, args.proj,
            args.directions, steps.total(), workspace),
        ih_(args.weight_ih, args.d_x != nullptr, gate_columns_, args.input, args.directions,
            steps.total(), workspace),
        hr_(args.weight_hr, projects_, args.proj, args.hidden, args.directions, steps.total(),
            workspace),
        chunk_gradients_(args, chunk_steps_ * args.batch, workspace),
        stride_(chunk_gradients_.stride),
        layer_gradients_(args, steps, chunk_gradients_, is_one_chunk(), threads, workspace) {
    if (recomputes()) recomputation_.emplace(args, steps, workspace);
    const size_t states = args.directions * args.batch * args.hidden;
    carry_h_ = workspace.take<T>(Cell::has_direct_path ? states : 0);
    carry_c_ = workspace.take<T>(Cell::has_cell_state ? states : 0);
    carry_gates_ = workspace.take<F>(args.directions * args.batch * stride_);
    zeros_ = workspace.take<F>(stride_);
    std::memset(zeros_, 0, stride_ * sizeof(F));
  }

  Work work() const {
    return {args_.steps,        steps_.mean_rows(),
            gate_columns_ * 4,  // every weight is used twice
            hh_.columns.blocks, hh_.columns.units,           max_rows(hh_.columns.units),
            args_.directions,   args_.batch_sizes != nullptr};
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    layer_gradients_.start(direction, part);
    if (recomputation_) {
      run_segments(direction, part);
    } else {
      run_steps(direction, part, 0, steps_.count(), kept(direction));
    }
    const auto no_gates = [](int64_t) { return nullptr; };
    write_initial(direction, part, false, no_gates, steps_.rows(0), args_.batch);
    layer_gradients_.write(direction, part);
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const bool projects_;
  const int64_t gate_columns_;
  const int64_t chunk_steps_;
  const BackwardWeight<S> hh_, ih_, hr_;
  const ChunkGradients<Cell, S> chunk_gradients_;
  const int64_t stride_;  // between rows of gate gradients
  const LayerGradients<Cell, S> layer_gradients_;
  // What a step hands to the one before it, [D, B, H], and the gate gradients of a chunk's step
  // that is first in the order of the direction.
  T* carry_h_;
  T* carry_c_;
  F* carry_gates_;
  F* zeros_;  // the gate gradients of a step beyond a reset
  std::optional<Recomputation<Cell, S>> recomputation_;

  bool recomputes() const {
    return args_.checkpoint_every > 0 && Recomputation<Cell, S>::kIsNeeded;
  }
  bool is_one_chunk() const {
    const bool is_one_segment = !recomputes() || args_.steps <= args_.checkpoint_every;
    return args_.steps > 0 && args_.steps <= chunk_steps_ && is_one_segment;
  }

  // Step t among its neighbours in the order of the direction, as some of its rows have them.
  struct StepContext {
    int64_t t, before;
    bool has_after, has_before;
    const F* after;  // the gate gradients of the step after t
    const Chunk& chunk;
    const Kept& kept;

    int64_t chunk_row(const Steps& steps, int64_t row) const {
      return steps.offset(t) + row - chunk.begin;
    }
  };

  // In [D, B, columns]
  int64_t state_offset(int direction, int64_t row, int64_t columns) const {
    return (direction * args_.batch + row) * columns;
  }
  // In [N, D*columns]
  int64_t feature_offset(int direction, int64_t t, int64_t row, int64_t columns) const {
    return ((steps_.offset(t) + row) * args_.directions + direction) * columns;
  }
  static const S* at(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const S*>(base) + offset;
  }

  Kept kept(int direction) const {
    const int64_t own = direction * args_.hidden;
    return {static_cast<const S*>(args_.gates[direction]),
            args_.extra == nullptr ? nullptr : static_cast<const T*>(args_.extra) + own,
            gate_columns_, args_.directions * args_.hidden, 0};
  }

  Range hr_blocks(const Part& part) const {
    const int64_t blocks = hr_.columns.blocks;
    return part.waits_each_step ? share(blocks, part.rank, part.size) : Range{0, blocks};
  }
  // The part's own units of the cell state.
  Range unit_range(const Part& part) const {
    return projects_ ? hr_.columns.range(hr_blocks(part)) : hh_.columns.range(part.blocks);
  }

  // Threads that split rows share the weights, threads that split units need only their own.
  void pack(int direction, const Part& part) const {
    const auto own = [&part](const BackwardWeight<S>& weight) {
      return share(weight.columns.blocks, part.rank, part.size);
    };
    hh_.pack(direction, part.waits_each_step ? part.blocks : own(hh_));
    hr_.pack(direction, own(hr_));
    ih_.pack(direction, own(ih_));
    if (recomputation_) recomputation_->pack(direction, part);
    part.wait();
  }

  void run_segments(int direction, const Part& part) const {
    const int64_t segments = recomputation_->segments();
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t k = steps_.runs_back(direction) ? i : segments - 1 - i;
      const Chunk segment = recomputation_->segment(k);
      const Kept kept = recomputation_->run(direction, part, segment);
      run_steps(direction, part, segment.first, segment.last + 1, kept);
    }
  }

  // Steps [first, end) in time, against the order of the direction, chunk by chunk.
  void run_steps(int direction, const Part& part, int64_t first, int64_t end,
                 const Kept& kept) const {
    const int64_t stride = steps_.stride(direction);
    int64_t t = stride == 1 ? end - 1 : first;
    for (int64_t left = end - first; left > 0; left -= chunk_steps_) {
      const int64_t last = t - (min_of(chunk_steps_, left) - 1) * stride;
      const Chunk chunk = steps_.chunk(min_of(t, last), max_of(t, last));
      for (; t != last - stride; t -= stride) run_step(direction, part, chunk, t, kept);
      // The gate gradients of the chunk are complete; all threads share the products with them.
      if (!part.waits_each_step) part.wait();
      if constexpr (ChunkRows<S>::kZips) {
        chunk_gradients_.zip(direction, chunk.rows, part.rank, part.size);
        part.wait();
      }
      layer_gradients_.add(direction, part, chunk);
      if (args_.d_x != nullptr) write_d_x(direction, part, chunk);
      keep_gates(direction, part, chunk, last);
      part.wait();
    }
  }

  void run_step(int direction, const Part& part, const Chunk& chunk, int64_t t,
                const Kept& kept) const {
    const int64_t stride = steps_.stride(direction), rows = steps_.rows(t);
    const int64_t next = t + stride, before = t - stride;
    // So many rows have a step after t, and before t, in the order of the direction.
    const int64_t rows_after = min_of(rows, steps_.rows(next));
    const int64_t rows_before = min_of(rows, steps_.rows(before));
    const F* after = nullptr;
    if (rows_after > 0) {
      const bool inside = chunk.first <= next && next <= chunk.last;
      after = inside ? gates_of(direction, chunk, next)
                     : carry_gates_ + direction * args_.batch * stride_;
    }
    // At most one of the two lies between: rows end in one direction and begin in the other.
    const int64_t middle = rows_after > 0 && rows_after < rows ? rows_after : rows_before;
    run_rows(direction, part, {t, before, rows_after > 0, rows_before > 0, after, chunk, kept}, 0,
             middle);
    run_rows(direction, part,
             {t, before, rows_after == rows, rows_before == rows, after, chunk, kept}, middle,
             rows);
    if (part.waits_each_step) part.wait();
    // Rows whose scan began at t are through.
    const F* gates = gates_of(direction, chunk, t);
    const auto first_gates = [&](int64_t row) {
      return steps_.resets_before(direction, t, row) ? zeros_ : gates + row * stride_;
    };
    write_initial(direction, part, true, first_gates, rows_before, rows);
  }

  // The gradients of W_hh h_{t-1} of a step of the chunk.
  const F* gates_of(int direction, const Chunk& chunk, int64_t t) const {
    return chunk_gradients_.recurrent.factors(direction, steps_.offset(t) - chunk.begin);
  }

  // Calls finish(row, count, column, sums) for every vector of columns of h of every tile of rows
  // [begin, end); sums[r * units + u] is W_hh^T times the gate gradients `after(row)`, or zero
  // without any. Before that, fetch(row, count, column) may ask for what finish will read.
  template <class After, class Fetch, class Finish>
  void for_each_column(int direction, const Part& part, bool has_after, After after, int64_t begin,
                       int64_t end, Fetch fetch, Finish finish) const {
    const Columns<T>& columns = hh_.columns;
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for_each_tile(begin, end, max_rows(columns.units), [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        if (has_after) {
          fetch(row, count, columns.column(block, 0));
          const F* rows[kMaxRows];
          for (int r = 0; r < count; ++r) rows[r] = after(row + r);
          hh_.multiply(direction, block, rows, count, i, sums);
        } else {
          for (int j = 0; j < count * columns.units; ++j) sums[j] = V(T(0));
        }
        for (int u = 0; u < columns.units; ++u) {
          const int64_t column = columns.column(block, u);
          if (column < args_.proj) finish(row, count, column, sums + u);
        }
      });
    }
  }

  void run_rows(int direction, const Part& part, const StepContext& step, int64_t begin,
                int64_t end) const {
    const auto fetch = [&](int64_t row, int count, int64_t unit) {
      const int64_t bytes = hh_.columns.width * sizeof(T);
      for (int r = 0; r < count; ++r) {
        if constexpr (Cell::saves_gates) {
          const S* gates = step.kept.gate_row(steps_.offset(step.t) + row + r) + unit;
          for (int g = 0; g < G; ++g) prefetch(gates + g * args_.hidden, bytes);
        }
        if (args_.d_output != nullptr) {
          const int64_t feature = feature_offset(direction, step.t, row + r, args_.proj) + unit;
          prefetch(at(args_.d_output, feature), bytes);
        }
      }
    };
    const auto after = [&](int64_t row) {
      return steps_.resets_after(direction, step.t, row) ? zeros_ : step.after + row * stride_;
    };
    const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
      const Tile tile{direction, row, count, column, sums, hh_.columns.units};
      projects_ ? keep_projected(step, tile) : differentiate(step, tile);
    };
    for_each_column(direction, part, step.has_after, after, begin, end, fetch, finish);
    if (projects_) {
      if (part.waits_each_step) part.wait();
      run_projected_rows(direction, part, step, begin, end);
    }
  }

  // One vector of columns of some rows; sums[r * stride] is what reaches them by a product.
  struct Tile {
    int direction;
    int64_t row;
    int count;
    int64_t column;
    const V* sums;
    int stride;
  };

  // The gradient of a projected h_t, complete.
  void keep_projected(const StepContext& step, const Tile& tile) const {
    const int64_t left = min_of(args_.proj - tile.column, V::lanes);
    for (int r = 0; r < tile.count; ++r) {
      const int64_t row = tile.row + r;
      V dh = tile.sums[r * tile.stride];
      if (args_.d_output != nullptr) {
        const int64_t feature = feature_offset(tile.direction, step.t, row, args_.proj);
        dh = dh + V::load(at(args_.d_output, feature + tile.column), left);
      }
      if (!step.has_after && args_.d_h_n != nullptr) {
        const int64_t state = state_offset(tile.direction, row, args_.proj);
        dh = dh + V::load(at(args_.d_h_n, state + tile.column), left);
      }
      const ChunkRows<S>& rows = chunk_gradients_.projected;
      const int64_t local = step.chunk_row(steps_, row);
      if (left < V::lanes) dh = first_lanes(dh, left);
      dh.store(rows.values(tile.direction, local) + tile.column);
      if constexpr (ChunkRows<S>::kNarrows)
        dh.store(rows.factors(tile.direction, local) + tile.column);
    }
  }

  // W_hr^T takes it to the units, where the cell takes over.
  void run_projected_rows(int direction, const Part& part, const StepContext& step, int64_t begin,
                          int64_t end) const {
    const Columns<T>& columns = hr_.columns;
    const Range blocks = hr_blocks(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto run_tile = [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        const F* rows[kMaxRows];
        const int64_t local = step.chunk_row(steps_, row);
        for (int r = 0; r < count; ++r) {
          rows[r] = chunk_gradients_.projected.factors(direction, local + r);
        }
        hr_.multiply(direction, block, rows, count, i, sums);
        for (int u = 0; u < columns.units; ++u) {
          differentiate(step,
                        {direction, row, count, columns.column(block, u), sums + u, columns.units});
        }
      };
      for_each_tile(max_of(begin, part.rows.begin), min_of(end, part.rows.end),
                    max_rows(columns.units), run_tile);
    }
  }

  void differentiate(const StepContext& step, const Tile& tile) const {
    if (args_.hidden - tile.column >= V::lanes) {
      run_cell<true>(step, tile);
    } else if (args_.hidden > tile.column) {
      run_cell<false>(step, tile);
    }
  }

  // What the cell's backward takes for one vector of units of one row.
  struct CellInputs {
    V gate[G], h_prev, h, extra_prev, extra, dh, d_extra;
  };

  // The cell's backward on one tile. Full: no lane lies beyond H.
  template <bool Full>
  void run_cell(const StepContext& step, const Tile& tile) const {
    const int64_t left = args_.hidden - tile.column;
    const auto store = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };
    for (int r = 0; r < tile.count; ++r) {
      const int64_t row = tile.row + r;
      const bool reset = steps_.resets_before(tile.direction, step.t, row);
      CellInputs in;
      load_inputs<Full>(step, tile, r, reset, in);
      V dx[G], dr[G];
      const V direct = Cell::backward(in.gate, in.h_prev, in.h, in.extra_prev, in.extra, in.dh,
                                      in.d_extra, dx, dr);

      const int64_t local = step.chunk_row(steps_, row);
      const int64_t state = state_offset(tile.direction, row, args_.hidden) + tile.column;
      if constexpr (Cell::has_cell_state) {
        if (projects_) {
          Cell::hidden(in.gate, in.extra)
              .store(chunk_gradients_.hidden(tile.direction, local) + tile.column);
        }
      }
      const auto store_gates = [&](const ChunkRows<S>& rows, const V(&d_gates)[G]) {
        T* values = rows.values(tile.direction, local) + tile.column;
        F* factors = rows.factors(tile.direction, local) + tile.column;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          store(values + g * args_.hidden, d_gates[g]);
          if constexpr (ChunkRows<S>::kNarrows) store(factors + g * args_.hidden, d_gates[g]);
        }
      };
      store_gates(chunk_gradients_.input, dx);
      if constexpr (Cell::splits_gradient) store_gates(chunk_gradients_.recurrent, dr);
      if constexpr (Cell::has_direct_path) store(carry_h_ + state, reset ? V(T(0)) : direct);
      if constexpr (Cell::has_cell_state) store(carry_c_ + state, reset ? V(T(0)) : in.d_extra);
    }
  }

  // Of the tile's r-th row. Reset: nothing of the step before goes into this one.
  template <bool Full>
  [[gnu::always_inline]] void load_inputs(const StepContext& step, const Tile& tile, int r,
                                          bool reset, CellInputs& in) const {
    const int64_t left = args_.hidden - tile.column;
    const auto load = [left](const auto* p) {
      if constexpr (Full) return V::load(p);
      return V::load(p, left);
    };
    const auto load_or_zero = [&load](const auto* p) { return p == nullptr ? V(T(0)) : load(p); };

    const int64_t row = tile.row + r, n = steps_.offset(step.t) + row;
    const int64_t state = state_offset(tile.direction, row, args_.hidden) + tile.column;
    const int64_t feature = feature_offset(tile.direction, step.t, row, args_.hidden) + tile.column;
    const int64_t n_before = step.has_before ? steps_.offset(step.before) + row : 0;

    in.h_prev = in.h = in.extra_prev = in.extra = in.d_extra = V(T(0));
    if constexpr (Cell::saves_gates) {
      const S* gates = step.kept.gate_row(n) + tile.column;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) in.gate[g] = load(gates + g * args_.hidden);
    } else {
      in.h = load(at(args_.output, feature));
    }
    if constexpr (Cell::has_extra) in.extra = load(step.kept.extra_row(n) + tile.column);
    if (Cell::has_direct_path && !reset) {
      const int64_t before =
          (n_before * args_.directions + tile.direction) * args_.hidden + tile.column;
      in.h_prev =
          step.has_before ? load(at(args_.output, before)) : load_or_zero(at(args_.h_0, state));
    }
    if constexpr (Cell::has_cell_state) {
      if (!reset) {
        in.extra_prev = step.has_before ? load(step.kept.extra_row(n_before) + tile.column)
                                        : load_or_zero(at(args_.c_0, state));
      }
      in.d_extra = step.has_after ? load(carry_c_ + state) : load_or_zero(at(args_.d_c_n, state));
      if (args_.d_extra != nullptr) {
        in.d_extra = in.d_extra + load(static_cast<const T*>(args_.d_extra) + feature);
      }
    }

    in.dh = tile.sums[r * tile.stride];
    if (!projects_) {
      if (args_.d_output != nullptr) in.dh = in.dh + load(at(args_.d_output, feature));
      if (!step.has_after) in.dh = in.dh + load_or_zero(at(args_.d_h_n, state));
    }
    if (Cell::has_direct_path && step.has_after) in.dh = in.dh + load(carry_h_ + state);
  }

  // Gradients of the initial states of rows whose scan has ended; first(row) are the gate gradients
  // of its first step. Rows without steps have none: their final states were the initial ones.
  template <class First>
  void write_initial(int direction, const Part& part, bool had_steps, First first, int64_t begin,
                     int64_t end) const {
    if (args_.d_h_0 != nullptr) {
      const auto fetch = [](int64_t, int, int64_t) {};
      const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
        const int64_t left = min_of(args_.proj - column, V::lanes);
        for (int r = 0; r < count; ++r) {
          const int64_t state = state_offset(direction, row + r, args_.proj) + column;
          V dh = sums[r * hh_.columns.units];
          if (!had_steps) {
            dh = args_.d_h_n == nullptr ? V(T(0)) : V::load(at(args_.d_h_n, state), left);
          } else if constexpr (Cell::has_direct_path) {
            dh = dh + V::load(carry_h_ + state, left);
          }
          dh.store(static_cast<S*>(args_.d_h_0) + state, left);
        }
      };
      for_each_column(direction, part, had_steps, first, begin, end, fetch, finish);
    }
    if (Cell::has_cell_state && args_.d_c_0 != nullptr) {
      write_initial_cell(direction, part, had_steps, begin, end);
    }
  }

  void write_initial_cell(int direction, const Part& part, bool had_steps, int64_t begin,
                          int64_t end) const {
    const Range own = unit_range(part);
    const int64_t count = own.end - own.begin, last = min_of(end, part.rows.end);
    for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
      const int64_t state = state_offset(direction, row, args_.hidden) + own.begin;
      S* d_c_0 = static_cast<S*>(args_.d_c_0) + state;
      if (had_steps) {
        convert(carry_c_ + state, d_c_0, count);
      } else if (args_.d_c_n != nullptr) {
        convert(at(args_.d_c_n, state), d_c_0, count);
      } else {
        std::memset(d_c_0, 0, count * sizeof(S));
      }
    }
  }

  void write_d_x(int direction, const Part& part, const Chunk& chunk) const {
    // Each thread its own columns, or its own rows where there are too few columns.
    const Columns<T>& columns = ih_.columns;
    const bool by_columns = columns.blocks >= part.size;
    const Range blocks =
        by_columns ? share(columns.blocks, part.rank, part.size) : Range{0, columns.blocks};
    const Range own = by_columns ? Range{0, chunk.rows} : share(chunk.rows, part.rank, part.size);
    S* d_x = static_cast<S*>(args_.d_x) + (direction * steps_.total() + chunk.begin) * args_.input;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto run_tile = [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        const F* rows[kMaxRows];
        for (int r = 0; r < count; ++r) {
          rows[r] = chunk_gradients_.input.factors(direction, row + r);
        }
        ih_.multiply(direction, block, rows, count, i, sums);
        for (int r = 0; r < count; ++r) {
          for (int u = 0; u < columns.units; ++u) {
            const int64_t column = columns.column(block, u);
            const int64_t left = args_.input - column;
            S* target = d_x + (row + r) * args_.input + column;
            if (left >= V::lanes) {
              sums[r * columns.units + u].store(target);
            } else if (left > 0) {
              sums[r * columns.units + u].store(target, left);
            }
          }
        }
      };
      for_each_tile(own.begin, own.end, max_rows(columns.units), run_tile);
    }
  }

  // The step before the chunk's last one will ask for its gate gradients when the chunk is gone.
  void keep_gates(int direction, const Part& part, const Chunk& chunk, int64_t last) const {
    const Range rows = share(steps_.rows(last), part.rank, part.size);
    F* target = carry_gates_ + direction * args_.batch * stride_;
    std::memcpy(target + rows.begin * stride_,
                gates_of(direction, chunk, last) + rows.begin * stride_,
                (rows.end - rows.begin) * stride_ * sizeof(F));
  }
};

template <class Device, class Cell, class S>
void backward_dev_impl(const Device& device, const BackwardArgs& args) {
  Workspace workspace;
  const Steps steps(args, workspace);
  const BackwardScan<Cell, S> scan(args, steps, device.threads, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
