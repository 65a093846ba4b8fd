// The gradients of a chunk of steps, from which those of the input and of the weights are computed.
#pragma once

#include <cstring>

#include "columns.h"
#include "pack.h"

namespace fastrnn::FASTRNN_VARIANT {

// Rows of gradients, of each direction, in the three forms in which they are used: values; factors
// of products, where these have another type; and factors with pairs of rows zipped, where a
// product takes factors in pairs. Forms that do not differ share their memory.
template <class S>
class ChunkRows {
  using T = Compute<S>;
  using F = Factor<S>;

 public:
  static constexpr bool kNarrows = !std::is_same_v<F, T>;
  static constexpr bool kZips = FactorGroup<F>::size > 1;

  ChunkRows(int directions, int64_t rows, int64_t stride, Workspace& workspace)
      : rows_(rows), stride_(stride), values_(workspace.take<T>(directions * rows * stride)) {
    if constexpr (kNarrows) {
      const int64_t size = directions * rows * stride;
      factors_ = workspace.take<F>(size);
      std::memset(factors_, 0, size * sizeof(F));
    } else {
      factors_ = values_;
    }
    zipped_ = factors_;
    if constexpr (kZips) zipped_ = workspace.take<F>(directions * zipped_rows() * stride);
  }

  T* values(int direction, int64_t row) const {
    return values_ + (direction * rows_ + row) * stride_;
  }
  F* factors(int direction, int64_t row) const {
    return factors_ + (direction * rows_ + row) * stride_;
  }
  const F* zipped(int direction) const { return zipped_ + direction * zipped_rows() * stride_; }

  // Completes the third form of the first `rows` rows; each of `size` threads does its share.
  void zip(int direction, int64_t rows, int rank, int size) const {
    const Range pairs = share((rows + 1) / 2, rank, size);
    F* zipped = zipped_ + direction * zipped_rows() * stride_;
    for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
      const F* even = factors(direction, 2 * pair);
      zip_rows(even, 2 * pair + 1 < rows ? even + stride_ : nullptr, stride_, stride_,
               zipped + 2 * pair * stride_);
    }
  }

 private:
  int64_t rows_, stride_;
  T* values_;  // [D, rows, stride]
  F* factors_;
  F* zipped_;

  int64_t zipped_rows() const { return packed_depth<F>(rows_); }
};

template <class S>
class ChunkGradients {
  using T = Compute<S>;
  using F = Factor<S>;

 public:
  // `rows`: of a chunk, at most.
  ChunkGradients(const LayerArgs& args, int64_t rows, Workspace& workspace)
      : stride(odd_lines<T>((args.traits->gates + vectors(args)) * args.hidden)),
        rows(rows),
        input(args.directions, rows, stride, workspace),
        recurrent(splits(args) ? ChunkRows<S>(args.directions, rows, stride, workspace) : input),
        projected(args.directions, args.weight_hr[0] == nullptr ? 0 : rows, stride, workspace),
        splits_gradient_(args.traits->splits_gradient),
        splits_(splits(args)),
        projects_(args.weight_hr[0] != nullptr),
        hidden_(workspace.take<F>(projects_ ? args.directions * rows * stride : 0)) {
    if (splits_gradient_ && args.layer_norm) {
      biased_ = workspace.take<T>(args.directions * rows * stride);
    }
  }

  const int64_t stride;  // between rows
  const int64_t rows;
  const ChunkRows<S> input;      // of W_ih x + b_ih, and after them of learned vectors
  const ChunkRows<S> recurrent;  // of W_hh h + b_hh, the same unless the cell splits them
  const ChunkRows<S> projected;  // of a projected h

  // With layer normalisation `input` and `recurrent` are in the end the gradients of W_ih x and of
  // W_hh h as they are multiplied, and this is that of the latter as the cell takes it.
  T* biased(int direction, int64_t row) const {
    if (biased_ != nullptr) return biased_ + (direction * rows + row) * stride;
    return (splits_gradient_ ? recurrent : input).values(direction, row);
  }

  // h before its projection.
  F* hidden(int direction, int64_t row) const {
    return hidden_ + (direction * rows + row) * stride;
  }

  // Those learned vectors whose gradients are sums over rows, as those of biases are.
  static int vectors(const LayerArgs& args) {
    return args.traits->parameters + (args.layer_norm ? args.traits->norms - 2 : 0);
  }

  void zip(int direction, int64_t count, int rank, int size) const {
    input.zip(direction, count, rank, size);
    if (splits_) recurrent.zip(direction, count, rank, size);
    if (projects_) projected.zip(direction, count, rank, size);
  }

 private:
  const bool splits_gradient_, splits_, projects_;
  F* const hidden_;
  T* biased_ = nullptr;

  static bool splits(const LayerArgs& args) {
    return args.traits->splits_gradient || args.layer_norm;
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
