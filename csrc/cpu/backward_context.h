// What the backward scan gives a cell's loops.
#pragma once

#include "chunk_gradients.h"
#include "layer_norm.h"
#include "saved.h"
#include "zoneout.h"

namespace fastrnn::FASTRNN_VARIANT {

// What a step hands to the one before it, through any of the states: scaled by the step's own
// scale, and held to a magnitude.
template <class S>
class Edge {
  using T = Compute<S>;
  using V = Vec<T>;

 public:
  explicit Edge(const BackwardArgs& args)
      : scale_(static_cast<const T*>(args.grad_scale)), clip_(static_cast<T>(args.grad_clip)) {}

  bool is_plain() const { return scale_ == nullptr && clip_ == 0; }

  // n: the row of the step in the layer.
  V operator()(V gradient, int64_t n) const {
    if (scale_ != nullptr) gradient = scale_[n] == 0 ? V(T(0)) : gradient * V(scale_[n]);
    return clip_ > 0 ? clamp(gradient, -clip_, clip_) : gradient;
  }

 private:
  const T* scale_;  // [N] or null
  T clip_;          // 0: none
};

// Step t among its neighbours in the order of the direction, as some of its rows have them.
template <class S>
struct BackwardStep {
  int64_t t, before, after;
  bool has_after, has_before;
  const Factor<S>* d_gates_after;  // the gate gradients of the step after t
  const Chunk& chunk;
  const Saved<const S, const Compute<S>>& saved;

  int64_t chunk_row(const Steps& steps, int64_t row) const {
    return steps.offset(t) + row - chunk.begin;
  }
};

// A block of columns of some rows, and what reaches them by a product: sums[r * vectors + v].
template <class S>
struct BackwardTile {
  int direction;
  int64_t row;
  int count;
  int64_t column;
  const Vec<Compute<S>>* sums;
  int vectors;
};

// A row of a layer with layer normalisation.
template <class S>
struct BackwardRow {
  using T = Compute<S>;

  int direction;
  int64_t row;
  const Gains<S>& gains;
  const T* d_hidden;        // what reaches h by products
  TileRow<T> x, recurrent;  // W_ih x_t and W_hh h_{t-1}, as the cell took them
};

// Of one scan.
template <class S>
struct BackwardContext {
  using T = Compute<S>;

  BackwardContext(const BackwardArgs& args, const Steps& steps,
                  const ChunkGradients<S>& chunk_gradients, Workspace& workspace)
      : args(args),
        steps(steps),
        chunk_gradients(chunk_gradients),
        projects(args.weight_hr[0] != nullptr),
        zoneout_stride(odd_lines<T>(max_of(args.hidden, args.proj))),
        zoneout(args, zoneout_stride, workspace),
        edge(args) {
    const int64_t rows = args.directions * args.batch;
    if (args.traits->has_direct_path || args.zoneout_h > 0) {
      carry_h = workspace.take<T>(rows * args.proj);
    }
    carry_c = workspace.take<T>(args.traits->states * rows * args.hidden);
  }

  const BackwardArgs& args;
  const Steps& steps;
  const ChunkGradients<S>& chunk_gradients;
  const bool projects;
  const int64_t zoneout_stride;
  const Zoneout<S> zoneout;
  const Edge<S> edge;
  // What a step hands to the one before it: the direct part of the gradient of h, [D, B, P], null
  // where there is no direct path, and the gradients of the other states, [D, B, C*H]. The edge is
  // still before the first, and behind the others.
  T* carry_h = nullptr;
  T* carry_c;
};

}  // namespace fastrnn::FASTRNN_VARIANT
