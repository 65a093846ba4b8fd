// What a layer may do beside running its cell: zoneout, a mask on the h that W_hh multiplies, and
// what holds the gradients that flow back. All of it is off where a pointer is null or a number
// zero, the same for every thread.
#pragma once

#include "../philox.h"
#include "block.h"

namespace fastrnn::cuda {

enum State : int { kOfH, kOfC };

// How much of its states each of a thread's items keeps in a step.
template <class T>
class Zoneout {
 public:
  static constexpr int kItems = max_items(sizeof(T));

  FASTRNN_DEVICE explicit Zoneout(const ZoneoutArgs& args) : args_(args) {}

  FASTRNN_DEVICE bool is_on() const { return args_.is_on(); }
  FASTRNN_DEVICE bool is_on(State state) const { return args_.probability[state] > 0; }
  FASTRNN_DEVICE bool is_mean() const { return args_.seed == nullptr; }

  // For the step at time t.
  template <class Args>
  FASTRNN_DEVICE void draw(const Block<Args>& block, int64_t t) {
    if (!is_on() || is_mean()) return;
    const auto seed = static_cast<uint64_t>(*args_.seed);
    kept_ = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * kItems; ++i) {
      const int state = i / kItems, item = i % kItems;
      if (args_.probability[state] == 0 || !block.owns(item)) continue;
      const uint32_t word =
          draw_word(seed, block.unit, block.row(item), args_.first_step + t,
                    static_cast<uint32_t>(args_.first_direction + block.direction + 2 * state));
      if (word < args_.limit[state]) kept_ |= 1u << i;
    }
  }

  FASTRNN_DEVICE T weight(State state, int item) const {
    if (is_mean()) return T(args_.probability[state]);
    return T(kept_ >> (state * kItems + item) & 1);
  }

  // The h that the mean is of, and the one before it.
  template <class V>
  FASTRNN_DEVICE V unmixed(V before, V mean) const {
    return (mean - V(T(args_.probability[kOfH])) * before) * V(T(args_.one_in_mean));
  }

 private:
  // Unit 64 g + 16 w + l takes word w of the counter (16 g + l, row, step, last).
  FASTRNN_DEVICE static uint32_t draw_word(uint64_t seed, int64_t unit, int64_t row, int64_t step,
                                           uint32_t last) {
    uint32_t c0 = static_cast<uint32_t>(unit / 64 * 16 + unit % 16);
    uint32_t c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(step), c3 = last;
    PhiloxKey key = PhiloxKey::of(seed);
    for (int round = 0; round < PhiloxKey::kRounds; ++round) {
      philox_round(key, c0, c1, c2, c3);
      key.advance();
    }
    const int64_t word = unit / 16 % 4;
    return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
  }

  const ZoneoutArgs& args_;
  uint32_t kept_ = 0;  // bit state * kItems + item
};

template <class V>
FASTRNN_DEVICE V mix(V weight, V before, V after) {
  return weight * before + (V(1) - weight) * after;
}

// The learned vectors of a thread's unit.
template <int Q, class S, class Args>
FASTRNN_DEVICE void read_parameters(const Block<Args>& block, Value<S>* parameters) {
  const S* first = static_cast<const S*>(block.p.args.parameters);
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const bool is_there = block.unit < block.hidden;
    const int64_t i = (block.direction * Q + q) * block.hidden + block.unit;
    parameters[q] = Value<S>(is_there ? widen(first[i]) : Compute<S>(0));
  }
}

// Under the mask on the h that W_hh multiplies; `state`: where in [D, B, H].
template <class S>
FASTRNN_DEVICE Compute<S> masked(Compute<S> value, const Recurrence& args, int64_t state) {
  if (args.h_mask == nullptr) return value;
  return value * widen(static_cast<const S*>(args.h_mask)[state]);
}

// What a step hands to the one before it, through h or c: n is its place in N.
template <class T, class V>
FASTRNN_DEVICE V over_edge(V gradient, const RecurrenceBackward& args, int64_t n) {
  T value = gradient.value;
  if (args.grad_scale != nullptr) {
    const T scale = static_cast<const T*>(args.grad_scale)[n];
    value = scale == 0 ? T(0) : value * scale;
  }
  // Comparisons that keep NaN.
  const T limit = static_cast<T>(args.grad_clip);
  if (limit > 0) value = value < -limit ? -limit : value > limit ? limit : value;
  return V(value);
}

}  // namespace fastrnn::cuda
