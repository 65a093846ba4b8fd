// exp, sigmoid and tanh over Vec. Errors are measured by tests/test_math.py against 80-bit
// arithmetic:
//   float:  exp, sigmoid and tanh within 4 ulp;  double: within 4 ulp.
// NaN goes through; beyond the range of T, exp stays at the largest or smallest normal power it can
// make.
#pragma once

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class T>
struct ExpConstants;

// e^r - 1 = r + r^2 * q(r) on |r| <= ln(2)/2; q interpolates at Chebyshev nodes.
template <>
struct ExpConstants<float> {
  static constexpr float q[] = {0.5f, 0.166665767f, 0.0416665542f, 0.00836323288f, 0.00139262508f};
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  static constexpr float max = 88.0f, min = -87.0f;
  static constexpr float tanh_is_one = 9.1f;
  static constexpr int bias = 127, mantissa = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double q[] = {0.500000000000000103,     0.166666666666666675,
                                 0.0416666666666238205,    0.0083333333333300382,
                                 0.00138888889173670806,   0.00019841269863171556,
                                 0.0000248015210578682052, 2.75572682769056962e-6,
                                 2.76202015910315488e-7,   2.5100472505694996e-8};
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double max = 708.0, min = -708.0;
  static constexpr double tanh_is_one = 19.1;
  static constexpr int bias = 1023, mantissa = 52;
};

template <class T>
[[gnu::always_inline]] inline Vec<T> clamp(Vec<T> x, T low, T high) {
  return min(Vec<T>(high), max(Vec<T>(low), x));
}

// x = n ln(2) + r with |r| <= ln(2)/2. Gives scale = 2^n and fraction = e^r - 1, so that both e^x
// and e^x - 1 follow without cancellation. x must lie in [min, max].
template <class T>
[[gnu::always_inline]] inline void split_exp(Vec<T> x, Vec<T>& scale, Vec<T>& fraction) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V shifted = x * V(C::log2_e) + V(C::round);
  const V n = shifted - V(C::round);
  const V r = (x - n * V(C::ln2_high)) - n * V(C::ln2_low);
  constexpr int degree = sizeof(C::q) / sizeof(T) - 1;
  V q = V(C::q[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) q = q * r + V(C::q[i]);
  fraction = q * (r * r) + r;
  typename V::Int bits;  // the low bits of `shifted` are n in two's complement
  std::memcpy(&bits, &shifted.raw, sizeof(bits));
  bits = (bits + C::bias) << C::mantissa;
  std::memcpy(&scale.raw, &bits, sizeof(bits));
}

template <class T>
[[gnu::always_inline]] inline Vec<T> exp(Vec<T> x) {
  Vec<T> scale, fraction;
  split_exp(clamp(x, ExpConstants<T>::min, ExpConstants<T>::max), scale, fraction);
  return scale * fraction + scale;
}

template <class T>
[[gnu::always_inline]] inline Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// tanh(x) = (e^2x - 1) / (e^2x + 1)
template <class T>
[[gnu::always_inline]] inline Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  constexpr T one = ExpConstants<T>::tanh_is_one;
  x = clamp(x, -one, one);
  V scale, fraction;
  split_exp(x + x, scale, fraction);
  const V e = scale * fraction + (scale - V(T(1)));
  return e / (e + V(T(2)));
}

template <class T>
[[gnu::always_inline]] inline Vec<T> relu(Vec<T> x) {
  using Raw = typename Vec<T>::Raw;
  return x.raw < Raw{} ? Raw{} : x.raw;  // NaN stays
}

template <class T>
[[gnu::always_inline]] inline Vec<T> relu_derivative(Vec<T> h) {
  using Raw = typename Vec<T>::Raw;
  const Raw zero = {}, one = Vec<T>(T(1)).raw;
  return h.raw <= zero ? zero : one;
}

}  // namespace fastrnn::FASTRNN_VARIANT
