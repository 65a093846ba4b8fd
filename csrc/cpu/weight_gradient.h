// The gradient of one weight, dW += dG^T X, a chunk of steps at a time.
#pragma once

#include <cstring>

#include "columns.h"
#include "pack.h"

namespace fastrnn::FASTRNN_VARIANT {

// The gradient of a weight [rows, columns] of each direction. The sums of a block of columns lie
// together. A scan of one chunk keeps no sums: its products are the gradient. F: the factors' type.
template <class F>
class WeightGradient {
  using T = Compute<F>;

 public:
  // Rows of gate gradients to multiply at once. With few registers tiles are small and read a panel
  // often: so many rows of it, one tile wide, stay in L1 beside the gate gradients tiles share.
  static constexpr int64_t kPanelRows = FASTRNN_REGISTERS < 32 ? 64 : 256;

  WeightGradient(int64_t rows, int64_t columns, int directions, bool keeps_sums,
                 Workspace& workspace)
      : rows_(rows),
        columns_(columns),
        sums_(workspace.take<T>(keeps_sums ? directions * columns_.blocks * rows * columns_.width
                                           : 0)) {}

  int64_t blocks() const { return columns_.blocks; }

  void clear(int direction, int64_t block, Range rows) const {
    std::memset(sums(direction, block, rows.begin), 0,
                (rows.end - rows.begin) * columns_.width * sizeof(T));
  }

  const Columns<T>& columns() const { return columns_; }

  // panel[k] = source(k, the block's first column), as many as the block has, zeros where that is
  // null; zipped like the rows on the left.
  template <class Source>
  void pack(int64_t block, Source source, int64_t depth, F* panel) const {
    const int64_t first = block * columns_.width;
    const int64_t count = min_of(columns_.width, columns_.count - first);
    const auto columns_of = [&](int64_t k) { return k < depth ? source(k, first) : nullptr; };
    for (int64_t k = 0; k < depth;
         k += FactorGroup<F>::size, panel += FactorGroup<F>::size * columns_.width) {
      if constexpr (FactorGroup<F>::size == 1) {
        const auto* row = columns_of(k);
        pack_row(row, row == nullptr ? 0 : count, columns_.width, panel);
      } else {
        zip_rows(columns_of(k), columns_of(k + 1), count, columns_.width, panel);
      }
    }
  }

  // Adds the products of `depth` rows of gate gradients with the panel, for rows of the weight.
  void add(int direction, int64_t block, Range rows, const F* d_gates, int64_t stride,
           const F* panel, int64_t depth) const {
    for (int64_t k = 0; k < depth; k += kPanelRows) {
      const int64_t some = min_of(kPanelRows, depth - k);
      const auto run_tile = [&](int64_t row, int count, int64_t) {
        tile_for<Accumulate<F>>(columns_.units, count)(
            d_gates + k * stride + row * FactorGroup<F>::size, stride, panel + k * columns_.width,
            some, sums(direction, block, row));
      };
      for_each_tile(rows.begin, rows.end, max_rows(columns_.units), run_tile);
    }
  }

  // Writes the products of all rows of gate gradients with the panel.
  template <class S>
  void assign(int64_t block, Range rows, const F* d_gates, int64_t stride, const F* panel,
              int64_t depth, S* weight) const {
    const int64_t first = block * columns_.width;
    const int64_t left = min_of(columns_.width, columns_.count - first);
    const auto run_tile = [&](int64_t row, int count, int64_t) {
      const auto multiply = tile_for<Assign<F>>(columns_.units, count);
      const F* const own = d_gates + row * FactorGroup<F>::size;
      S* const target = weight + row * columns_.count + first;
      if constexpr (std::is_same_v<S, T>) {
        if (left == columns_.width) {
          return multiply(own, stride, panel, depth, target, columns_.count);
        }
      }
      alignas(64) T products[kMaxRows * kMaxVectors * Vec<T>::lanes];
      multiply(own, stride, panel, depth, products, columns_.width);
      for (int r = 0; r < count; ++r) {
        convert(products + r * columns_.width, target + r * columns_.count, left);
      }
    };
    for_each_tile(rows.begin, rows.end, max_rows(columns_.units), run_tile);
  }

  // The finished sums, into the weight's own layout.
  template <class S>
  void write(int direction, int64_t block, Range rows, S* weight) const {
    const int64_t first = block * columns_.width;
    const int64_t count = min_of(columns_.width, columns_.count - first);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      convert(sums(direction, block, row), weight + row * columns_.count + first, count);
    }
  }

 private:
  const int64_t rows_;
  const Columns<T> columns_;
  T* const sums_;

  T* sums(int direction, int64_t block, int64_t row) const {
    return sums_ + ((direction * columns_.blocks + block) * rows_ + row) * columns_.width;
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
