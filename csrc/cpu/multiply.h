// The hot loop: a register tile of a matrix product, MR rows by NV vectors of columns.
//
// The MR * NV sums stay in registers for the whole of the depth; for each k, NV vectors of the
// packed right side are loaded and MR scalars of the left one broadcast for MR * NV multiply-adds.
// (16-bit factors go in pairs where the processor multiplies them so.) Meanwhile a cache line of
// `next` is prefetched to L2: weights of large layers come from L3 or memory, and the hardware
// does not know which come next.
#pragma once

#include <utility>

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

#if !defined(FASTRNN_GATES)
#define FASTRNN_GATES 4  // the most that a cell of this build has
#endif
constexpr int kBlockVectors = 4;  // in a block of columns, unless a single unit's gates need more
constexpr int kMaxVectors = FASTRNN_GATES > kBlockVectors ? FASTRNN_GATES : kBlockVectors;
constexpr int kMaxRows = 8;

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasMultiplyAdd = true;
#else
constexpr bool kHasMultiplyAdd = false;  // a product needs a register of its own
#endif

// The tallest tile whose sums leave registers for a row or a column of factors and for one more.
constexpr int max_rows(int vectors) {
  const auto registers = [vectors](int rows) {
    return rows * vectors + (rows < vectors ? rows : vectors) + (kHasMultiplyAdd ? 1 : 2);
  };
  int rows = kMaxRows;
  while (registers(rows) > FASTRNN_REGISTERS) --rows;
  return rows;
}

// The factors of type F that one multiply-add takes: those of `size` successive k, which lie side
// by side on the left and in each lane on the right. There they may be stored in a smaller type, W.
template <class F, class W = F>
struct FactorGroup {
  using V = Vec<F>;
  static constexpr int size = 1;
  static V broadcast(const F* left) { return V(*left); }
  static V load(const W* right) { return V::load(right); }
  static V multiply_add(V sum, V left, V right) { return sum + left * right; }
};
#if defined(__AVX512BF16__)
template <>
struct FactorGroup<BFloat16, BFloat16> {
  using V = Vec<float>;
  static constexpr int size = 2;
  static __m512bh broadcast(const BFloat16* left) {
    int32_t pair;
    std::memcpy(&pair, left, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static __m512bh load(const BFloat16* right) { return (__m512bh)_mm512_loadu_si512(right); }
  static V multiply_add(V sum, __m512bh left, __m512bh right) {
    return (V::Raw)_mm512_dpbf16_ps((__m512)sum.raw, left, right);
  }
};
#endif

// The depth of a packed weight: a whole number of groups. Rows on the left need as many values, any
// finite ones beyond their end.
template <class F>
constexpr int64_t packed_depth(int64_t depth) {
  return (depth + FactorGroup<F>::size - 1) / FactorGroup<F>::size * FactorGroup<F>::size;
}

// acc[r][v] += sum over k of left(r, k) * packed[k][v], where groups of k are `stride` apart.
template <class F, class W, int NV, int MR, class Left>
[[gnu::always_inline]] inline void multiply_add(Vec<Compute<F>> (&acc)[MR][NV], Left left,
                                                const W* packed, int64_t stride, const W* next,
                                                int64_t depth) {
  using Group = FactorGroup<F, W>;
  constexpr int line = Group::V::lanes * Group::size;
  for (int64_t k = 0; k < depth; k += Group::size, packed += stride, next += line) {
    __builtin_prefetch(next, 0, 2);
    // The shorter side of the tile waits in registers for the other.
    if constexpr (MR < NV) {
      decltype(Group::broadcast(left(0, k))) a[MR];
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) a[r] = Group::broadcast(left(r, k));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const auto w = Group::load(packed + v * line);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) acc[r][v] = Group::multiply_add(acc[r][v], a[r], w);
      }
    } else {
      decltype(Group::load(packed)) w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = Group::load(packed + v * line);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const auto a = Group::broadcast(left(r, k));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Group::multiply_add(acc[r][v], a, w[v]);
      }
    }
  }
}

// sums[r][v] = sum over k of rows[r][k] * packed[k][v].
template <class F, class W = F>
struct Multiply {
  using V = Vec<Compute<F>>;
  template <int NV, int MR>
  static void run(const F* const* rows, const W* packed, int64_t stride, const W* next,
                  int64_t depth, V* sums) {
    V acc[MR][NV];
    const F* row[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      row[r] = rows[r];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V(0);
    }
    multiply_add<F>(
        acc, [&row](int r, int64_t k) { return row[r] + k; }, packed, stride, next, depth);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r * NV + v] = acc[r][v];
  }
};

// The same for some blocks of packed columns, `stride` apart, at once: a tile of one or two rows
// has too few sums to keep the multipliers busy. sums[b][r][v].
template <class F, class W = F>
struct MultiplyBlocks {
  using V = Vec<Compute<F>>;
  static constexpr int max_rows = 2;
  static constexpr int blocks(int rows) { return FASTRNN_REGISTERS / 8 / rows; }

