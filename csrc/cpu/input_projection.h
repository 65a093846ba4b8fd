// W_ih x + b_ih for a scan, some steps ahead of it, in a buffer that stays in cache: that of the
// whole sequence would be written to memory and read back, and inference would need room for it.
#pragma once

#include "scan_common.h"
#include "weight.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S, class W = Factor<S>>
class InputProjection {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  // Rows projected at once: enough to use the tallest tiles and to read W_ih rarely.
  static constexpr int64_t kProjectedRows = 256;

 public:
  // x is copied into its factors where these have another type or whole pairs.
  static constexpr bool kCopies = !std::is_same_v<S, F> || FactorGroup<F>::size > 1;

  InputProjection(const LayerArgs& args, const Steps& steps, int gates, Workspace& workspace,
                  const W* packed)
      : steps_ahead(max_of(1, min_of(args.steps, kProjectedRows / max_of(1, args.batch)))),
        args_(args),
        steps_(steps),
        copy_stride_(packed_depth<F>(args.input)),
        weight_(args.weight_ih, Columns<T>(args.hidden, gates), args.input, args.directions,
                steps.total(), workspace, packed) {
    const int64_t rows = args.directions * steps_ahead * args.batch;
    projected_ = workspace.take<T>(rows * weight_.columns.blocks * weight_.columns.width);
    copied_ = workspace.take<F>(kCopies ? rows * copy_stride_ : 0);
  }

  const int64_t steps_ahead;
  const Columns<T>& columns() const { return weight_.columns; }
  const ForwardWeight<S, W>& weight() const { return weight_; }

  void pack(int direction, Range blocks) const { weight_.pack(direction, blocks); }

  // Of one row of a part for one block, in the order of the tile's columns; slot counts the steps
  // of a run. The rows of a part lie together: where those of two threads alternate, what one
  // prefetches is what the other writes. Or all blocks of a row do: see whole_row().
  T* at(int direction, const Part& part, int64_t block, int64_t slot, int64_t row) const {
    if (args_.layer_norm) {
      return whole_row(direction, slot, row) + block * weight_.columns.width;
    }
    const int64_t parts_before = direction * args_.batch + part.rows.begin;
    const int64_t tiles_before = block * steps_ahead + slot;
    const int64_t rows_before = parts_before * weight_.columns.blocks * steps_ahead +
                                tiles_before * (part.rows.end - part.rows.begin) + row -
                                part.rows.begin;
    return projected_ + rows_before * weight_.columns.width;
  }

  // W_ih x of one row, without its bias, where layer normalisation needs the row as a whole.
  T* whole_row(int direction, int64_t slot, int64_t row) const {
    return projected_ + ((direction * steps_ahead + slot) * args_.batch + row) *
                            weight_.columns.blocks * weight_.columns.width;
  }

  // `count` steps from t on; phase(body) calls body with the parts, see PhaseRunner::step_phases.
  void run(int direction, int64_t t, int64_t count, Phase phase) const {
    if constexpr (kCopies) {
      phase([&](const Part& part) { copy(direction, part, t, count); });
    }
    phase([&](const Part& part) {
      sweep(part.blocks(weight_.columns.blocks), 1, false,
            [&](int64_t block, int64_t, int64_t next) {
              run_block(direction, part, t, count, block, next);
            });
    });
  }

 private:
  const LayerArgs& args_;
  const Steps& steps_;
  const int64_t copy_stride_;
  const ForwardWeight<S, W> weight_;
  T* projected_;
  F* copied_;

  // Calls body(slot, row, x, its copy) for the part's rows, step by step.
  template <class Body>
  void for_each_row(int direction, const Part& part, int64_t t, int64_t count, Body body) const {
    const S* x = static_cast<const S*>(args_.x);
    F* copied = copied_ + direction * steps_ahead * args_.batch * copy_stride_;
    for (int64_t slot = 0; slot < count; ++slot, t += steps_.stride(direction)) {
      const int64_t end = min_of(part.rows.end, steps_.rows(t));
      for (int64_t row = part.rows.begin; row < end; ++row) {
        body(slot, row, x + (steps_.offset(t) + row) * args_.input,
             copied + (slot * args_.batch + row) * copy_stride_);
      }
    }
  }

  void copy(int direction, const Part& part, int64_t t, int64_t count) const {
    int64_t i = 0;
    for_each_row(direction, part, t, count, [&](int64_t, int64_t, const S* from, F* to) {
      // Parts that are units have all rows in common.
      if (part.splits_units && i++ % part.size != part.rank) return;
      pack_row(from, args_.input, copy_stride_, to);
    });
  }

  // A tile takes rows across steps, so that a small batch fills it too.
  void run_block(int direction, const Part& part, int64_t t, int64_t count, int64_t block,
                 int64_t next) const {
    const int vectors = weight_.columns.vectors;
    const int height = max_rows(vectors);
    V biases[kMaxVectors];
    weight_.load_bias(args_.layer_norm ? nullptr : args_.bias_ih[direction], block, biases);
    const F* rows[kMaxRows];
    T* targets[kMaxRows];
    int gathered = 0;
    int64_t tile = 0;
    const auto multiply_gathered = [&] {
      V sums[kMaxRows * kMaxVectors];
      weight_.multiply(direction, block, next, rows, gathered, tile++, sums);
      for (int r = 0; r < gathered; ++r) {
        for (int v = 0; v < vectors; ++v) {
          (sums[r * vectors + v] + biases[v]).store(targets[r] + v * V::lanes);
        }
      }
      gathered = 0;
    };
    for_each_row(direction, part, t, count, [&](int64_t slot, int64_t row, const S* x, F* copy) {
      if constexpr (kCopies) {
        rows[gathered] = copy;
      } else {
        rows[gathered] = x;
      }
      targets[gathered] = at(direction, part, block, slot, row);
      if (++gathered == height) multiply_gathered();
    });
    if (gathered > 0) multiply_gathered();
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
