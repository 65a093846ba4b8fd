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

// e^x for x in [min, max], and beyond what it is there.
template <class T>
[[gnu::always_inline]] inline Vec<T> clamped_exp(Vec<T> x) {
  Vec<T> scale, fraction;
  split_exp(clamp(x, ExpConstants<T>::min, ExpConstants<T>::max), scale, fraction);
  return scale * fraction + scale;
}

template <class T>
[[gnu::always_inline]] inline Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + clamped_exp(-x));
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

// What follows is for cells of the user's own; relu is for both.

template <class T>
[[gnu::always_inline]] inline Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V e = clamped_exp(x);
  return where(x > V(C::max), V(T(__builtin_inf())), where(x < V(C::min), V(T(0)), e));
}

template <class T>
[[gnu::always_inline]] inline Vec<T> expm1(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  V scale, fraction;
  split_exp(clamp(x, C::min, C::max), scale, fraction);
  const V e = scale * fraction + (scale - V(T(1)));
  return where(x > V(C::max), V(T(__builtin_inf())), e);
}

// x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), of
// which the series is summed up.
template <class T>
[[gnu::always_inline]] inline Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  constexpr int terms = sizeof(T) == 4 ? 6 : 11;
  constexpr T tiny = sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308);
  constexpr T scale = sizeof(T) == 4 ? T(1 << 24) : T(int64_t{1} << 54);
  constexpr int shift = sizeof(T) == 4 ? 24 : 54;
  const auto small = x < V(tiny);  // a subnormal number
  const V scaled = where(small, x * V(scale), x);
  typename V::Int bits;
  std::memcpy(&bits, &scaled.raw, sizeof(bits));
  const typename V::Int exponent = (bits >> C::mantissa) - C::bias;
  bits = bits - (exponent << C::mantissa);
  V m;
  std::memcpy(&m.raw, &bits, sizeof(bits));
  const auto large = m > V(T(1.4142135623730951));
  m = where(large, m * V(T(0.5)), m);
  V n = typename V::Raw(__builtin_convertvector(exponent, typename V::Raw));
  n = where(large, n + V(T(1)), n);
  n = where(small, n - V(T(shift)), n);
  const V f = m - V(T(1)), s = f / (f + V(T(2))), z = s * s;
  V sum(T(0));
#pragma GCC unroll 16
  for (int i = terms; i > 0; --i) sum = (sum + V(T(2.0 / (2 * i + 1)))) * z;
  // log(m) = f - s * (f - sum), which loses less than 2 s + s * sum
  const V result = n * V(C::ln2_high) + (f - s * (f - sum) + n * V(C::ln2_low));
  const V infinity = V(T(__builtin_inf()));
  const V of_bad = where(x == V(T(0)), -infinity, V(T(__builtin_nan(""))));
  return where(x > V(T(0)), where(x == infinity, infinity, result), of_bad);
}

// By log(u) with u = 1 + x, and what was lost in this sum.
template <class T>
[[gnu::always_inline]] inline Vec<T> log1p(Vec<T> x) {
  using V = Vec<T>;
  const V u = V(T(1)) + x, by_quotient = log(u) * x / (u - V(T(1)));
  return where(u == V(T(1)), x, where(u == V(T(__builtin_inf())), u, by_quotient));
}

// A function of single numbers, lane by lane.
template <class T, class F>
[[gnu::always_inline]] inline Vec<T> by_lane(Vec<T> x, F function) {
  T lane[Vec<T>::lanes];
  x.store(lane);
  for (T& value : lane) value = function(value);
  return Vec<T>::load(lane);
}

template <class T>
[[gnu::always_inline]] inline Vec<T> sqrt(Vec<T> x) {
  return by_lane(x, [](T v) { return T(sizeof(T) == 4 ? __builtin_sqrtf(v) : __builtin_sqrt(v)); });
}
template <class T>
[[gnu::always_inline]] inline Vec<T> rsqrt(Vec<T> x) {
  return Vec<T>(T(1)) / sqrt(x);
}
template <class T>
inline Vec<T> sin(Vec<T> x) {
  return by_lane(x, [](T v) { return T(sizeof(T) == 4 ? __builtin_sinf(v) : __builtin_sin(v)); });
}
template <class T>
inline Vec<T> cos(Vec<T> x) {
  return by_lane(x, [](T v) { return T(sizeof(T) == 4 ? __builtin_cosf(v) : __builtin_cos(v)); });
}
template <class T>
inline Vec<T> erf(Vec<T> x) {
  return by_lane(x, [](T v) { return T(sizeof(T) == 4 ? __builtin_erff(v) : __builtin_erf(v)); });
}
template <class T>
inline Vec<T> pow(Vec<T> x, Vec<T> exponent) {
  T powers[Vec<T>::lanes];
  exponent.store(powers);
  const T power = powers[0];  // the exponent is a number
  return by_lane(x, [power](T v) {
    return T(sizeof(T) == 4 ? __builtin_powf(v, power) : __builtin_pow(v, power));
  });
}

template <class T>
[[gnu::always_inline]] inline Vec<T> abs(Vec<T> x) {
  return where(x < Vec<T>(T(0)), -x, x + Vec<T>(T(0)));  // the sum makes zero of -0
}
template <class T>
[[gnu::always_inline]] inline Vec<T> sign(Vec<T> x) {
  using V = Vec<T>;
  return where(x > V(T(0)), V(T(1)), where(x < V(T(0)), V(T(-1)), V(T(0))));
}
// NaN where either is NaN.
template <class T>
[[gnu::always_inline]] inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return where((a > b) | (a != a), a, b);
}
template <class T>
[[gnu::always_inline]] inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return where((a < b) | (a != a), a, b);
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
