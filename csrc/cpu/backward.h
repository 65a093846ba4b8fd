// The backward scan on the CPU, in the shape of the forward one: a register tile computes the part
// of dh_t that comes through W_hh from the following step, and the cell turns dh_t into gate
// gradients.
#pragma once

#include "math.h"
#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class T>
class BackwardScan {
  using V = Vec<T>;
  static constexpr int G = Cell::gates;

 public:
  BackwardScan(const BackwardArgs& args, Workspace& workspace)
      : args_(args),
        steps_(args.steps, args.batch, args.batch_sizes, workspace),
        hidden_(args.hidden),
        features_(args.directions * args.hidden),
        units_(units_per_block<T>(args.hidden, 1)),
        width_(units_ * V::lanes),
        blocks_((args.hidden + width_ - 1) / width_) {
    const size_t states = args.directions * args.batch * args.hidden;
    packed_ = workspace.take<T>(args.directions * blocks_ * G * hidden_ * width_);
    carry_h_ = workspace.take<T>(Cell::has_direct_path ? states : 0);
    carry_c_ = workspace.take<T>(Cell::has_cell_state ? states : 0);
  }

  Work work() const {
    return {args_.steps, steps_.mean_rows(), G * hidden_,     blocks_,
            units_,      max_rows(units_),   args_.directions};
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    const int64_t step = direction == 0 ? 1 : -1;
    int64_t t = direction == 0 ? steps_.count() - 1 : 0;
    for (int64_t i = 0; i < steps_.count(); ++i, t -= step) {
      const int64_t rows = steps_.rows(t);
      const int64_t going_on =
          min_of(rows, steps_.rows(t + step));                  // their scan has a step after t
      const int64_t old = min_of(rows, steps_.rows(t - step));  // their scan has a step before t
      // At most one of the two lies between: rows end in one direction and begin in the other.
      const int64_t cut = going_on > 0 && going_on < rows ? going_on : old;
      run_rows(direction, part, {t, t + step, t - step, going_on > 0, old > 0}, 0, cut);
      run_rows(direction, part, {t, t + step, t - step, going_on == rows, old == rows}, cut, rows);
      if (part.meets_each_step) part.meet();
      // Rows whose scan began at t are through.
      finish_rows(direction, part, t, old, rows);
    }
    finish_rows(direction, part, -1, steps_.rows(0), args_.batch);
  }

 private:
  const BackwardArgs& args_;
  const Steps steps_;
  const int64_t hidden_, features_;
  const int units_;      // vectors of hidden units in a block
  const int64_t width_;  // columns of a block
  const int64_t blocks_;
  T* packed_;
  // [D, B, H]: what a step hands to the one before it beside W_hh.
  T* carry_h_;
  T* carry_c_;

  // Where one step stands among its neighbours in scan order.
  struct Step {
    int64_t t, after, before;
    bool has_after, has_before;
  };

  int64_t state_offset(int direction, int64_t row) const {
    return (direction * args_.batch + row) * hidden_;
  }
  int64_t feature_offset(int direction, int64_t t, int64_t row) const {
    return (steps_.offset(t) + row) * features_ + direction * hidden_;
  }
  const T* d_gates_row(int direction, int64_t t, int64_t row) const {
    return static_cast<const T*>(args_.d_gates_hh[direction]) +
           (steps_.offset(t) + row) * G * hidden_;
  }
  static const T* at(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
  }
  T* packed(int direction, int64_t block) const {
    return packed_ + (direction * blocks_ + block) * G * hidden_ * width_;
  }

