// Rows of inputs and states as integers of 8 bits: q = round(v * (127 / max |v|)), ties to even.
#pragma once

#include "columns.h"
#include "int8_group.h"

namespace fastrnn::FASTRNN_VARIANT {

// A quantised row: the integers of whole groups, and after them the scale.
class Int8Rows {
 public:
  explicit Int8Rows(int64_t depth)
      : stride(odd_lines<uint8_t>(groups_of(depth) * kGroup + int64_t{sizeof(float)})),
        depth_(depth) {}

  const int64_t stride;  // in bytes

  // Null: zeros.
  void quantize(const float* row, uint8_t* to) const {
    const int64_t end = groups_of(depth_) * kGroup;
    if (row == nullptr) {
      std::memset(to, kOffset, end);
      return set_scale(0, to);
    }
    const float largest = largest_of(row);
    float scale = largest / 127, inverse = 127 / largest;
    if (largest < kLeast) scale = inverse = 0;
    if (!(largest <= kMost)) {  // NaN, which the scale hands on
      scale = __builtin_nanf("");
      inverse = 0;
    }
    int64_t i = 0;
    for (; i + V::lanes <= depth_; i += V::lanes) {
      const Bytes bytes = integers(V::load(row + i), inverse);
      std::memcpy(to + i, &bytes, sizeof(bytes));
    }
    if (i < depth_) {
      uint8_t bytes[V::lanes];
      const Bytes last = integers(V::load(row + i, depth_ - i), inverse);
      std::memcpy(bytes, &last, sizeof(last));
      for (int64_t j = 0; i + j < depth_; ++j) to[i + j] = bytes[j];
    }
    for (i = depth_; i < end; ++i) to[i] = 0;
    set_scale(scale, to);
  }

 private:
  using V = Vec<float>;
  typedef uint8_t Bytes __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 4)));

  // Smaller rows count as zero: 127 / max |v| would be infinite before long.
  static constexpr float kLeast = 0x1p-100f, kMost = 0x1.fffffep127f;

  const int64_t depth_;

  void set_scale(float scale, uint8_t* to) const {
    std::memcpy(to + groups_of(depth_) * kGroup, &scale, sizeof(scale));
  }

  // As bits, so that NaN is the greatest of all.
  float largest_of(const float* row) const {
    constexpr int chains = 4;
    Int most[chains] = {};
    const auto take = [](Int& sofar, V v) {
      const Int bits = bits_as<Int>(v.raw) & 0x7fffffff;
      sofar = bits > sofar ? bits : sofar;
    };
    int64_t i = 0;
    for (; i + chains * V::lanes <= depth_; i += chains * V::lanes) {
#pragma GCC unroll 4
      for (int k = 0; k < chains; ++k) take(most[k], V::load(row + i + k * V::lanes));
    }
    for (; i + V::lanes <= depth_; i += V::lanes) take(most[0], V::load(row + i));
    if (i < depth_) take(most[0], V::load(row + i, depth_ - i));
    for (int k = 1; k < chains; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
    int32_t lane[V::lanes], largest = 0;
    std::memcpy(lane, &most[0], sizeof(lane));
    for (const int32_t bits : lane) largest = bits > largest ? bits : largest;
    return bits_as<float>(largest);
  }

  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
  static Bytes integers(V v, float inverse) {
    const V shifted = v * V(inverse) + V(12582912.0f);
    return __builtin_convertvector(bits_as<Int>(shifted.raw) + kOffset, Bytes);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
