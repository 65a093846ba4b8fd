// Vec<T>: as many T as one register of this variant holds. Compiled once per instruction set; all
// names live in the variant's own namespace, so that the linker can never mix code of two
// instruction sets.
//
// Build flags: FASTRNN_VARIANT (namespace), FASTRNN_VECTOR_BYTES, FASTRNN_REGISTERS (vector
// registers).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "element.h"

namespace fastrnn::FASTRNN_VARIANT {

// The compiler's vector types, spelled out per T: gcc mishandles the attribute on a dependent type.
template <class T>
struct Register;
template <>
struct Register<float> {
  typedef float Raw __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct Register<double> {
  typedef double Raw __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
typedef uint32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));

template <class T>
struct Vec {
  static constexpr int lanes = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Raw = typename Register<T>::Raw;
  using Int = typename Register<T>::Int;

  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  Vec(T value) : raw(value - Raw{}) {}  // x - 0 keeps the sign of zero, x + 0 would not

  // From and to memory of any element type that is computed in T.
  template <class S>
  static Vec load(const S* p) {
    static_assert(std::is_same_v<Compute<S>, T>);
    if constexpr (std::is_same_v<S, T>) {
      Vec v;
      std::memcpy(&v.raw, p, sizeof(Raw));
      return v;
    } else {
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<S, Float16>) {
        return (Raw)_mm512_maskz_cvtph_ps(0xffff,
                                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      }
#elif defined(__F16C__)
      if constexpr (std::is_same_v<S, Float16>) {
        return (Raw)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      }
#endif
      HalfWords bits;
      std::memcpy(&bits, p, sizeof(bits));
      return widen_bits<Raw>(S{}, __builtin_convertvector(bits, Words));
    }
  }
  template <class S>
  void store(S* p) const {
    static_assert(std::is_same_v<Compute<S>, T>);
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(p, &raw, sizeof(Raw));
    } else {
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<S, Float16>) {
        const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)raw, _MM_FROUND_TO_NEAREST_INT);
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
      }
#elif defined(__F16C__)
      if constexpr (std::is_same_v<S, Float16>) {
        const __m128i half = _mm256_cvtps_ph((__m256)raw, _MM_FROUND_TO_NEAREST_INT);
        return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
      }
#endif
      const HalfWords bits =
          __builtin_convertvector((narrow_bits<Raw, Words>(S{}, raw)), HalfWords);
      std::memcpy(p, &bits, sizeof(bits));
    }
  }

  // The first `count` lanes only; the others read as zero and are not written.
  template <class S>
  static Vec load(const S* p, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) return (Raw)_mm512_maskz_loadu_ps(mask(count), p);
    if constexpr (std::is_same_v<S, double>) return (Raw)_mm512_maskz_loadu_pd(mask(count), p);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<S, float>)
      return (Raw)_mm256_maskload_ps(p, (__m256i)first(count));
    if constexpr (std::is_same_v<S, double>)
      return (Raw)_mm256_maskload_pd(p, (__m256i)first(count));
#endif
    S lane[lanes] = {};
    std::memcpy(lane, p, count * sizeof(S));
    return load(lane);
  }
  template <class S>
  void store(S* p, int64_t count) const {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>)
      return _mm512_mask_storeu_ps(p, mask(count), (__m512)raw);
    if constexpr (std::is_same_v<S, double>)
      return _mm512_mask_storeu_pd(p, mask(count), (__m512d)raw);
