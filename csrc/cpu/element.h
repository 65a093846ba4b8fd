// The element types of tensors and the type each is computed in: 16-bit floats are only stored,
// every sum and every state carried from step to step is in float.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastrnn::FASTRNN_VARIANT {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

// The type of the factors of a product of tensors of S, whose sums are Compute<S>.
template <class S>
struct FactorOf {
  using Type = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<BFloat16> {
  using Type = BFloat16;
};
#endif
template <class S>
using Factor = typename FactorOf<S>::Type;

template <class To, class From>
[[gnu::always_inline]] inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The conversions below work on bits, for U = uint32_t and F = float as for vectors of them.
// Narrowing rounds to nearest, ties to even.

template <class F, class U>
[[gnu::always_inline]] inline F widen_bits(BFloat16, U bits) {
  return bits_as<F>(bits << 16);
}

template <class F, class U>
[[gnu::always_inline]] inline U narrow_bits(BFloat16, F value) {
  const U bits = bits_as<U>(value);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40;
  return (bits & 0x7fffffff) > U{} + 0x7f800000 ? quiet_nan : rounded;
}

template <class F, class U>
[[gnu::always_inline]] inline F widen_bits(Float16, U bits) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kLeastNormal = 1 << 23, kInfinity = 31 << 23;
  constexpr uint32_t kTiny = kRebias + kLeastNormal;  // 2^-14, the least normal number
  const U magnitude = (bits & 0x7fff) << 13;
  const U normal = magnitude + kRebias;
  const U special = magnitude + 2 * kRebias;
  // The mantissa of a subnormal counts in units of the last place of 2^-14.
  const U subnormal = bits_as<U>(bits_as<F>(magnitude + kTiny) - bits_as<F>(U{} + kTiny));
  U result = magnitude >= U{} + kInfinity ? special : normal;
  result = magnitude < U{} + kLeastNormal ? subnormal : result;
  return bits_as<F>(result | ((bits & 0x8000) << 16));
}

template <class F, class U>
[[gnu::always_inline]] inline U narrow_bits(Float16, F value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  constexpr uint32_t kTiny = kRebias + (1 << 23), kHuge = (127 + 16) << 23;
  constexpr uint32_t kHalf = 126 << 23;  // its last place is that of half-precision subnormals
  const U bits = bits_as<U>(value), magnitude = bits & 0x7fffffff;
  const U normal = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U subnormal = bits_as<U>(bits_as<F>(magnitude) + bits_as<F>(U{} + kHalf)) - kHalf;
  const U special = magnitude > U{} + 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
  U result = magnitude < U{} + kTiny ? subnormal : normal;
  result = magnitude >= U{} + kHuge ? special : result;
  return result | ((bits >> 16) & 0x8000);
}

// One element into another type that is computed in the same one.
template <class E>
inline void convert(E from, E& to) {
  to = from;
}
inline void convert(BFloat16 from, float& to) { to = widen_bits<float>(from, uint32_t{from.bits}); }
inline void convert(Float16 from, float& to) {
#if defined(__F16C__)
  to = _cvtsh_ss(from.bits);
#else
  to = widen_bits<float>(from, uint32_t{from.bits});
#endif
}

}  // namespace fastrnn::FASTRNN_VARIANT
