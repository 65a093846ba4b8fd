// Sums of products of 8-bit integers: each lane of 32 bits adds up the products of four successive
// k, which lie side by side in a lane of the weight and in a broadcast of a row.
//
// All of them are exact. Where the instruction multiplies unsigned by signed integers, either rows
// are stored with an offset of 128, which is taken back by 128 times the sum of the weight's row;
// or the sign of the row's integers goes to the weight: then a sum of two products, at most 2 *
// 127^2, fits into 16 bits.
#pragma once

#include "vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastrnn::FASTRNN_VARIANT {

using Int = Vec<float>::Int;

constexpr int kGroup = 4;  // k in a lane
constexpr int64_t groups_of(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

inline int32_t load_group(const uint8_t* row) {
  int32_t four;
  std::memcpy(&four, row, sizeof(four));
  return four;
}

// kOffset: what is added to a row's integers. Left and Right: four k of a row, and of a vector of
// columns of the weight, as multiply_add takes them. k*Registers: of a Left, a Right, and for what
// lies in between.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

constexpr int kOffset = 128;
struct Group {
  static constexpr int kLeftRegisters = 1, kRightRegisters = 1, kOtherRegisters = 0;
  using Left = Int;
  using Right = Int;
  static Left left(const uint8_t* row) { return Int{} + load_group(row); }
  static Right right(Int weight) { return weight; }
  static Int multiply_add(Int sum, Left row, Right weight) {
#if defined(__AVX512VNNI__)
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)weight);
#else
    return (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)row, (__m256i)weight);
#endif
  }
};

#elif defined(__AVX512BW__)

constexpr int kOffset = 0;
struct Group {
  static constexpr int kLeftRegisters = 1, kRightRegisters = 1, kOtherRegisters = 2;
  struct Left {
    __m512i magnitude;
    __mmask64 is_negative;
  };
  using Right = __m512i;
  static Left left(const uint8_t* row) {
    const __m512i four = _mm512_set1_epi32(load_group(row));
    return {_mm512_abs_epi8(four), _mm512_movepi8_mask(four)};
  }
  static Right right(Int weight) { return (__m512i)weight; }
  static Int multiply_add(Int sum, const Left& row, Right weight) {
    const __m512i with_sign =
        _mm512_mask_sub_epi8(weight, row.is_negative, _mm512_setzero_si512(), weight);
    const __m512i pairs = _mm512_maddubs_epi16(row.magnitude, with_sign);
    return sum + (Int)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
};

#elif defined(__AVX2__)

constexpr int kOffset = 0;
struct Group {
  static constexpr int kLeftRegisters = 2, kRightRegisters = 1, kOtherRegisters = 2;
  struct Left {
    __m256i value, magnitude;
  };
  using Right = __m256i;
  static Left left(const uint8_t* row) {
    const __m256i four = _mm256_set1_epi32(load_group(row));
    return {four, _mm256_abs_epi8(four)};
  }
  static Right right(Int weight) { return (__m256i)weight; }
  static Int multiply_add(Int sum, const Left& row, Right weight) {
    const __m256i with_sign = _mm256_sign_epi8(weight, row.value);
    const __m256i pairs = _mm256_maddubs_epi16(row.magnitude, with_sign);
    return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int kOffset = 0;
struct Group {
  static constexpr int kLeftRegisters = 1, kRightRegisters = 1, kOtherRegisters = 0;
  using Left = Int;
  using Right = Int;
  static Left left(const uint8_t* row) { return Int{} + load_group(row); }
  static Right right(Int weight) { return weight; }
  static Int multiply_add(Int sum, Left row, Right weight) {
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)weight, (int8x16_t)row);
  }
};

#else

// In 16 bits, the first and third k apart from the others.
constexpr int kOffset = 0;
struct Group {
  static constexpr int kLeftRegisters = 2, kRightRegisters = 2, kOtherRegisters = 1;
  typedef int16_t Halves __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  struct Left {
    Halves even, odd;
  };
  using Right = Left;
  static Left left(const uint8_t* row) { return right(Int{} + load_group(row)); }
  static Right right(Int weight) {
    const Halves halves = (Halves)weight;
    return {(halves << 8) >> 8, halves >> 8};
  }
  static Int multiply_add(Int sum, const Left& row, const Right& weight) {
#if defined(__SSE2__)
    sum += (Int)_mm_madd_epi16((__m128i)row.even, (__m128i)weight.even);
    return sum + (Int)_mm_madd_epi16((__m128i)row.odd, (__m128i)weight.odd);
#else
    const Halves pairs = row.even * weight.even + row.odd * weight.odd;  // at most 2 * 127^2
#if defined(__ARM_NEON)
    return (Int)vpadalq_s16((int32x4_t)sum, (int16x8_t)pairs);
#else
    const Int both = (Int)pairs;
    return sum + ((both << 16) >> 16) + (both >> 16);
#endif
#endif
  }
};

#endif

}  // namespace fastrnn::FASTRNN_VARIANT
