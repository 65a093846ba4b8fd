// The gradient of x, a chunk of steps at a time: W_ih^T times the gate gradients, while these are
// in cache.
#pragma once

#include "chunk_gradients.h"
#include "scan_common.h"
#include "weight.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class InputGradient {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;

 public:
  InputGradient(const BackwardArgs& args, const Steps& steps,
                const ChunkGradients<S>& chunk_gradients, Workspace& workspace)
      : args_(args),
        steps_(steps),
        chunk_gradients_(chunk_gradients),
        weight_(args.weight_ih, args.d_x != nullptr, args.traits->gates * args.hidden, args.input,
                args.directions, steps.total(), workspace) {}

  void pack(int direction, const Part& part) const {
    weight_.pack(direction, share(weight_.columns.blocks, part.rank, part.size));
  }

  // Of rows of a chunk whose gate gradients are complete.
  void write(int direction, const Part& part, const Chunk& chunk, Range all) const {
    if (args_.d_x == nullptr) return;
    // Each part has its own columns, or its own rows where there are too few columns.
    const Columns<T>& columns = weight_.columns;
    const bool by_columns = columns.blocks >= part.size;
    const Range blocks =
        by_columns ? share(columns.blocks, part.rank, part.size) : Range{0, columns.blocks};
    const Range own = by_columns ? Range{0, all.end - all.begin}
                                 : share(all.end - all.begin, part.rank, part.size);
    const Range rows{all.begin + own.begin, all.begin + own.end};
    sweep(blocks, 1, false, [&](int64_t block, int64_t, int64_t next) {
      for_each_tile(rows.begin, rows.end, max_rows(columns.units),
                    [&](int64_t row, int count, int64_t index) {
                      write_tile(direction, chunk, block, next, row, count, index);
                    });
    });
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<S>& chunk_gradients_;
  const BackwardWeight<S> weight_;

  void write_tile(int direction, const Chunk& chunk, int64_t block, int64_t next, int64_t row,
                  int count, int64_t index) const {
    const Columns<T>& columns = weight_.columns;
    V sums[kMaxRows * kMaxVectors];
    const TileRows<F> d_gates(
        count, [&](int r) { return chunk_gradients_.input.factors(direction, row + r); });
    weight_.multiply(direction, block, next, d_gates.rows, count, index, sums);
    S* d_x =
        static_cast<S*>(args_.d_x) + (direction * steps_.total() + chunk.begin + row) * args_.input;
    for (int r = 0; r < count; ++r) {
      for (int u = 0; u < columns.units; ++u) {
        const int64_t column = columns.column(block, u), left = args_.input - column;
        S* target = d_x + r * args_.input + column;
        if (left >= V::lanes) {
          sums[r * columns.units + u].store(target);
        } else if (left > 0) {
          sums[r * columns.units + u].store(target, left);
        }
      }
    }
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
