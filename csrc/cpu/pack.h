// Packs weights for the register tiles: [block][k][vector][lane], zeros beyond H, so that a tile
// reads its weights as one stream. A block is what one tile computes: `units` vectors of hidden
// units, for forward with all gates of each.
#pragma once

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

// The first `count` elements of a row, and zeros up to `width`.
template <class S, class T>
inline void pack_row(const S* row, int64_t count, int64_t width, T* packed) {
  convert(row, packed, count);
  for (int64_t i = count; i < width; ++i) packed[i] = T(0);
}

// Forward: column (u, g, lane) of block b holds row g*H + unit of W [G*H, depth], k runs over
// depth.
template <class S, class T>
void pack_forward(const S* weight, int64_t hidden, int64_t depth, int gates, int units,
                  int64_t block, T* packed) {
  constexpr int lanes = Vec<T>::lanes;
  const int vectors = units * gates;
  for (int v = 0; v < vectors; ++v) {
    const int64_t unit = (block * units + v / gates) * lanes;
    const int64_t left = hidden - unit;
    const int count = left < 0 ? 0 : left < lanes ? static_cast<int>(left) : lanes;
    const S* source = weight + (v % gates * hidden + unit) * depth;
    for (int64_t k = 0; k < depth; ++k) {
      T* lane = packed + (k * vectors + v) * lanes;
      for (int i = 0; i < count; ++i) lane[i] = widen(source[i * depth + k]);
      for (int i = count; i < lanes; ++i) lane[i] = T(0);
    }
  }
}

// Backward: column (u, lane) of block b holds column `unit` of W [depth, columns], k runs over
// depth.
template <class S, class T>
void pack_backward(const S* weight, int64_t depth, int64_t columns, int units, int64_t block,
                   T* packed) {
  const int64_t width = units * Vec<T>::lanes;
  const int64_t first = block * width;
  const int64_t count = columns - first < width ? columns - first : width;
  for (int64_t k = 0; k < depth; ++k) {
    pack_row(weight + k * columns + first, count, width, packed + k * width);
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
