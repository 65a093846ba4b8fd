// Zoneout (Krueger et al., arXiv:1606.01305): in a step, some units keep their states.
//
// Which ones is drawn by Philox4x32-10, a function of a seed and of a place: of direction, step,
// row and unit, so that backward draws again what forward drew, and that neither threads nor the
// width of vectors matter. ../cuda/options.h and fastrnn.reference.kept draw the same.
#pragma once

#include "../philox.h"
#include "columns.h"

namespace fastrnn::FASTRNN_VARIANT {

// The words of a group of 64 units: unit 16 w + l takes word w of the counter (16 group + l, row,
// step, last).
inline void draw_words(uint64_t seed, uint32_t group, uint32_t row, uint32_t step, uint32_t last,
                       uint32_t (&words)[64]) {
  constexpr int kLanes = 16;
  uint32_t c[4][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    c[0][l] = group * kLanes + l;
    c[1][l] = row;
    c[2][l] = step;
    c[3][l] = last;
  }
  PhiloxKey key = PhiloxKey::of(seed);
  for (int round = 0; round < PhiloxKey::kRounds; ++round) {
    for (int l = 0; l < kLanes; ++l) philox_round(key, c[0][l], c[1][l], c[2][l], c[3][l]);
    key.advance();
  }
  std::memcpy(words, c, sizeof(words));
}

template <class T>
[[gnu::always_inline]] inline Vec<T> mix(Vec<T> weight, Vec<T> before, Vec<T> after) {
  return weight * before + (Vec<T>(T(1)) - weight) * after;
}

template <class S>
class Zoneout {
  using T = Compute<S>;

 public:
  enum State { kH, kC };

  // `stride`: between rows.
  Zoneout(const LayerArgs& args, int64_t stride, Workspace& workspace)
      : args_(args), stride_(stride) {
    for (const State state : {kH, kC}) {
      if (!is_on(state)) continue;
      const int64_t size = args.directions * args.batch * stride;
      weights_[state] = workspace.take<T>(size);
      std::memset(weights_[state], 0, size * sizeof(T));
    }
  }

  bool is_on() const { return is_on(kH) || is_on(kC); }
  bool is_on(State state) const { return probability(state) > 0; }

  // How much of its state each unit of a row keeps in the step drawn last; null if none does.
  const T* weights(State state, int direction, int64_t row) const {
    return at(weights_[state], (direction * args_.batch + row) * stride_);
  }

  // Draws for step t, some rows and some units.
  void draw(State state, int direction, int64_t t, Range rows, Range units) const {
    if (!is_on(state)) return;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      T* weights = weights_[state] + (direction * args_.batch + row) * stride_;
      if (args_.seed == nullptr) {
        for (int64_t i = units.begin; i < units.end; ++i) weights[i] = T(probability(state));
      } else {
        draw_row(state, direction, t, row, units, weights);
      }
    }
  }

 private:
  static constexpr int64_t kGroup = 64;

  const LayerArgs& args_;
  const int64_t stride_;
  T* weights_[2] = {};  // of h and c, [D, B, stride]

  double probability(State state) const { return state == kH ? args_.zoneout_h : args_.zoneout_c; }

  void draw_row(State state, int direction, int64_t t, int64_t row, Range units, T* weights) const {
    const auto limit = static_cast<uint32_t>(probability(state) * 4294967296.0);
    for (int64_t group = units.begin / kGroup; group * kGroup < units.end; ++group) {
      uint32_t words[kGroup];
      T kept[kGroup];
      draw_words(static_cast<uint64_t>(*args_.seed), static_cast<uint32_t>(group),
                 static_cast<uint32_t>(row), static_cast<uint32_t>(t),
                 static_cast<uint32_t>(direction + 2 * state), words);
      for (int i = 0; i < kGroup; ++i) kept[i] = words[i] < limit ? T(1) : T(0);
      const int64_t begin = max_of(units.begin, group * kGroup);
      const int64_t end = min_of(units.end, (group + 1) * kGroup);
      std::memcpy(weights + begin, kept + begin - group * kGroup, (end - begin) * sizeof(T));
    }
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
