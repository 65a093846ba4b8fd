// A weight of each direction times rows of factors, a register tile at a time. It is packed into
// the order in which tiles read it, or read as it lies where a scan has so few rows that packing
// would take longer than it saves.
#pragma once

#include "columns.h"
#include "pack.h"

namespace fastrnn::FASTRNN_VARIANT {

// W [gates * columns, depth] in the forward scan: rows times W^T. Packed in elements of type W.
template <class S, class W = Factor<S>>
class ForwardWeight {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  // Up to this number of rows in all steps, dot products with the weight as it lies take less time.
  // Each ends in a sum over lanes, which weighs the more, the smaller the depth; and all rows are
  // read again for each vector of columns, so they should stay in L2.
  static constexpr int64_t few_rows(int64_t depth) {
    if (!std::is_same_v<S, F> || FactorGroup<F>::size > 1) return 32;
    return min_of(depth * 5 / 8, (int64_t{1} << 19) / (max_of(depth, 1) * int64_t{sizeof(S)}));
  }
  // A weight of that size is not in L2 and may not be in L3.
  static constexpr int64_t kFarBytes = 8 << 20;

 public:
  // Null weights: the layer has none. `rows`: those of all steps together. `given`: as pack() wrote
  // it before, or null.
  ForwardWeight(const void* const* weight, const Columns<T>& columns, int64_t depth, int directions,
                int64_t rows, Workspace& workspace, const W* given = nullptr)
      : columns(columns),
        depth_(depth),
        weight_(weight),
        is_given_(given != nullptr),
        is_far_(columns.gates * columns.count * depth * int64_t{sizeof(S)} >= kFarBytes) {
    if (weight[0] == nullptr) return;
    if (is_given_) {
      packed_ = const_cast<W*>(given);
    } else if (rows > few_rows(depth)) {
      packed_ = workspace.take<W>(directions * this->columns.blocks * block_size());
    }
  }

  const Columns<T> columns;

  bool is_packed() const { return packed_ != nullptr; }

  void pack(int direction, Range blocks) const {
    if (is_packed() && !is_given_) pack_to(direction, blocks, packed(direction, 0));
  }

  // Packs some blocks of a direction, where its first one is at `to`.
  void pack_to(int direction, Range blocks, W* to) const {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      pack_forward<S, F>(weight(direction), columns.count, depth_, columns.gates, columns.units, b,
                         to + b * block_size());
    }
  }

  // The elements of a direction, packed.
  int64_t packed_size() const { return columns.blocks * block_size(); }

  // sums[r * vectors + v] = rows[r] times the block's v-th vector of columns. `tile`: how many
  // tiles of this block came before; `next`: the block that will be multiplied after it.
  void multiply(int direction, int64_t block, int64_t next, const F* const* rows, int count,
                int64_t tile, V* sums) const {
    const int vectors = columns.vectors;
    if (is_packed()) {
      return tile_for<Multiply<F, W>>(vectors, count)(
          rows, packed(direction, block), columns.width * FactorGroup<F, W>::size,
          prefetch_target<F>(packed(direction, next), depth_, vectors, tile), depth_, sums);
    }
    for (int v = 0; v < vectors; ++v) {
      const int64_t column = columns.column(block, v / columns.gates);
      if (column >= columns.count) continue;
      const S* first_row =
          weight(direction) + (v % columns.gates * columns.count + column) * depth_;
      for_each_tile(0, count, Dot<S, F>::max_rows, [&](int64_t first, int some, int64_t) {
        dot_for<S, F>(some)(rows + first, first_row, columns.count - column, depth_, is_far_,
                            sums + first * vectors + v, vectors);
      });
    }
  }

  // One or two rows take several blocks together: their products fill the multipliers.
  using Blocks = MultiplyBlocks<F, W>;
  static constexpr int kMaxBlocks = Blocks::blocks(1);
  int64_t blocks_at_once(int64_t rows) const {
    const bool few = 0 < rows && rows <= Blocks::max_rows && is_packed();
    return few ? Blocks::blocks(static_cast<int>(rows)) : 1;
  }

