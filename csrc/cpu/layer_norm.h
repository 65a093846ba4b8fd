// Layer normalisation (Ba et al., arXiv:1607.06450) of a layer with args.layer_norm: W_ih x and
// W_hh h of a row are normalised over all gates and units, and c, as the output of an LSTM reads
// it, over all units. So a row needs all its products before its cell: they are completed in one
// phase, and in the next one a part takes whole rows.
//
// Vectors of units are counted by v, their gates by g. In the rows of products here they lie as in
// register tiles: the gates of v side by side.
#pragma once

#include <cmath>

#include "columns.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

constexpr double kLayerNormEpsilon = 1e-5;

template <class T>
struct Moments {
  T mean, inverse;  // inverse: of the standard deviation

  Vec<T> normalise(Vec<T> value) const { return (value - Vec<T>(mean)) * Vec<T>(inverse); }
};

template <class T>
inline T sum_of(Vec<T> value) {
  T lane[Vec<T>::lanes], sum = 0;
  value.store(lane);
  for (const T each : lane) sum += each;
  return sum;
}

// Values of a row: whole vectors, `stride` elements apart, and after them `tails` of which only the
// first `left` lanes count.
template <class S>
struct Values {
  const S* first;
  int64_t vectors, stride;
  int tails;
  int64_t left;

  int64_t count() const { return vectors * Vec<Compute<S>>::lanes + tails * left; }

  // The sum of f(vector).
  template <class F>
  Compute<S> sum(const F& f) const {
    using V = Vec<Compute<S>>;
    constexpr int kSums = 4;  // chains of additions side by side
    V sums[kSums] = {V(0), V(0), V(0), V(0)};
    const S* p = first;
    int64_t v = 0;
    for (; v + kSums <= vectors; v += kSums) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i, p += stride) sums[i] = sums[i] + f(V::load(p));
    }
    for (; v < vectors; ++v, p += stride) sums[0] = sums[0] + f(V::load(p));
    for (int i = 0; i < tails; ++i, p += stride) {
      sums[0] = sums[0] + first_lanes(f(V::load(p, left)), left);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

// Of `count` values that follow each other.
template <class S>
Values<S> values_of(const S* first, int64_t count) {
  constexpr int64_t lanes = Vec<Compute<S>>::lanes;
  return {first, count / lanes, lanes, count % lanes > 0, count % lanes};
}

template <class S>
[[gnu::noinline]] Moments<Compute<S>> moments_of(const Values<S>& values) {
  using T = Compute<S>;
  using V = Vec<T>;
  const T count = static_cast<T>(values.count());
  const T mean = values.sum([](V value) { return value; }) / count;
  const T variance = values.sum([mean](V value) {
    const V away = value - V(mean);
    return away * away;
  }) / count;
  return {mean, 1 / std::sqrt(variance + T(kLayerNormEpsilon))};
}

// A row of products as tiles hold them, of `parts` gates.
template <class T>
struct TileRow {
  T* values;
  int parts;

  T* at(int64_t v, int g) const { return values + (v * parts + g) * Vec<T>::lanes; }

  Values<T> all(int64_t hidden) const {
    constexpr int64_t lanes = Vec<T>::lanes;
    const int64_t left = hidden % lanes;
    return {values, hidden / lanes * parts, lanes, left > 0 ? parts : 0, left};
  }
  // Of the first gate alone.
  Values<T> first_part(int64_t hidden) const {
    constexpr int64_t lanes = Vec<T>::lanes;
    return {values, hidden / lanes, parts * lanes, hidden % lanes > 0, hidden % lanes};
  }
};

// body(v, g, place, left): the first `left` lanes of v of each of the `parts` gates, which lie at
// `place` of a row [parts * H].
template <class T, class Body>
[[gnu::always_inline]] inline void for_each_part(int64_t hidden, int parts, const Body& body) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t v = 0, unit = 0; unit < hidden; ++v, unit += lanes) {
    const int64_t left = min_of(hidden - unit, lanes);
    for (int g = 0; g < parts; ++g) body(v, g, g * hidden + unit, left);
  }
}

// Normalised values, times their gains and with their biases, which may be null.
template <class S>
[[gnu::always_inline]] inline Vec<Compute<S>> scale(Vec<Compute<S>> normalised, const S* gains,
                                                    const S* bias, int64_t place, int64_t left) {
  const Vec<Compute<S>> scaled = normalised * load_lanes(gains + place, left);
  return bias == nullptr ? scaled : scaled + load_lanes(bias + place, left);
}

// Normalises a row and scales it.
template <class S>
[[gnu::noinline]] void normalise_row(const TileRow<Compute<S>>& row, int64_t hidden, const S* gains,
                                     const S* bias) {
  using T = Compute<S>;
  const Moments<T> moments = moments_of(row.all(hidden));
  for_each_part<T>(hidden, row.parts, [&](int64_t v, int g, int64_t place, int64_t left) {
    T* const own = row.at(v, g);
    scale(moments.normalise(Vec<T>::load(own)), gains, bias, place, left).store(own);
  });
}

// The learned vectors of a direction.
template <class S>
struct Gains {
  const S *ih, *hh;                         // [G*H], [R*H]
  const S *c = nullptr, *bias_c = nullptr;  // [H], of cells that normalise c

  Gains(const LayerArgs& args, int direction)
      : ih(static_cast<const S*>(args.parameters[direction][0])),
        hh(static_cast<const S*>(args.parameters[direction][1])) {
    if (args.traits->norms > 2) {
      c = static_cast<const S*>(args.parameters[direction][2]);
      bias_c = static_cast<const S*>(args.parameters[direction][3]);
    }
  }
};

// The sums of a row: mean(gain * d) and mean(gain * d * n).
template <class T>
struct NormSums {
  Vec<T> plain{T(0)}, weighted{T(0)};

  void add(Vec<T> d, Vec<T> gain, Vec<T> n) {
    const Vec<T> scaled = gain * d;
    plain = plain + scaled;
    weighted = weighted + scaled * n;
  }
  // count: of all the values.
  void complete(int64_t count) {
    for (Vec<T>* sum : {&plain, &weighted}) *sum = Vec<T>(sum_of(*sum) / static_cast<T>(count));
  }
  Vec<T> gradient(Vec<T> d, Vec<T> gain, Vec<T> n, T inverse) const {
    return Vec<T>(inverse) * (gain * d - plain - n * weighted);
  }
};

// The rows of a step that a part takes as a whole, where the cell needs all units of a row.
inline Part row_part(const Part& part, int64_t rows) {
  Part own = part;
  if (part.splits_units) own.rows = share(rows, part.rank, part.size);
  own.splits_units = false;
  return own;
}

}  // namespace fastrnn::FASTRNN_VARIANT
