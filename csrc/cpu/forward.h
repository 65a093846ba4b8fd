// The forward scan on the CPU: for each step and each block of hidden units, a register tile computes
// W_hh h_{t-1} for all gates of some rows, and the cell finishes these rows from registers.
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

 public:
  ForwardScan(const ForwardArgs& args, const Steps& steps, int units, T* packed)
      : args_(args),
        steps_(steps),
        hidden_(args.hidden),
        features_(args.directions * args.hidden),
        units_(units),
        packed_(packed) {}

  static size_t packed_size(int64_t hidden, int units) {
    return static_cast<size_t>(block_count(hidden, units)) * hidden * units * G * V::lanes;
  }
  static int64_t block_count(int64_t hidden, int units) {
    return (hidden + units * V::lanes - 1) / (units * V::lanes);
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    start_states(direction, part);
    const int64_t step = direction == 0 ? 1 : -1;
    int64_t t = direction == 0 ? 0 : steps_.count() - 1;
    for (int64_t i = 0; i < steps_.count(); ++i, t += step) {
      // Rows that were alive before take h from output, the others begin with h_0.
      const int64_t rows = steps_.rows(t);
      const int64_t old = min_of(rows, steps_.rows(t - step));
      if (old > 0) run_rows(direction, part, t, 0, old, output(direction, t - step), features_);
      if (old < rows) run_rows(direction, part, t, old, rows, state(args_.h_0, direction), hidden_);
      // Rows that end here leave their final state.
      copy_final(direction, part, t, min_of(rows, steps_.rows(t + step)), rows);
      if (part.meets_each_step) part.meet();
    }
  }

 private:
  const ForwardArgs& args_;
  const Steps& steps_;
  const int64_t hidden_, features_;
  const int units_;
  T* const packed_;

  T* output(int direction, int64_t t) const {
    return static_cast<T*>(args_.output) + steps_.offset(t) * features_ + direction * hidden_;
  }
  const T* state(const void* base, int direction) const {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + direction * args_.batch * hidden_;
  }
  T* state(void* base, int direction) const {
    return static_cast<T*>(base) + direction * args_.batch * hidden_;
  }
  T* packed(int direction, int64_t block) const {
    return packed_ + direction * packed_size(hidden_, units_) + block * hidden_ * units_ * G * V::lanes;
  }

  // The hidden units [begin, end) of the part's blocks.
  Range unit_range(const Part& part) const {
    const int64_t width = units_ * V::lanes;
    return {min_of(part.blocks.begin * width, hidden_), min_of(part.blocks.end * width, hidden_)};
  }

  void pack(int direction, const Part& part) const {
    const T* weight = static_cast<const T*>(args_.weight_hh[direction]);
    // Threads that split rows share all weights, threads that split units need only their own.
    Range blocks = part.blocks;
    if (!part.meets_each_step) blocks = share(blocks.end, part.rank, part.size);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      pack_forward(weight, hidden_, G, units_, b, packed(direction, b));
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

  void copy_or_zero(const void* source, void* target, int direction, int64_t row, Range units) const {
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

  // Step t of rows [begin, end). h_{t-1} of row r lies at previous + r * stride; null means zero.
  void run_rows(int direction, const Part& part, int64_t t, int64_t begin, int64_t end,
                const T* previous, int64_t stride) const {
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    const int vectors = units_ * G;
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for_each_tile(begin, end, max_rows(vectors), [&](int64_t row, int count) {
        V sums[kMaxRows * kMaxVectors];
        const T* rows[kMaxRows];
        if (previous == nullptr) {
          for (int i = 0; i < count * vectors; ++i) sums[i] = V(T(0));
        } else {
          for (int r = 0; r < count; ++r) rows[r] = previous + (row + r) * stride;
          multiply_for<T>(vectors, count)(rows, packed(direction, block), hidden_, sums);
        }
        for (int u = 0; u < units_; ++u) {
          const int64_t unit = (block * units_ + u) * V::lanes;
          const Tile tile{direction, t, row, count, unit, previous == nullptr ? nullptr : rows, sums + u * G};
          if (hidden_ - unit >= V::lanes) {
            finish<true>(tile);
          } else if (hidden_ > unit) {
            finish<false>(tile);
          }
        }
      });
    }
  }

  struct Tile {
    int direction;
    int64_t t, row;
    int count;
    int64_t unit;
    const T* const* previous;
    const V* sums;
  };

  // The cell on one vector of units of some rows. Full: no lane lies beyond H.
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

    V bias[G];
    const T* b = static_cast<const T*>(args_.bias_hh[tile.direction]);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) bias[g] = b == nullptr ? V(T(0)) : load(b + g * hidden_ + tile.unit);

    const int64_t n = steps_.offset(tile.t) + tile.row;
    T* gates = static_cast<T*>(args_.gates[tile.direction]) + n * G * hidden_ + tile.unit;
    T* c = Cell::has_cell_state ? state(args_.c_n, tile.direction) + tile.row * hidden_ + tile.unit : nullptr;
    const int64_t feature = n * features_ + tile.direction * hidden_ + tile.unit;
    T* h = static_cast<T*>(args_.output) + feature;
    T* extra = args_.extra == nullptr ? nullptr : static_cast<T*>(args_.extra) + feature;

    for (int r = 0; r < tile.count; ++r) {
      V x[G], recurrent[G], kept(T(0)), h_prev(T(0));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        x[g] = load(gates + g * hidden_);
        recurrent[g] = tile.sums[r * units_ * G + g] + bias[g];
      }
      if (Cell::has_direct_path && tile.previous != nullptr) h_prev = load(tile.previous[r] + tile.unit);
      if constexpr (Cell::has_cell_state) kept = load(c);

      store(h, Cell::forward(x, recurrent, h_prev, kept));

      if constexpr (Cell::has_cell_state) {
        store(c, kept);
        c += hidden_;
      }
      if (args_.keep) {
        if constexpr (Cell::saves_gates) {
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) store(gates + g * hidden_, x[g]);
        }
        if constexpr (Cell::has_extra) {
          store(extra, kept);
          extra += features_;
        }
      }
      gates += G * hidden_;
      h += features_;
    }
  }
};

template <class Device, class Cell, class T>
void forward_dev_impl(const Device& device, const ForwardArgs& args) {
  using Scan = ForwardScan<Cell, T>;
  const int units = units_per_block<T>(args.hidden, Cell::gates);
  const size_t packed = Scan::packed_size(args.hidden, units) * args.directions;
  Workspace workspace(Workspace::size_of<T>(packed) + Workspace::size_of<int64_t>(args.steps));
  T* weights = workspace.template take<T>(packed);
  const Steps steps(args.steps, args.batch, args.batch_sizes, workspace.template take<int64_t>(args.steps));
  const int vectors = units * Cell::gates;
  const Work work{args.steps, steps.mean_rows(),   args.hidden,     Scan::block_count(args.hidden, units),
                  vectors,    max_rows(vectors), args.directions};
  run_scan(args, work, device.threads, Scan(args, steps, units, weights));
}

}  // namespace fastrnn::FASTRNN_VARIANT