  template <int NV, int MR>
  static void run(const F* const* rows, const W* packed, int64_t stride, int64_t depth, V* sums) {
    using Group = FactorGroup<F, W>;
    constexpr int NB = blocks(MR), line = Group::V::lanes * Group::size;
    V acc[NB][MR][NV];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 2
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[b][r][v] = V(0);
    for (int64_t k = 0; k < depth; k += Group::size, packed += NV * line) {
      decltype(Group::broadcast(rows[0])) a[MR];
#pragma GCC unroll 2
      for (int r = 0; r < MR; ++r) a[r] = Group::broadcast(rows[r] + k);
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const auto w = Group::load(packed + b * stride + v * line);
#pragma GCC unroll 2
          for (int r = 0; r < MR; ++r) acc[b][r][v] = Group::multiply_add(acc[b][r][v], a[r], w);
        }
    }
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 2
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[(b * MR + r) * NV + v] = acc[b][r][v];
  }
};

// A product with the left side transposed: body(r, v, sum over k of columns[k * stride + r] *
// packed[k][v]). Where k go in pairs, two rows on the left are zipped:
// columns[k / 2 * 2 * stride + 2 * r + k % 2].
template <class F, int NV, int MR, class Body>
[[gnu::always_inline]] inline void multiply_transposed(const F* columns, int64_t stride,
                                                       const F* packed, const void* next,
                                                       int64_t depth, Body body) {
  using V = Vec<Compute<F>>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V(0);
  multiply_add<F>(
      acc,
      [columns, stride](int r, int64_t k) {
        return columns + k * stride + r * FactorGroup<F>::size;
      },
      packed, NV * FactorGroup<F>::V::lanes * FactorGroup<F>::size, static_cast<const F*>(next),
      depth);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) body(r, v, acc[r][v]);
}

// Adds it to target[r][v].
template <class F>
struct Accumulate {
  using T = Compute<F>;
  template <int NV, int MR>
  static void run(const F* columns, int64_t stride, const F* packed, int64_t depth, T* target) {
    using V = Vec<T>;
    multiply_transposed<F, NV, MR>(columns, stride, packed, target, depth,
                                   [target](int r, int v, V sum) {
                                     T* p = target + (r * NV + v) * V::lanes;
                                     (V::load(p) + sum).store(p);
                                   });
  }
};

// Writes it into rows of a matrix of `width`.
template <class F>
struct Assign {
  using T = Compute<F>;
  template <int NV, int MR>
  static void run(const F* columns, int64_t stride, const F* packed, int64_t depth, T* target,
                  int64_t width) {
    using V = Vec<T>;
    multiply_transposed<F, NV, MR>(
        columns, stride, packed, target, depth,
        [=](int r, int v, V sum) { sum.store(target + r * width + v * V::lanes); });
  }
};

// Seen as a matrix of two rows and blocks of W lanes, exchanges the odd blocks of a with the even
// ones of b.
template <class T, int W, int... I>
[[gnu::always_inline]] inline void exchange(Vec<T>& a, Vec<T>& b,
                                            std::integer_sequence<int, I...>) {
  constexpr int lanes = Vec<T>::lanes;
  const Vec<T> low = shuffle<(I & W ? lanes + I - W : I)...>(a, b);
  const Vec<T> high = shuffle<(I & W ? lanes + I : I + W)...>(a, b);
  a = low;
  b = high;
}
template <class T, int W>
[[gnu::always_inline]] inline void exchange(Vec<T>& a, Vec<T>& b) {
  exchange<T, W>(a, b, std::make_integer_sequence<int, Vec<T>::lanes>());
}

// Lane i of the result is the sum over the lanes of a[i], for From = lanes and To = 1: halves are
// folded onto each other, those of two vectors at a time, until one vector is left. Else From / To
// vectors become one: parts of From lanes that belong together become parts of To.
template <class T, int From, int To>
[[gnu::always_inline]] inline Vec<T> sum_lanes(Vec<T>* a) {
  if constexpr (From == To) {
    return a[0];
  } else {
    constexpr int half = From / 2, results = half / To;
#pragma GCC unroll 8
    for (int i = 0; i < results; ++i) {
      exchange<T, half>(a[i], a[i + results]);
      a[i] = a[i] + a[i + results];
    }
    return sum_lanes<T, half, To>(a);
  }
}

// Vectors that are the rows of a square become its columns.
template <class T, int W = Vec<T>::lanes / 2>
[[gnu::always_inline]] inline void transpose(Vec<T>* rows) {
  if constexpr (W > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<T>::lanes; ++i) {
      if (!(i & W)) exchange<T, W>(rows[i], rows[i + W]);
    }
    transpose<T, W / 2>(rows);
  }
}

// A tile of dot products of rows with rows of a weight as it lies, its depth along the lanes: for
// so few rows that packing the weight would take longer than the product. Lane i of sums[r *
// stride] is rows[r] times row i of `weight`, which has `count` of them. A weight that is far away,
// in L3 or memory, is prefetched: the hardware begins anew with each page, which may be each row.
template <class S, class F>
struct Dot {
  using T = Compute<S>;
  using V = Vec<T>;
  // Rows of the weight at once. They lie lanes / columns rows from each other, so that the first
  // folds of sum_lanes are done while all sums are in registers.
  static constexpr int columns = V::lanes < 4 ? V::lanes : 4;
  static constexpr int max_rows = (FASTRNN_REGISTERS - 1) / (columns + 1);

