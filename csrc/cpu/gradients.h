// The weight gradients of a scan, dW += dG^T X, a chunk of steps at a time: the gate gradients of a
// chunk are used while they are in cache and never stored as a whole, and sums over few rows each
// lose less to rounding than one long sum.
#pragma once

#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

// The gradient of one weight [rows, columns] of each direction. Columns are cut into blocks as wide
// as a register tile; the sums of a block lie together.
template <class T>
class WeightGradient {
 public:
  WeightGradient(int64_t rows, int64_t columns, int directions, Workspace& workspace)
      : rows_(rows),
        columns_(columns),
        vectors_(units_per_block<T>(columns, 1)),
        width_(vectors_ * Vec<T>::lanes),
        blocks_((columns + width_ - 1) / width_),
        sums_(workspace.take<T>(directions * blocks_ * rows * width_)) {}

  int64_t blocks() const { return blocks_; }

  void clear(int direction, int64_t block, Range rows) const {
    std::memset(sums(direction, block, rows.begin), 0,
                (rows.end - rows.begin) * width_ * sizeof(T));
  }

  // panel[k] = the block's columns of source[k], zeros where source[k] is null.
  void pack(int64_t block, const T* const* source, int64_t depth, T* panel) const {
    const int64_t first = block * width_;
    const int64_t count = min_of(width_, columns_ - first);
    for (int64_t k = 0; k < depth; ++k, panel += width_) {
      pack_row(source[k] == nullptr ? nullptr : source[k] + first, source[k] == nullptr ? 0 : count,
               width_, panel);
    }
  }

  // Adds the products of `depth` rows of gate gradients with the panel, for rows of the weight.
  void add(int direction, int64_t block, Range rows, const T* d_gates, int64_t stride,
           const T* panel, int64_t depth) const {
    for_each_tile(rows.begin, rows.end, max_rows(vectors_), [&](int64_t row, int count, int64_t) {
      tile_for<Accumulate<T>>(vectors_, count)(d_gates + row, stride, panel, depth,
                                               sums(direction, block, row));
    });
  }

  // The finished sums, into the weight's own layout.
  void write(int direction, int64_t block, Range rows, T* weight) const {
    const int64_t first = block * width_;
    const int64_t count = min_of(width_, columns_ - first);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      std::memcpy(weight + row * columns_ + first, sums(direction, block, row), count * sizeof(T));
    }
  }

 private:
  const int64_t rows_, columns_;
  const int vectors_;
  const int64_t width_, blocks_;
  T* const sums_;

  T* sums(int direction, int64_t block, int64_t row) const {
    return sums_ + ((direction * blocks_ + block) * rows_ + row) * width_;
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