  void pack(int direction, const Part& part) const {
    const T* weight = static_cast<const T*>(args_.weight_hh[direction]);
    Range blocks = part.blocks;
    if (!part.meets_each_step) blocks = share(blocks.end, part.rank, part.size);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      pack_backward(weight, hidden_, G, units_, b, packed(direction, b));
    }
    if (!part.meets_each_step) part.meet();
  }

  // Calls finish(row, count, unit, sums) for every vector of units of every tile of rows [begin,
  // end); sums[r * units_ + u] is W_hh^T times the gate gradients of step `after`, or zero without
  // such a step.
  // Before that, fetch(row, count, unit) may ask for what finish will read.
  template <class Fetch, class Finish>
  void for_each_unit(int direction, const Part& part, int64_t after, bool has_after, int64_t begin,
                     int64_t end, Fetch fetch, Finish finish) const {
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for_each_tile(begin, end, max_rows(units_), [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        if (has_after) {
          fetch(row, count, block * width_);
          const T* rows[kMaxRows];
          for (int r = 0; r < count; ++r) rows[r] = d_gates_row(direction, after, row + r);
          const T* weights = packed(direction, block);
          const T* later = later_of(weights, G * hidden_, units_, i);
          multiply_for<T>(units_, count)(rows, weights, later, G * hidden_, sums);
        } else {
          for (int j = 0; j < count * units_; ++j) sums[j] = V(T(0));
        }
        for (int u = 0; u < units_; ++u) {
          const int64_t unit = (block * units_ + u) * V::lanes;
          if (unit < hidden_) finish(row, count, unit, sums + u);
        }
      });
    }
  }

  void run_rows(int direction, const Part& part, const Step& step, int64_t begin,
                int64_t end) const {
    const auto fetch = [&](int64_t row, int count, int64_t unit) {
      const int64_t bytes = width_ * sizeof(T);
      for (int r = 0; r < count; ++r) {
        const int64_t n = (steps_.offset(step.t) + row + r) * G * hidden_ + unit;
        const int64_t feature = feature_offset(direction, step.t, row + r) + unit;
        if constexpr (Cell::saves_gates) {
          for (int g = 0; g < G; ++g) {
            prefetch(at(args_.gates[direction], n + g * hidden_), bytes);
          }
        }
        if (args_.d_output != nullptr) prefetch(at(args_.d_output, feature), bytes);
      }
    };
    for_each_unit(direction, part, step.after, step.has_after, begin, end, fetch,
                  [&](int64_t row, int count, int64_t unit, const V* sums) {
                    if (hidden_ - unit >= V::lanes) {
                      differentiate<true>(direction, step, row, count, unit, sums);
                    } else {
                      differentiate<false>(direction, step, row, count, unit, sums);
                    }
                  });
  }

  // The cell's backward on one vector of units of some rows. Full: no lane lies beyond H.
  template <bool Full>
  void differentiate(int direction, const Step& step, int64_t row, int count, int64_t unit,
                     const V* sums) const {
    const int64_t left = hidden_ - unit;
    const auto load = [left](const T* p) {
      if constexpr (Full) return V::load(p);
      return V::load(p, left);
    };
    const auto load_or_zero = [&load](const T* p) { return p == nullptr ? V(T(0)) : load(p); };
    const auto store = [left](T* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };

    for (int r = 0; r < count; ++r) {
      const int64_t n = (steps_.offset(step.t) + row + r) * G * hidden_ + unit;
      const int64_t state = state_offset(direction, row + r) + unit;
      const int64_t feature = feature_offset(direction, step.t, row + r) + unit;
      const int64_t before =
          step.has_before ? feature_offset(direction, step.before, row + r) + unit : 0;

      V gate[G], h_prev(T(0)), h(T(0)), extra_prev(T(0)), extra(T(0)), d_extra(T(0));
      if constexpr (Cell::saves_gates) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) gate[g] = load(at(args_.gates[direction], n + g * hidden_));
      } else {
        h = load(at(args_.output, feature));
      }
      if constexpr (Cell::has_extra) extra = load(at(args_.extra, feature));
      if constexpr (Cell::has_direct_path) {
        h_prev =
            step.has_before ? load(at(args_.output, before)) : load_or_zero(at(args_.h_0, state));
      }
      if constexpr (Cell::has_cell_state) {
        extra_prev =
            step.has_before ? load(at(args_.extra, before)) : load_or_zero(at(args_.c_0, state));
        d_extra = step.has_after ? load(carry_c_ + state) : load_or_zero(at(args_.d_c_n, state));
        if (args_.d_extra != nullptr) d_extra = d_extra + load(at(args_.d_extra, feature));
      }

      V dh = sums[r * units_];
      if (args_.d_output != nullptr) dh = dh + load(at(args_.d_output, feature));
      if (!step.has_after) {
        dh = dh + load_or_zero(at(args_.d_h_n, state));
      } else if constexpr (Cell::has_direct_path) {
        dh = dh + load(carry_h_ + state);
      }

      V dx[G], dr[G];
      const V direct = Cell::backward(gate, h_prev, h, extra_prev, extra, dh, d_extra, dx, dr);

      T* d_gates = static_cast<T*>(args_.d_gates[direction]) + n;
      T* d_gates_hh = static_cast<T*>(args_.d_gates_hh[direction]) + n;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        store(d_gates + g * hidden_, dx[g]);
        if constexpr (Cell::splits_gradient) store(d_gates_hh + g * hidden_, dr[g]);
      }
      if constexpr (Cell::has_direct_path) store(carry_h_ + state, direct);
      if constexpr (Cell::has_cell_state) store(carry_c_ + state, d_extra);
    }
  }

  // Gradients of the initial states of rows whose scan began at step `first`; -1: they had no step,
  // and their final states were the initial ones.
  void finish_rows(int direction, const Part& part, int64_t first, int64_t begin,
                   int64_t end) const {
    const bool had_steps = first >= 0;
    const auto finish = [&](int64_t row, int count, int64_t unit, const V* sums) {
      const int64_t left = min_of(hidden_ - unit, V::lanes);
      for (int r = 0; r < count; ++r) {
        const int64_t state = state_offset(direction, row + r) + unit;
        const auto load_or_zero = [left](const T* p) {
          return p == nullptr ? V(T(0)) : V::load(p, left);
        };
        if (args_.d_h_0 != nullptr) {
          V dh = sums[r * units_];
          if (!had_steps) {
            dh = load_or_zero(at(args_.d_h_n, state));
          } else if constexpr (Cell::has_direct_path) {
            dh = dh + V::load(carry_h_ + state, left);
          }
          dh.store(static_cast<T*>(args_.d_h_0) + state, left);
        }
        if constexpr (Cell::has_cell_state) {
          if (args_.d_c_0 != nullptr) {
            const T* dc = had_steps ? carry_c_ + state : at(args_.d_c_n, state);
            load_or_zero(dc).store(static_cast<T*>(args_.d_c_0) + state, left);
          }
        }
      }
    };
    if (args_.d_h_0 == nullptr && args_.d_c_0 == nullptr) return;
    const auto fetch = [](int64_t, int, int64_t) {};
    const bool multiplies = had_steps && args_.d_h_0 != nullptr;
    for_each_unit(direction, part, first, multiplies, begin, end, fetch, finish);
  }
};

template <class Device, class Cell, class T>
void backward_dev_impl(const Device& device, const BackwardArgs& args) {
  Workspace workspace;
  const BackwardScan<Cell, T> scan(args, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