  template <int MR>
  static void run(const F* const* rows, const S* weight, int64_t count, int64_t depth, bool is_far,
                  V* sums, int stride) {
    constexpr int groups = V::lanes / columns;
    V folded[MR][groups];
    for (int j = 0; j < groups; ++j) {
      const S* from[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        const int64_t i = j + c * groups;
        from[c] = weight + (i < count ? i : count - 1) * depth;
      }
      V acc[MR][columns];
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) acc[r][c] = V(T(0));
      const auto multiply_whole = [&](int64_t k) {
        multiply_add<MR>(
            acc, [&](int r) { return V::load(rows[r] + k); },
            [&](int c) { return V::load(from[c] + k); });
      };
      int64_t k = 0;
      if (is_far) {
        // The rows that come next, here or in the tile that follows.
        const int64_t next = (j + 1 < groups ? 1 : V::lanes - j) * depth;
        for (; k + V::lanes <= depth; k += V::lanes) {
#pragma GCC unroll 4
          for (int c = 0; c < columns; ++c) __builtin_prefetch(from[c] + next + k, 0, 2);
          multiply_whole(k);
        }
      }
      for (; k + V::lanes <= depth; k += V::lanes) multiply_whole(k);
      if (k < depth) {
        multiply_add<MR>(
            acc, [&](int r) { return V::load(rows[r] + k, depth - k); },
            [&](int c) { return V::load(from[c] + k, depth - k); });
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) folded[r][j] = sum_lanes<T, V::lanes, groups>(acc[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) sums[r * stride] = sum_lanes<T, groups, 1>(folded[r]);
  }

 private:
  template <int MR, class Left, class Right>
  [[gnu::always_inline]] static void multiply_add(V (&acc)[MR][columns], Left left, Right right) {
    V a[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) a[r] = left(r);
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      const V w = right(c);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) acc[r][c] = acc[r][c] + a[r] * w;
    }
  }
};

// The rows of the tallest tile that a kernel takes: max_rows(NV) if it does not say.
template <class Kernel, int NV>
constexpr int tallest() {
  if constexpr (requires { Kernel::tallest(NV); }) return Kernel::tallest(NV);
  if constexpr (requires { Kernel::max_rows; }) return Kernel::max_rows;
  return max_rows(NV);
}

// Kernel::run for a tile of `rows` by `vectors`, both only known at run time.
template <class Kernel, int NV, int... I>
auto tile_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr decltype(&Kernel::template run<1, 1>) table[] = {
      &Kernel::template run<NV, I + 1>...};
  return table[rows - 1];
}
template <class Kernel>
auto tile_for(int vectors, int rows) {
  switch (vectors) {
    case 1:
      return tile_of<Kernel, 1>(rows, std::make_integer_sequence<int, tallest<Kernel, 1>()>());
    case 2:
      return tile_of<Kernel, 2>(rows, std::make_integer_sequence<int, tallest<Kernel, 2>()>());
    case 3:
      return tile_of<Kernel, 3>(rows, std::make_integer_sequence<int, tallest<Kernel, 3>()>());
    default:
      return tile_of<Kernel, 4>(rows, std::make_integer_sequence<int, tallest<Kernel, 4>()>());
  }
}

template <class S, class F, int... I>
auto dot_for(int rows, std::integer_sequence<int, I...>) {
  static constexpr decltype(&Dot<S, F>::template run<1>) table[] = {
      &Dot<S, F>::template run<I + 1>...};
  return table[rows - 1];
}
template <class S, class F>
auto dot_for(int rows) {
  return dot_for<S, F>(rows, std::make_integer_sequence<int, Dot<S, F>::max_rows>());
}

// What the tile-th tile on a block prefetches: a part of `next`, the block that comes after it. The
// first `vectors` tiles cover it.
template <class F, class W>
const W* prefetch_target(const W* next, int64_t depth, int vectors, int64_t tile) {
  const int64_t part = packed_depth<F>(depth) * FactorGroup<F>::V::lanes;
  return next + (tile < vectors ? tile : 0) * part;
}

// The rows of a tile: row_of(r) for each of `count`, which is never 0.
template <class F>
struct TileRows {
  const F* rows[kMaxRows];

  template <class RowOf>
  [[gnu::always_inline]] TileRows(int count, RowOf row_of) {
    int r = 0;
    do rows[r] = row_of(r);
    while (++r < count);
  }
};

// Calls body(first, count, tile) for tiles of at most `height` rows that cover [begin, end) as
// evenly as can be.
template <class Body>
inline void for_each_tile(int64_t begin, int64_t end, int height, Body body) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  if (rows <= height) return body(begin, static_cast<int>(rows), 0);
  const int64_t tiles = (rows + height - 1) / height;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin + i * rows / tiles;
    body(first, static_cast<int>(begin + (i + 1) * rows / tiles - first), i);
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
