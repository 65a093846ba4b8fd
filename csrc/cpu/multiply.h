// The hot loop: a register tile of a matrix product, MR rows by NV vectors of columns.
//
// The MR * NV sums stay in registers for the whole of the depth; each step loads NV vectors of the
// packed right side and broadcasts MR scalars of the left one for MR * NV multiply-adds. (Of 16-bit
// factors, where the processor multiplies them in pairs, a step takes two.) Meanwhile
// one cache line of `later` a step is brought to L2: weights of large layers come from farther
// away, and the hardware does not know which come next.
#pragma once

#include <utility>

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 8;

// The tallest tile that leaves registers for NV vectors and one broadcast.
constexpr int max_rows(int vectors) {
  const int rows = (FASTRNN_REGISTERS - vectors - 1) / vectors;
  return rows < kMaxRows ? rows : kMaxRows;
}

// How a step takes factors of type F: `values` of k at a time, which lie side by side on the left
// and in each lane on the right.
template <class F>
struct Step {
  using V = Vec<F>;
  static constexpr int values = 1;
  static V broadcast(const F* left) { return V(*left); }
  static V load(const F* right) { return V::load(right); }
  static V multiply_add(V sum, V left, V right) { return sum + left * right; }
};
#if defined(__AVX512BF16__)
template <>
struct Step<BFloat16> {
  using V = Vec<float>;
  static constexpr int values = 2;
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

// The depth of a packed weight: a whole number of steps. Rows on the left need as many values, any
// finite ones beyond their end.
template <class F>
constexpr int64_t packed_depth(int64_t depth) {
  return (depth + Step<F>::values - 1) / Step<F>::values * Step<F>::values;
}

// acc[r][v] += sum over k of left(r, k) * packed[k][v].
template <class F, int NV, int MR, class Left>
[[gnu::always_inline]] inline void multiply_add(Vec<Compute<F>> (&acc)[MR][NV], Left left,
                                                const F* packed, const F* later, int64_t depth) {
  using Factors = Step<F>;
  constexpr int line = Factors::V::lanes * Factors::values;
  for (int64_t k = 0; k < depth; k += Factors::values, packed += NV * line, later += line) {
    __builtin_prefetch(later, 0, 2);
    decltype(Factors::load(packed)) w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = Factors::load(packed + v * line);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const auto a = Factors::broadcast(left(r, k));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Factors::multiply_add(acc[r][v], a, w[v]);
    }
  }
}

// sums[r][v] = sum over k of rows[r][k] * packed[k][v].
template <class F>
struct Multiply {
  using V = Vec<Compute<F>>;
  template <int NV, int MR>
  static void run(const F* const* rows, const F* packed, const F* later, int64_t depth, V* sums) {
    V acc[MR][NV];
    const F* row[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      row[r] = rows[r];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V(0);
    }
    multiply_add(acc, [&row](int r, int64_t k) { return row[r] + k; }, packed, later, depth);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r * NV + v] = acc[r][v];
  }
};

// target[r][v] += sum over k of columns[k * stride + r] * packed[k][v]: a product with the left
// side transposed, added to what is there. Where a step takes two values of k, two rows on the left
// are zipped: columns[k / 2 * 2 * stride + 2 * r + k % 2].
template <class F>
struct Accumulate {
  using T = Compute<F>;
  template <int NV, int MR>
  static void run(const F* columns, int64_t stride, const F* packed, int64_t depth, T* target) {
    using V = Vec<T>;
    V acc[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V(T(0));
    multiply_add(
        acc,
        [columns, stride](int r, int64_t k) { return columns + k * stride + r * Step<F>::values; },
        packed, reinterpret_cast<const F*>(target), depth);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* p = target + (r * NV + v) * V::lanes;
        (V::load(p) + acc[r][v]).store(p);
      }
  }
};

// Lane i of the result is the sum over the lanes of a[i]. Halves are folded onto each other, those
// of two vectors at a time, until one vector is left.
template <class T, int W, int... I>
[[gnu::always_inline]] inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int lanes = Vec<T>::lanes;
  const auto low = __builtin_shufflevector(a.raw, b.raw, (I & W ? lanes + I - W : I)...);
  const auto high = __builtin_shufflevector(a.raw, b.raw, (I & W ? lanes + I : I + W)...);
  return Vec<T>(low + high);
}
template <class T, int W = Vec<T>::lanes / 2>
[[gnu::always_inline]] inline Vec<T> sum_lanes(Vec<T>* a) {
  if constexpr (W == 0) {
    return a[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < W; ++i) {
      a[i] = fold<T, W>(a[i], a[i + W], std::make_integer_sequence<int, Vec<T>::lanes>());
    }
    return sum_lanes<T, W / 2>(a);
  }
}

// Lane i of the result is row i of `weight`, which has `count` of them, times `row`. For so few
// rows that packing the weights would take longer than the product.
template <class S, class F>
Vec<Compute<S>> multiply_unpacked(const F* row, const S* weight, int64_t count, int64_t depth) {
  using T = Compute<S>;
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const S* from[lanes];
  V acc[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    from[i] = weight + (i < count ? i : count - 1) * depth;
    acc[i] = V(T(0));
  }
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    const V a = V::load(row + k);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) acc[i] = acc[i] + a * V::load(from[i] + k);
  }
  if (k < depth) {
    const V a = V::load(row + k, depth - k);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) acc[i] = acc[i] + a * V::load(from[i] + k, depth - k);
  }
  return sum_lanes<T>(acc);
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
      return tile_of<Kernel, 1>(rows, std::make_integer_sequence<int, max_rows(1)>());
    case 2:
      return tile_of<Kernel, 2>(rows, std::make_integer_sequence<int, max_rows(2)>());
    case 3:
      return tile_of<Kernel, 3>(rows, std::make_integer_sequence<int, max_rows(3)>());
    default:
      return tile_of<Kernel, 4>(rows, std::make_integer_sequence<int, max_rows(4)>());
  }
}

// What the tile-th tile on a block brings nearer: a part of the block that follows in memory. The
// first NV tiles cover it.
template <class F>
const F* later_of(const F* packed, int64_t depth, int vectors, int64_t tile) {
  const int64_t part = packed_depth<F>(depth) * Step<F>::V::lanes;
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