#endif
    S lane[lanes];
    store(lane);
    std::memcpy(p, lane, count * sizeof(S));
  }

  // A mask of the first `count` lanes.
  static Int first(int64_t count) {
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    static constexpr Lane numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(lanes <= 16);
    Int lane;
    std::memcpy(&lane, numbers, sizeof(lane));
    return lane < Int{} + static_cast<Lane>(count);
  }

  friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend Vec operator-(Vec a) { return -a.raw; }

  // Masks: all bits of a lane, or none. They combine by &, | and !.
  friend Int operator<(Vec a, Vec b) { return a.raw < b.raw; }
  friend Int operator<=(Vec a, Vec b) { return a.raw <= b.raw; }
  friend Int operator>(Vec a, Vec b) { return a.raw > b.raw; }
  friend Int operator>=(Vec a, Vec b) { return a.raw >= b.raw; }
  friend Int operator==(Vec a, Vec b) { return a.raw == b.raw; }
  friend Int operator!=(Vec a, Vec b) { return a.raw != b.raw; }
  friend Vec where(Int mask, Vec a, Vec b) { return mask ? a.raw : b.raw; }

 private:
  static uint16_t mask(int64_t count) { return static_cast<uint16_t>((1 << count) - 1); }
};

// The smaller and the greater one; b where either is NaN. The compiler does not see by itself that
// these are single instructions. (With a mask: gcc warns of the plain ones.)
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  using Raw = typename Vec<T>::Raw;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (Raw)_mm512_maskz_min_ps(0xffff, (__m512)a.raw, (__m512)b.raw);
  } else {
    return (Raw)_mm512_maskz_min_pd(0xff, (__m512d)a.raw, (__m512d)b.raw);
  }
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    return (Raw)_mm256_min_ps((__m256)a.raw, (__m256)b.raw);
  } else {
    return (Raw)_mm256_min_pd((__m256d)a.raw, (__m256d)b.raw);
  }
#else
  return Raw(a.raw < b.raw ? a.raw : b.raw);
#endif
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  using Raw = typename Vec<T>::Raw;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (Raw)_mm512_maskz_max_ps(0xffff, (__m512)a.raw, (__m512)b.raw);
  } else {
    return (Raw)_mm512_maskz_max_pd(0xff, (__m512d)a.raw, (__m512d)b.raw);
  }
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    return (Raw)_mm256_max_ps((__m256)a.raw, (__m256)b.raw);
  } else {
    return (Raw)_mm256_max_pd((__m256d)a.raw, (__m256d)b.raw);
  }
#else
  return Raw(a.raw > b.raw ? a.raw : b.raw);
#endif
}

// Its lanes are those of a and b, one after the other, whose numbers are I.
template <int... I, class T>
[[gnu::always_inline]] inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a.raw, b.raw, I...);
#else  // gcc 11
  return __builtin_shuffle(a.raw, b.raw, typename Vec<T>::Int{I...});
#endif
}

// Zero beyond the first `count` lanes, fewer than all, where products with packed zeros may have
// left NaN.
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int64_t count) {
  return where(Vec<T>::first(count), v, Vec<T>(T(0)));
}

// A vector of a row of which `left` elements follow from p on, mostly more than there are lanes.
template <class S>
[[gnu::always_inline]] inline Vec<Compute<S>> load_lanes(const S* p, int64_t left) {
  using V = Vec<Compute<S>>;
  return left < V::lanes ? V::load(p, left) : V::load(p);
}
template <class T, class S>
[[gnu::always_inline]] inline void store_lanes(Vec<T> value, S* p, int64_t left) {
  left < Vec<T>::lanes ? value.store(p, left) : value.store(p);
}

// to[i] = join(a[i], b[i]), rounded to S.
template <class S, class Join>
[[gnu::noinline]] void join_each(const S* a, const S* b, S* to, int64_t count, Join join) {
  for (int64_t i = 0; i < count; i += Vec<Compute<S>>::lanes) {
    const int64_t left = count - i;
    store_lanes(join(load_lanes(a + i, left), load_lanes(b + i, left)), to + i, left);
  }
}

// Copies `count` elements from one element type into another that is computed in the same one.
template <class From, class To>
[[gnu::noinline]] void convert_each(const From* from, To* to, int64_t count) {
  using V = Vec<Compute<From>>;
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) V::load(from + i).store(to + i);
  if (i < count) V::load(from + i, count - i).store(to + i, count - i);
}
template <class From, class To>
inline void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    if (count > 0) std::memcpy(to, from, count * sizeof(To));
  } else {
    convert_each(from, to, count);
  }
}

}  // namespace fastrnn::FASTRNN_VARIANT
