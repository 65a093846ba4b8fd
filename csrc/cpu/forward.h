// The forward scan on the CPU: for each step and each block of hidden units, a register tile
// computes W_hh h_{t-1} for all gates of some rows, and the cell finishes these rows from
// registers.
//
// W_ih x runs through the same tiles, a few steps ahead, into a buffer that stays in cache: a
// projection of the whole sequence would be written to memory and read back, and inference would
// need room for it.
#pragma once

#include "math.h"
#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class T>
class ForwardScan {
  using V = Vec<T>;
  static constexpr int G = Cell::gates;
  // Rows projected at once: enough to use the tallest tiles and to read W_ih rarely.
  static constexpr int64_t kProjectedRows = 256;

 public:
  ForwardScan(const ForwardArgs& args, Workspace& workspace)
      : args_(args),
        steps_(args.steps, args.batch, args.batch_sizes, workspace),
        input_(args.input),
        hidden_(args.hidden),
        features_(args.directions * args.hidden),
        units_(units_per_block<T>(args.hidden, G)),
        width_(units_ * G * V::lanes),
        blocks_((args.hidden + units_ * V::lanes - 1) / (units_ * V::lanes)),
        ahead_(max_of(1, min_of(args.steps, kProjectedRows / max_of(1, args.batch)))) {
    packed_ih_ = workspace.take<T>(args.directions * blocks_ * input_ * width_);
    packed_hh_ = workspace.take<T>(args.directions * blocks_ * hidden_ * width_);
    projected_ = workspace.take<T>(args.directions * blocks_ * ahead_ * args.batch * width_);
  }

  Work work() const {
    const int vectors = units_ * G;
    return {args_.steps, steps_.mean_rows(), input_ + hidden_, blocks_,
            vectors,     max_rows(vectors),  args_.directions};
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    start_states(direction, part);
    const int64_t step = direction == 0 ? 1 : -1;
    int64_t t = direction == 0 ? 0 : steps_.count() - 1;
    for (int64_t i = 0; i < steps_.count(); ++i, t += step) {
      if (i % ahead_ == 0) project(direction, part, t, step, min_of(ahead_, steps_.count() - i));
      // Rows that were alive before take h from output, the others begin with h_0.
      const int64_t rows = steps_.rows(t);
      const int64_t old = min_of(rows, steps_.rows(t - step));
      const int64_t slot = i % ahead_;
      if (old > 0)
        run_rows(direction, part, t, slot, 0, old, output(direction, t - step), features_);
      if (old < rows)
        run_rows(direction, part, t, slot, old, rows, state(args_.h_0, direction), hidden_);
      // Rows that end here leave their final state.
      copy_final(direction, part, t, min_of(rows, steps_.rows(t + step)), rows);
      if (part.meets_each_step) part.meet();
    }
  }

 private:
  const ForwardArgs& args_;
  const Steps steps_;
  const int64_t input_, hidden_, features_;
  const int units_;      // vectors of hidden units in a block
  const int64_t width_;  // columns of a block: its units, all gates
  const int64_t blocks_;
  const int64_t ahead_;  // steps projected at once
  T* packed_ih_;
  T* packed_hh_;
  T* projected_;

  T* output(int direction, int64_t t) const {
    return static_cast<T*>(args_.output) + steps_.offset(t) * features_ + direction * hidden_;
  }
  const T* state(const void* base, int direction) const {
    return base == nullptr ? nullptr
                           : static_cast<const T*>(base) + direction * args_.batch * hidden_;
  }
  T* state(void* base, int direction) const {
    return static_cast<T*>(base) + direction * args_.batch * hidden_;
  }
  T* packed_ih(int direction, int64_t block) const {
    return packed_ih_ + (direction * blocks_ + block) * input_ * width_;
  }
  T* packed_hh(int direction, int64_t block) const {
    return packed_hh_ + (direction * blocks_ + block) * hidden_ * width_;
  }
  // W_ih x + b_ih of one row for one block, in the order of the tile's columns; slot counts steps
  // ahead.
  T* projected(int direction, int64_t block, int64_t slot, int64_t row) const {
    return projected_ +
           (((direction * blocks_ + block) * ahead_ + slot) * args_.batch + row) * width_;
  }

