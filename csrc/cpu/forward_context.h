// What the forward scan gives a cell's loops, and what it does itself with the states of a step.
#pragma once

#include "layer_norm.h"
#include "saved.h"
#include "states.h"
#include "zoneout.h"

namespace fastrnn::FASTRNN_VARIANT {

// Step t, the i-th of those that run.
template <class S>
struct ForwardStep {
  int64_t t, i;
  const Saved<S, Compute<S>>& saved;
};

// A block of units of some rows.
template <class S>
struct ForwardTile {
  int direction;
  int64_t row;
  int count;
  int64_t unit;
  const Vec<Compute<S>>* sums;  // W_hh h_{t-1}: [count][units][R]
  const Vec<Compute<S>>* bias;  // b_hh: [units][R]
  const Compute<S>* projected;  // W_ih x_t + b_ih: [count][units][G][lanes]
};

// A row of a layer with layer normalisation, of which the products may be overwritten.
template <class S>
struct ForwardRow {
  int direction;
  int64_t row;
  const Gains<S>& gains;
  TileRow<Compute<S>> x, recurrent;  // W_ih x_t and W_hh h_{t-1}, as the cell takes them
};

// Of one scan.
template <class S>
struct ForwardContext {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;

  const ForwardArgs& args;
  const Steps& steps;
  const States<S>& states;
  const Zoneout<S>& zoneout;
  bool projects;
  int units;  // vectors of units in a block

  // Results go to memory that nobody has touched for long. Asked for before the product, their
  // cache lines are there when the cell stores to them.
  void prefetch_results(const ForwardStep<S>& step, int direction, int64_t row, int count,
                        int64_t unit) const {
    const int saves = args.traits->saves, extras = args.traits->extras;
    const int64_t bytes = min_of(units * V::lanes, args.hidden - unit) * sizeof(S);
    for (int r = 0; r < count; ++r) {
      const int64_t n = steps.offset(step.t) + row + r;
      if (!projects && args.output != nullptr) {
        const int64_t feature = steps.feature_offset(direction, step.t, row + r, args.hidden);
        prefetch(at<S>(args.output, feature + unit), bytes);
      }
      if (saves > 0 && step.saved.gates != nullptr) {
        S* gates = step.saved.gate_row(n) + unit;
        for (int k = 0; k < saves; ++k) prefetch(gates + k * args.hidden, bytes);
      }
      if (extras > 0 && step.saved.extra != nullptr) {
        T* extra = step.saved.extra_row(n) + unit;
        for (int k = 0; k < extras; ++k) prefetch(extra + k * args.hidden, bytes);
      }
    }
  }

  // A row of step t, the i-th of those that run.
  struct Row {
    int64_t t, i;
    int direction;
    int64_t row;
  };

  // h_t of a row as it comes out of the projection, for a block of its features.
  void store_projected(const Row& at_row, const Columns<T>& columns, int64_t block,
                       const V* projected) const {
    const auto [t, i, direction, row] = at_row;
    const int64_t state = states.offset(direction, row);
    S* const output =
        at(static_cast<S*>(args.output), steps.feature_offset(direction, t, row, args.proj));
    F* const h_next = states.h(i + 1) + state;
    T* const direct = at(states.direct(), state);
    const S* const mask = states.h_mask(direction, row);
    const T* const keep = zoneout.weights(Zoneout<S>::kH, direction, row);
    const bool reset = steps.resets_after(direction, t, row);
    for (int u = 0; u < columns.units; ++u) {
      const int64_t column = columns.column(block, u);
      const int64_t left = min_of(args.proj - column, V::lanes);
      if (left <= 0) break;
      V h = projected[u];
      if (left < V::lanes) h = first_lanes(h, left);
      if (keep != nullptr) h = mix(V::load(keep + column), V::load(direct + column), h);
      if (output != nullptr) h.store(output + column, left);
      const V next = reset ? V(T(0)) : h;
      if (direct != nullptr) next.store(direct + column);
      (mask == nullptr ? next : next * V::load(mask + column, left)).store(h_next + column);
    }
  }
};

// A cell's loop over a register tile.
template <class S>
using ForwardLoop = void (*)(const ForwardContext<S>& context, const ForwardStep<S>& step,
                             const ForwardTile<S>& tile);

}  // namespace fastrnn::FASTRNN_VARIANT
