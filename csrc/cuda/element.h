// The element types of tensors, the type each is computed in, and the value type of the cells.
#pragma once

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
  FASTRNN_DEVICE explicit constexpr Scalar(T v) : value(v) {}
  FASTRNN_DEVICE explicit constexpr Scalar(int v) : value(static_cast<T>(v)) {}
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