  // The hidden units [begin, end) of the part's blocks.
  Range unit_range(const Part& part) const {
    const int64_t units = units_ * V::lanes;
    return {min_of(part.blocks.begin * units, hidden_), min_of(part.blocks.end * units, hidden_)};
  }

  void pack(int direction, const Part& part) const {
    const T* weight_ih = static_cast<const T*>(args_.weight_ih[direction]);
    const T* weight_hh = static_cast<const T*>(args_.weight_hh[direction]);
    const bool needs_hh = steps_.count() > 1 || args_.h_0 != nullptr;
    // Threads that split rows share all weights, threads that split units need only their own.
    Range blocks = part.blocks;
    if (!part.meets_each_step) blocks = share(blocks.end, part.rank, part.size);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      pack_forward(weight_ih, hidden_, input_, G, units_, b, packed_ih(direction, b));
      if (needs_hh)
        pack_forward(weight_hh, hidden_, hidden_, G, units_, b, packed_hh(direction, b));
    }
    if (!part.meets_each_step) part.meet();
  }

  // c_n holds the running cell state. Rows without any step keep their initial states.
  void start_states(int direction, const Part& part) const {
    const Range units = unit_range(part);
    for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
      if (row >= steps_.rows(0)) copy_or_zero(args_.h_0, args_.h_n, direction, row, units);
      if constexpr (Cell::has_cell_state) copy_or_zero(args_.c_0, args_.c_n, direction, row, units);
    }
  }

  void copy_or_zero(const void* source, void* target, int direction, int64_t row,
                    Range units) const {
    T* to = state(target, direction) + row * hidden_;
    const size_t bytes = (units.end - units.begin) * sizeof(T);
    if (source == nullptr) {
      std::memset(to + units.begin, 0, bytes);
    } else {
      std::memcpy(to + units.begin, state(source, direction) + row * hidden_ + units.begin, bytes);
    }
  }

  void copy_final(int direction, const Part& part, int64_t t, int64_t begin, int64_t end) const {
    const Range units = unit_range(part);
    for (int64_t row = max_of(begin, part.rows.begin); row < min_of(end, part.rows.end); ++row) {
      std::memcpy(state(args_.h_n, direction) + row * hidden_ + units.begin,
                  output(direction, t) + row * features_ + units.begin,
                  (units.end - units.begin) * sizeof(T));
    }
  }

  // Fills `projected` for `count` steps from t on, for the part's rows and blocks.
  void project(int direction, const Part& part, int64_t t, int64_t step, int64_t count) const {
    const T* bias = static_cast<const T*>(args_.bias_ih[direction]);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      V biases[kMaxVectors];
      load_bias(bias, block, biases);
      const T* rows[kMaxRows];
      T* targets[kMaxRows];
      int gathered = 0;
      int64_t tile = 0;
      const auto multiply_gathered = [&] {
        V sums[kMaxRows * kMaxVectors];
        const int vectors = units_ * G;
        const T* packed = packed_ih(direction, block);
        const T* later = later_of(packed, input_, vectors, tile++);
        tile_for<Multiply<T>>(vectors, gathered)(rows, packed, later, input_, sums);
        for (int r = 0; r < gathered; ++r) {
          for (int v = 0; v < vectors; ++v) {
            (sums[r * vectors + v] + biases[v]).store(targets[r] + v * V::lanes);
          }
        }
        gathered = 0;
      };
      // A tile takes rows across steps, so that a small batch fills it too.
      const int most = max_rows(units_ * G);
      for (int64_t slot = 0; slot < count; ++slot) {
        const int64_t now = t + slot * step;
        const T* x = static_cast<const T*>(args_.x) + steps_.offset(now) * input_;
        const int64_t end = min_of(part.rows.end, steps_.rows(now));
        for (int64_t row = part.rows.begin; row < end; ++row) {
          rows[gathered] = x + row * input_;
          targets[gathered] = projected(direction, block, slot, row);
          if (++gathered == most) multiply_gathered();
        }
      }
      if (gathered > 0) multiply_gathered();
    }
  }

  // The bias of a block's columns; zero beyond H and without a bias.
  void load_bias(const T* bias, int64_t block, V* biases) const {
    for (int v = 0; v < units_ * G; ++v) {
      const int64_t unit = (block * units_ + v / G) * V::lanes;
      const int64_t left = max_of(0, min_of(hidden_ - unit, V::lanes));
      biases[v] = bias == nullptr ? V(T(0)) : V::load(bias + v % G * hidden_ + unit, left);
    }
  }

  // Step t of rows [begin, end). h_{t-1} of row r lies at previous + r * stride; null means zero.
  void run_rows(int direction, const Part& part, int64_t t, int64_t slot, int64_t begin,
                int64_t end, const T* previous, int64_t stride) const {
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    const int vectors = units_ * G;
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      V biases[kMaxVectors];
      load_bias(static_cast<const T*>(args_.bias_hh[direction]), block, biases);
      for_each_tile(begin, end, max_rows(vectors), [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        const T* rows[kMaxRows];
        if (previous == nullptr) {
          for (int j = 0; j < count * vectors; ++j) sums[j] = V(T(0));
        } else {
          for (int r = 0; r < count; ++r) rows[r] = previous + (row + r) * stride;
          const T* packed = packed_hh(direction, block);
          const T* later = later_of(packed, hidden_, vectors, i);
          tile_for<Multiply<T>>(vectors, count)(rows, packed, later, hidden_, sums);
        }
        for (int u = 0; u < units_; ++u) {
          const int64_t unit = (block * units_ + u) * V::lanes;
          const Tile tile{direction,
                          t,
                          row,
                          count,
                          unit,
                          previous == nullptr ? nullptr : rows,
                          sums + u * G,
                          biases + u * G,
                          projected(direction, block, slot, row) + u * G * V::lanes};
          if (hidden_ - unit >= V::lanes) {
            finish<true>(tile);
          } else if (hidden_ > unit) {
            finish<false>(tile);
          }
        }
      });
    }
  }

  // One vector of units of some rows.
  struct Tile {
    int direction;
    int64_t t, row;
    int count;
    int64_t unit;
    const T* const* previous;  // h_{t-1} of each row, or null
    const V* sums;             // W_hh h_{t-1}
    const V* bias;             // b_hh
    const T* projected;        // W_ih x_t + b_ih
  };

  // The cell on one tile. Full: no lane lies beyond H.
  template <bool Full>
  void finish(const Tile& tile) const {
    const int64_t left = hidden_ - tile.unit;
    const auto load = [left](const T* p) {
      if constexpr (Full) return V::load(p);
      return V::load(p, left);
    };
    const auto store = [left](T* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };

    const int64_t n = steps_.offset(tile.t) + tile.row;
    const int64_t feature = n * features_ + tile.direction * hidden_ + tile.unit;
    T* h = static_cast<T*>(args_.output) + feature;
    T* c = Cell::has_cell_state ? state(args_.c_n, tile.direction) + tile.row * hidden_ + tile.unit
                                : nullptr;
    T* extra = args_.extra == nullptr ? nullptr : static_cast<T*>(args_.extra) + feature;
    T* gates = static_cast<T*>(args_.gates[tile.direction]);
    if (gates != nullptr) gates += n * G * hidden_ + tile.unit;

    for (int r = 0; r < tile.count; ++r) {
      V x[G], recurrent[G], kept(T(0)), h_prev(T(0));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        x[g] = V::load(tile.projected + r * width_ + g * V::lanes);
        recurrent[g] = tile.sums[r * units_ * G + g] + tile.bias[g];
      }
      if (Cell::has_direct_path && tile.previous != nullptr)
        h_prev = load(tile.previous[r] + tile.unit);
      if constexpr (Cell::has_cell_state) kept = load(c + r * hidden_);

      store(h + r * features_, Cell::forward(x, recurrent, h_prev, kept));

      if constexpr (Cell::has_cell_state) store(c + r * hidden_, kept);
      if constexpr (Cell::saves_gates) {
        if (gates != nullptr) {
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) store(gates + (r * G + g) * hidden_, x[g]);
        }
      }
      if constexpr (Cell::has_extra) {
        if (extra != nullptr) store(extra + r * features_, kept);
      }
    }
  }
};

template <class Device, class Cell, class T>
void forward_dev_impl(const Device& device, const ForwardArgs& args) {
  Workspace workspace;
  const ForwardScan<Cell, T> scan(args, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
