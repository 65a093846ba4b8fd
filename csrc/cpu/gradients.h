// The weight gradients of a scan, dW += dG^T X, a chunk of steps at a time: the gate gradients of a
// chunk are used while they are in cache and never stored as a whole, and sums over few rows each
// lose less to rounding than one long sum.
#pragma once

#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

// The gradient of one weight [rows, columns] of each direction. Columns are cut into blocks as wide
// as a register tile; the sums of a block lie together. A scan of one chunk keeps no sums: its
// products are the gradient. F: the factors' type.
template <class F>
class WeightGradient {
  using T = Compute<F>;

 public:
  WeightGradient(int64_t rows, int64_t columns, int directions, bool sums, Workspace& workspace)
      : rows_(rows),
        columns_(columns),
        cut_(columns),
        sums_(workspace.take<T>(sums ? directions * cut_.blocks * rows * cut_.width : 0)) {}

  int64_t blocks() const { return cut_.blocks; }

  void clear(int direction, int64_t block, Range rows) const {
    std::memset(sums(direction, block, rows.begin), 0,
                (rows.end - rows.begin) * cut_.width * sizeof(T));
  }

  // panel[k] = the block's columns of source(k), zeros where that is null; zipped like the rows on
  // the left.
  template <class Source>
  void pack(int64_t block, Source source, int64_t depth, F* panel) const {
    const int64_t first = block * cut_.width;
    const int64_t count = min_of(cut_.width, columns_ - first);
    const auto part = [&](int64_t k) {
      const auto* row = k < depth ? source(k) : nullptr;
      return row == nullptr ? nullptr : row + first;
    };
    for (int64_t k = 0; k < depth; k += Step<F>::values, panel += Step<F>::values * cut_.width) {
      if constexpr (Step<F>::values == 1) {
        const auto* row = part(k);
        pack_row(row, row == nullptr ? 0 : count, cut_.width, panel);
      } else {
        zip_rows(part(k), part(k + 1), count, cut_.width, panel);
      }
    }
  }

  // Adds the products of `depth` rows of gate gradients with the panel, for rows of the weight.
  void add(int direction, int64_t block, Range rows, const F* d_gates, int64_t stride,
           const F* panel, int64_t depth) const {
    for_each_tile(rows.begin, rows.end, max_rows(cut_.units), [&](int64_t row, int count, int64_t) {
      tile_for<Accumulate<F>>(cut_.units, count)(d_gates + row * Step<F>::values, stride, panel,
                                                 depth, sums(direction, block, row));
    });
  }

  // Writes the products of all rows of gate gradients with the panel.
  template <class S>
  void assign(int64_t block, Range rows, const F* d_gates, int64_t stride, const F* panel,
              int64_t depth, S* weight) const {
    const int64_t first = block * cut_.width;
    for_each_tile(rows.begin, rows.end, max_rows(cut_.units), [&](int64_t row, int count, int64_t) {
      tile_for<Assign<F, S>>(cut_.units, count)(d_gates + row * Step<F>::values, stride, panel,
                                                depth, weight + row * columns_ + first, columns_,
                                                columns_ - first);
    });
  }

  // The finished sums, into the weight's own layout.
  template <class S>
  void write(int direction, int64_t block, Range rows, S* weight) const {
    const int64_t first = block * cut_.width;
    const int64_t count = min_of(cut_.width, columns_ - first);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      convert(sums(direction, block, row), weight + row * columns_ + first, count);
    }
  }

 private:
  const int64_t rows_, columns_;
  const Columns<T> cut_;
  T* const sums_;

  T* sums(int direction, int64_t block, int64_t row) const {
    return sums_ + ((direction * cut_.blocks + block) * rows_ + row) * cut_.width;
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