  // The same as multiply for the blocks [first, last), at most blocks_at_once; their sums follow
  // each other.
  void multiply_blocks(int direction, int64_t first, int64_t last, int64_t next,
                       const F* const* rows, int count, int64_t tile, V* sums) const {
    const int64_t group = last - first;
    if (group > 1 && group == blocks_at_once(count)) {
      return tile_for<Blocks>(columns.vectors, count)(rows, packed(direction, first), block_size(),
                                                      depth_, sums);
    }
    for (int64_t b = first; b < last; ++b, sums += count * columns.vectors) {
      multiply(direction, b, b + 1 < last ? b + 1 : next, rows, count, tile, sums);
    }
  }

  // A bias [gates * columns] in the order of the block's vectors; zero beyond the columns and for
  // null.
  void load_bias(const void* bias, int64_t block, V* vectors) const {
    columns.load(static_cast<const S*>(bias), block, vectors);
  }

 private:
  const int64_t depth_;
  const void* const* const weight_;
  const bool is_given_, is_far_;
  W* packed_ = nullptr;  // [D, blocks, depth, width]; given, it is only read

  const S* weight(int direction) const { return static_cast<const S*>(weight_[direction]); }
  int64_t block_size() const { return packed_depth<F>(depth_) * columns.width; }
  W* packed(int direction, int64_t block) const {
    return packed_ + direction * packed_size() + block * block_size();
  }
};

// W [depth, columns] in the backward scan: rows times W.
template <class S>
class BackwardWeight {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr bool kReadsUnpacked = std::is_same_v<S, F> && FactorGroup<F>::size == 1;
  static constexpr int64_t kFewRows = 32;

 public:
  // `rows`: those of all steps together. Not used: never multiplied.
  BackwardWeight(const void* const* weight, bool is_used, int64_t depth, int64_t columns,
                 int directions, int64_t rows, Workspace& workspace)
      : columns(columns),
        is_used(is_used),
        depth_(depth),
        weight_(weight),
        packs_all_(!kReadsUnpacked || rows > kFewRows),
        packed_(workspace.take<F>(is_used ? directions * this->columns.blocks * block_size() : 0)) {
  }

  const Columns<T> columns;
  const bool is_used;

  void pack(int direction, Range blocks) const {
    if (!is_used) return;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      if (!packs(b)) continue;
      pack_backward(static_cast<const S*>(weight_[direction]), depth_, columns.count, columns.units,
                    b, packed(direction, b));
    }
  }

  // sums[r * units + u] = rows[r] times the block's u-th vector of columns. `tile` and `next` as in
  // ForwardWeight.
  void multiply(int direction, int64_t block, int64_t next, const F* const* rows, int count,
                int64_t tile, V* sums) const {
    const int64_t stride = packs(block) ? columns.width * FactorGroup<F>::size : columns.count;
    tile_for<Multiply<F>>(columns.units, count)(
        rows, first_of(direction, block), stride,
        prefetch_target<F>(first_of(direction, next), depth_, columns.units, tile), depth_, sums);
  }

 private:
  const int64_t depth_;
  const void* const* const weight_;
  const bool packs_all_;
  F* const packed_;  // [D, blocks, depth, width]

  // Few rows read whole blocks as they lie; the last block may have to be filled with zeros.
  bool packs(int64_t block) const {
    return packs_all_ || (block + 1) * columns.width > columns.count;
  }
  int64_t block_size() const { return packed_depth<F>(depth_) * columns.width; }
  F* packed(int direction, int64_t block) const {
    return packed_ + (direction * columns.blocks + block) * block_size();
  }
  // Where a block is read.
  const F* first_of(int direction, int64_t block) const {
    if constexpr (kReadsUnpacked) {
      if (!packs(block)) {
        return static_cast<const F*>(weight_[direction]) + block * columns.width;
      }
    }
    return packed(direction, block);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
