// The hot loop: a register tile of the recurrent product.
//
// sums[r][v] = sum over k of rows[r][k] * packed[k][v], for MR batch rows and NV vectors of
// columns. The MR * NV sums stay in registers for the whole of k; each step loads NV vectors and
// broadcasts MR scalars for MR * NV multiply-adds. Meanwhile one cache line of `later` a step is
// brought to L2: weights of large layers come from farther away, and the hardware does not know
// which come next.
#pragma once

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 8;

// The tallest tile that leaves registers for NV weights and one broadcast.
constexpr int max_rows(int vectors) {
  const int rows = (FASTRNN_REGISTERS - vectors - 1) / vectors;
  return rows < kMaxRows ? rows : kMaxRows;
}

template <class T, int NV, int MR>
void multiply(const T* const* rows, const T* packed, const T* later, int64_t depth, Vec<T>* sums) {
  using V = Vec<T>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V(T(0));

  const T* row[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) row[r] = rows[r];

  for (int64_t k = 0; k < depth; ++k, packed += NV * V::lanes, later += V::lanes) {
    __builtin_prefetch(later, 0, 2);
    V w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = V::load(packed + v * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const V a(row[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = acc[r][v] + a * w[v];
    }
  }

#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r * NV + v] = acc[r][v];
}

template <class T>
using Multiply = void (*)(const T* const* rows, const T* packed, const T* later, int64_t depth,
                          Vec<T>* sums);

template <class T, int NV, int MR>
constexpr Multiply<T> multiply_or_null() {
  if constexpr (MR <= max_rows(NV)) {
    return multiply<T, NV, MR>;
  } else {
    return nullptr;
  }
}

template <class T, int NV>
constexpr Multiply<T> multiply_of(int rows) {
  constexpr Multiply<T> table[] = {multiply_or_null<T, NV, 1>(), multiply_or_null<T, NV, 2>(),
                                   multiply_or_null<T, NV, 3>(), multiply_or_null<T, NV, 4>(),
                                   multiply_or_null<T, NV, 5>(), multiply_or_null<T, NV, 6>(),
                                   multiply_or_null<T, NV, 7>(), multiply_or_null<T, NV, 8>()};
  static_assert(sizeof(table) / sizeof(table[0]) == kMaxRows);
  return table[rows - 1];
}

// The tile for `rows` batch rows and `vectors` vectors of columns.
template <class T>
Multiply<T> multiply_for(int vectors, int rows) {
  switch (vectors) {
    case 1:
      return multiply_of<T, 1>(rows);
    case 2:
      return multiply_of<T, 2>(rows);
    case 3:
      return multiply_of<T, 3>(rows);
    default:
      return multiply_of<T, 4>(rows);
  }
}

// What the tile-th tile on a block brings nearer: a part of the block that follows in memory. The
// first NV tiles cover it.
template <class T>
const T* later_of(const T* packed, int64_t depth, int vectors, int64_t tile) {
  const int64_t part = depth * Vec<T>::lanes;
  return packed + (tile < vectors ? vectors + tile : 0) * part;
}

// Calls body(first, count, tile) for tiles of at most `most` rows that cover [begin, end) as evenly
// as can be.
template <class Body>
inline void for_each_tile(int64_t begin, int64_t end, int most, Body body) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin + i * rows / tiles;
    body(first, static_cast<int>(begin + (i + 1) * rows / tiles - first), i);
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
