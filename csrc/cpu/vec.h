// Vec<T>: as many T as one register of this variant holds. Compiled once per instruction set; all
// names live in the variant's own namespace, so that the linker can never mix code of two
// instruction sets.
//
// Build flags: FASTRNN_VARIANT (namespace), FASTRNN_VECTOR_BYTES, FASTRNN_REGISTERS (vector
// registers).
#pragma once

#include <cstdint>
#include <cstring>

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

template <class T>
struct Vec {
  static constexpr int lanes = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Raw = typename Register<T>::Raw;
  using Int = typename Register<T>::Int;

  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  Vec(T value) : raw(value - Raw{}) {}  // x - 0 keeps the sign of zero, x + 0 would not

  static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v.raw, p, sizeof(Raw));
    return v;
  }
  void store(T* p) const { std::memcpy(p, &raw, sizeof(Raw)); }

  // The first `count` lanes only; the others read as zero and are not written.
  static Vec load(const T* p, int64_t count) {
    T lane[lanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
    return load(lane);
  }
  void store(T* p, int64_t count) const {
    T lane[lanes];
    store(lane);
    for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
  }

  friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend Vec operator-(Vec a) { return -a.raw; }
};

}  // namespace fastrnn::FASTRNN_VARIANT
