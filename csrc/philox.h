// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
// words for a counter of four words and a key, the same on the CPU and on CUDA.
#pragma once

#include <cstdint>

namespace fastrnn {

// Of one of the rounds after the other.
struct PhiloxKey {
  static constexpr int kRounds = 10;
  uint32_t low, high;

  [[gnu::always_inline]] static constexpr PhiloxKey of(uint64_t seed) {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }
  [[gnu::always_inline]] constexpr void advance() {
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
};

// One round on the counter's words.
[[gnu::always_inline]] constexpr void philox_round(PhiloxKey key, uint32_t& c0, uint32_t& c1,
                                                   uint32_t& c2, uint32_t& c3) {
  const uint64_t a = uint64_t{c0} * 0xD2511F53, b = uint64_t{c2} * 0xCD9E8D57;
  c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key.low;
  c1 = static_cast<uint32_t>(b);
  c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key.high;
  c3 = static_cast<uint32_t>(a);
}

}  // namespace fastrnn
