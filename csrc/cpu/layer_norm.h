// Layer normalisation (Ba et al., arXiv:1607.06450) of a layer with args.layer_norm: W_ih x and
// W_hh h of a row are normalised over all gates and units, and c, as the output of an LSTM reads
// it, over all units. So a row needs all its products before its cell: they are completed in one
// phase, and in the next one a part takes whole rows.
//
// Vectors of units are counted by v, their gates by g. In the rows of products here they lie as in
// register tiles: the gates of v side by side.
#pragma once

#include <cmath>

#include "../cells/general.h"
#include "columns.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

constexpr double kLayerNormEpsilon = 1e-5;

// The first `left` lanes, which are mostly all.
template <class S>
[[gnu::always_inline]] inline Vec<Compute<S>> load_lanes(const S* p, int64_t left) {
  using V = Vec<Compute<S>>;
  return left == V::lanes ? V::load(p) : V::load(p, left);
}
template <class T, class S>
[[gnu::always_inline]] inline void store_lanes(Vec<T> value, S* p, int64_t left) {
  left == Vec<T>::lanes ? value.store(p) : value.store(p, left);
}

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

// The sum of N * hidden values; load(v, g, left) reads the `left` first lanes of a vector.
template <int N, class T, class Load>
[[gnu::always_inline]] inline T sum_units(int64_t hidden, const Load& load) {
  using V = Vec<T>;
  const int64_t full = hidden / V::lanes, left = hidden % V::lanes;
  V sums[N];
  for (V& sum : sums) sum = V(T(0));
  for (int64_t v = 0; v < full; ++v) {
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g) sums[g] = sums[g] + load(v, g, V::lanes);
  }
  if (left > 0) {
    for (int g = 0; g < N; ++g) sums[g] = sums[g] + first_lanes(load(full, g, left), left);
  }
  V all = sums[0];
  for (int g = 1; g < N; ++g) all = all + sums[g];
  return sum_of(all);
}

template <int N, class T, class Load>
Moments<T> moments_of(int64_t hidden, const Load& load) {
  using V = Vec<T>;
  const T count = static_cast<T>(N * hidden);
  const T mean = sum_units<N, T>(hidden, load) / count;
  const T variance = sum_units<N, T>(hidden,
                                     [&](int64_t v, int g, int64_t left) {
                                       const V away = load(v, g, left) - V(mean);
                                       return away * away;
                                     }) /
                     count;
  return {mean, 1 / std::sqrt(variance + T(kLayerNormEpsilon))};
}

// A row of products as tiles hold them.
template <int N, class T>
struct TileRow {
  T* values;

  T* at(int64_t v, int g) const { return values + (v * N + g) * Vec<T>::lanes; }
  Moments<T> moments(int64_t hidden) const {
    return moments_of<N, T>(hidden,
                            [&](int64_t v, int g, int64_t) { return Vec<T>::load(at(v, g)); });
  }
};

// The learned vectors of a direction.
template <class Cell, class S>
struct Gains {
  using V = Vec<Compute<S>>;
  using C = General<Cell>;

  const S *ih, *hh;                         // [G*H], [R*H]
  const S *c = nullptr, *bias_c = nullptr;  // [H], of cells that normalise c

  Gains(const LayerArgs& args, int direction)
      : ih(static_cast<const S*>(args.parameters[direction][0])),
        hh(static_cast<const S*>(args.parameters[direction][1])) {
    if constexpr (C::normalises_state) {
      c = static_cast<const S*>(args.parameters[direction][2]);
      bias_c = static_cast<const S*>(args.parameters[direction][3]);
    }
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
