// The element types of tensors, the type each is computed in, and the value type of the cells.
#pragma once

#include <cmath>
#include <type_traits>

#include "intrinsics.h"

namespace fastrnn::cuda {

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

template <class S, class T>
FASTRNN_DEVICE S narrowed(T value) {
  S result;
  narrow(value, result);
  return result;
}

// Not before this point of the program, as it waits for a value that is being loaded.
template <class S>
FASTRNN_DEVICE Compute<S> widen_now(S value) {
  pin(value);
  return widen(value);
}

// One unit of one row, as the cells in ../cells see it. Sigmoid and tanh are exact to some ulp, or,
// for results that are rounded to 16 bits, off by 1e-6 at most.
template <class T, bool Approximate = false>
struct Scalar {
  T value;
  Scalar() = default;
  template <class Number>
    requires std::is_arithmetic_v<Number>
  FASTRNN_DEVICE explicit constexpr Scalar(Number v) : value(static_cast<T>(v)) {}
  FASTRNN_DEVICE friend Scalar operator+(Scalar a, Scalar b) { return Scalar(a.value + b.value); }
  FASTRNN_DEVICE friend Scalar operator-(Scalar a, Scalar b) { return Scalar(a.value - b.value); }
  FASTRNN_DEVICE friend Scalar operator*(Scalar a, Scalar b) { return Scalar(a.value * b.value); }
  FASTRNN_DEVICE friend Scalar sigmoid(Scalar a) {
    if constexpr (Approximate) {
      return Scalar(approximate_sigmoid(a.value));
    } else {
      return Scalar(T(1) / (T(1) + exp_(-a.value)));
    }
  }
  FASTRNN_DEVICE friend Scalar tanh(Scalar a) {
    if constexpr (Approximate) {
      return Scalar(2 * approximate_sigmoid(2 * a.value) - 1);
    } else {
      return Scalar(tanh_(a.value));
    }
  }
  // NaN stays.
  FASTRNN_DEVICE friend Scalar relu(Scalar a) { return a.value < T(0) ? Scalar(0) : a; }
  FASTRNN_DEVICE friend Scalar relu_derivative(Scalar h) { return Scalar(h.value <= T(0) ? 0 : 1); }

  // What follows is for cells of the user's own, as in ../cpu/vec.h and ../cpu/math.h.
  FASTRNN_DEVICE friend Scalar operator/(Scalar a, Scalar b) { return Scalar(a.value / b.value); }
  FASTRNN_DEVICE friend Scalar operator-(Scalar a) { return Scalar(-a.value); }
  FASTRNN_DEVICE friend bool operator<(Scalar a, Scalar b) { return a.value < b.value; }
  FASTRNN_DEVICE friend bool operator<=(Scalar a, Scalar b) { return a.value <= b.value; }
  FASTRNN_DEVICE friend bool operator>(Scalar a, Scalar b) { return a.value > b.value; }
  FASTRNN_DEVICE friend bool operator>=(Scalar a, Scalar b) { return a.value >= b.value; }
  FASTRNN_DEVICE friend bool operator==(Scalar a, Scalar b) { return a.value == b.value; }
  FASTRNN_DEVICE friend bool operator!=(Scalar a, Scalar b) { return a.value != b.value; }
  FASTRNN_DEVICE friend Scalar where(bool mask, Scalar a, Scalar b) { return mask ? a : b; }
  // b where either is NaN.
  FASTRNN_DEVICE friend Scalar min(Scalar a, Scalar b) { return a.value < b.value ? a : b; }
  FASTRNN_DEVICE friend Scalar max(Scalar a, Scalar b) { return a.value > b.value ? a : b; }
  // NaN where either is NaN.
  FASTRNN_DEVICE friend Scalar minimum(Scalar a, Scalar b) { return a < b || a != a ? a : b; }
  FASTRNN_DEVICE friend Scalar maximum(Scalar a, Scalar b) { return a > b || a != a ? a : b; }
  FASTRNN_DEVICE friend Scalar abs(Scalar a) { return Scalar(std::fabs(a.value)); }
  FASTRNN_DEVICE friend Scalar sign(Scalar a) { return Scalar((a.value > 0) - (a.value < 0)); }
  FASTRNN_DEVICE friend Scalar exp(Scalar a) { return Scalar(exp_(a.value)); }
  FASTRNN_DEVICE friend Scalar expm1(Scalar a) { return Scalar(std::expm1(a.value)); }
  FASTRNN_DEVICE friend Scalar log(Scalar a) { return Scalar(std::log(a.value)); }
  FASTRNN_DEVICE friend Scalar log1p(Scalar a) { return Scalar(std::log1p(a.value)); }
  FASTRNN_DEVICE friend Scalar sqrt(Scalar a) { return Scalar(std::sqrt(a.value)); }
  FASTRNN_DEVICE friend Scalar rsqrt(Scalar a) { return Scalar(T(1) / std::sqrt(a.value)); }
  FASTRNN_DEVICE friend Scalar sin(Scalar a) { return Scalar(std::sin(a.value)); }
  FASTRNN_DEVICE friend Scalar cos(Scalar a) { return Scalar(std::cos(a.value)); }
  FASTRNN_DEVICE friend Scalar erf(Scalar a) { return Scalar(std::erf(a.value)); }
  FASTRNN_DEVICE friend Scalar pow(Scalar a, Scalar b) {
    return Scalar(std::pow(a.value, b.value));
  }

 private:
  FASTRNN_DEVICE static float approximate_sigmoid(float x) {
    constexpr float log2_e = 1.44269504f;
    return reciprocal_approximate(1 + exp2_approximate(-log2_e * x));
  }
};

// What the cells compute with, for elements S.
template <class S>
using Value = Scalar<Compute<S>, sizeof(S) == 2>;

// The elements of 16 bytes, in the type they are computed in.
template <class S>
struct Widened {
  static constexpr int count = 16 / sizeof(S);
  Compute<S> values[count];
  FASTRNN_DEVICE explicit Widened(Vector16 bits) {
    S elements[count];
    __builtin_memcpy(elements, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = widen(elements[i]);
  }
};

}  // namespace fastrnn::cuda
