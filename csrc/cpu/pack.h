// Packs weights for the register tiles: [block][k][vector][lane], zeros beyond H, so that a tile
// reads its weights as one stream. A block is what one tile computes: `units` vectors of hidden
// units, for forward with all gates of each. Where k go in pairs, these lie side by
// side: [block][k / 2][vector][lane][k % 2].
#pragma once

#include "multiply.h"

namespace fastrnn::FASTRNN_VARIANT {

// The first `count` elements of a row, and zeros up to `width`.
template <class S, class T>
inline void pack_row(const S* row, int64_t count, int64_t width, T* packed) {
  convert(row, packed, count);
  for (int64_t i = count; i < width; ++i) packed[i] = T{};
}

// Two rows, or one and zeros for null, their elements in turn, and zeros up to `width` of each.
template <class F>
inline void zip_rows(const F* even, const F* odd, int64_t count, int64_t width, F* zipped) {
  for (int64_t i = 0; i < count; ++i) zipped[2 * i] = even == nullptr ? F{} : even[i];
  for (int64_t i = 0; i < count; ++i) zipped[2 * i + 1] = odd == nullptr ? F{} : odd[i];
  for (int64_t i = 2 * count; i < 2 * width; ++i) zipped[i] = F{};
}

// Forward: column (u, g, lane) of block b holds row g*H + unit of W [G*H, depth], k runs over
// depth.
template <class S, class F, class W>
void pack_forward(const S* weight, int64_t hidden, int64_t depth, int gates, int units,
                  int64_t block, W* packed) {
  constexpr int lanes = FactorGroup<F>::V::lanes, size = FactorGroup<F>::size;
  const int vectors = units * gates;
  for (int v = 0; v < vectors; ++v) {
    const int64_t unit = (block * units + v / gates) * lanes;
    const int64_t left = hidden - unit;
    const int count = left < 0 ? 0 : left < lanes ? static_cast<int>(left) : lanes;
    const S* source = weight + (v % gates * hidden + unit) * depth;
    int64_t k = 0;
    if constexpr (std::is_same_v<S, F> && size == 1) {
      for (; count == lanes && k + lanes <= depth; k += lanes) {
        Vec<F> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = Vec<F>::load(source + i * depth + k);
        transpose<F>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i].store(packed + ((k + i) * vectors + v) * lanes);
      }
    }
    for (; k < packed_depth<F>(depth); ++k) {
      W* lane = packed + (k / size * vectors + v) * lanes * size + k % size;
      const int filled = k < depth ? count : 0;
      if constexpr (std::is_same_v<F, W>) {
        for (int i = 0; i < filled; ++i) convert(source[i * depth + k], lane[i * size]);
        for (int i = filled; i < lanes; ++i) lane[i * size] = F{};
      } else {
        F values[lanes] = {};
        for (int i = 0; i < filled; ++i) values[i] = source[i * depth + k];
        Vec<F>::load(values).store(lane);
      }
    }
  }
}

// Backward: column (u, lane) of block b holds column `unit` of W [depth, columns], k runs over
// depth.
template <class S, class F>
void pack_backward(const S* weight, int64_t depth, int64_t columns, int units, int64_t block,
                   F* packed) {
  constexpr int size = FactorGroup<F>::size;
  const int64_t width = units * FactorGroup<F>::V::lanes;
  const int64_t first = block * width;
  const int64_t count = columns - first < width ? columns - first : width;
  for (int64_t k = 0; k < packed_depth<F>(depth); ++k) {
    const S* source = weight + k * columns + first;
    if constexpr (size == 1) {
      pack_row(source, count, width, packed + k * width);
    } else {
      F* lane = packed + k / size * width * size + k % size;
      const int64_t filled = k < depth ? count : 0;
      for (int64_t i = 0; i < filled; ++i) convert(source[i], lane[i * size]);
      for (int64_t i = filled; i < width; ++i) lane[i * size] = F{};
    }
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
