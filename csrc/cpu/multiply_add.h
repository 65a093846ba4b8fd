// Nothing but multiply-adds on registers: measures how many of them a core can do.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fastrnn::FASTRNN_VARIANT {

// As many as hide the latency of one behind the others, and they fit into every variant's registers
// together with the two factors.
constexpr int kChains = 12;

// Runs `rounds` multiply-adds in each of kChains chains, which depend on nothing but themselves.
// Returns the number of floating-point operations.
inline int64_t multiply_add(int64_t rounds) {
  using V = Vec<float>;
  // Volatile, so that the compiler knows no value and leaves nothing out.
  volatile float scale = 0.5f, offset = 1.0f, sink;
  const V a(scale), b(offset);
  V chain[kChains];
  for (V& c : chain) c = V(offset);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (V& c : chain) c = c * a + b;
  }
  V sum = chain[0];
  for (int k = 1; k < kChains; ++k) sum = sum + chain[k];
  float lane[V::lanes];
  sum.store(lane);
  sink = lane[0];
  static_cast<void>(sink);
  return 2 * V::lanes * kChains * rounds;
}

}  // namespace fastrnn::FASTRNN_VARIANT
