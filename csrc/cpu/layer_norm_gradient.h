// The gradients of layer normalisation, and those of its gains: of rows n = (v - mean) * inverse,
// where the cell gave the gradient d of gain * n + bias,
//   dv = inverse * (gain * d - mean(gain * d) - n * mean(gain * d * n))
// The cell's rows are finished with W_hh h as they come, since the step before needs that, and with
// W_ih x when a chunk is complete. Sums over rows, of biases and gains, come from the d of a chunk.
#pragma once

#include "backward_context.h"
#include "input_projection.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class LayerNormGradient {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using SavedSteps = Saved<const S, const T>;

 public:
  LayerNormGradient(const BackwardArgs& args, const Steps& steps,
                    const ChunkGradients<S>& chunk_gradients, Workspace& workspace)
      : args_(args),
        steps_(steps),
        chunk_gradients_(chunk_gradients),
        gates_(args.traits->gates),
        recurrent_(args.traits->recurrent),
        input_(args, steps, gates_, workspace, nullptr),
        sum_stride_(odd_lines<T>(gates_ * args.hidden)),
        d_hidden_stride_(odd_lines<T>(width_of(Columns<T>(args.hidden)))),
        taken_stride_(odd_lines<T>(width_of(input_.columns()))) {
    const int64_t rows = args.directions * chunk_gradients.rows;
    x_inverse_ = workspace.take<T>(rows);
    r_moments_ = workspace.take<Moments<T>>(rows);
    d_gain_ih_ = workspace.take<T>(args.directions * sum_stride_);
    d_gain_hh_ = workspace.take<T>(args.directions * sum_stride_);
    const int64_t batch_rows = args.directions * args.batch;
    d_hidden_ = workspace.take<T>(batch_rows * d_hidden_stride_);
    taken_ = workspace.take<T>(batch_rows * 2 * taken_stride_);
  }

  void pack(int direction, const Part& part) const {
    input_.pack(direction, share(input_.columns().blocks, part.rank, part.size));
  }

  void start(int direction, const Part& part) const {
    const Range columns = columns_of(part);
    for (T* sums : {d_gain_ih_, d_gain_hh_}) {
      std::memset(sums + direction * sum_stride_ + columns.begin, 0,
                  (columns.end - columns.begin) * sizeof(T));
    }
  }

  // W_ih x of the chunk's steps, from `first` on in the order of the direction.
  void project(int direction, const Chunk& chunk, int64_t first, Phase phase) const {
    input_.run(direction, first, chunk.last - chunk.first + 1, phase);
  }

  // What reaches h of a row by products.
  T* d_hidden(int direction, int64_t row) const {
    return d_hidden_ + (direction * args_.batch + row) * d_hidden_stride_;
  }

  // What the cell takes of a row, when d_hidden() is there. r: W_hh h, as forward saved it. Leaves
  // W_ih x normalised, for add() and finish_input().
  BackwardRow<S> start_row(int direction, const Chunk& chunk, int64_t t, int64_t row,
                           const Gains<S>& gains, const S* r) const {
    const int64_t k = steps_.offset(t) + row - chunk.begin, hidden = args_.hidden;
    const TileRow<T> normalised = x(direction, chunk, t, row);
    T* const own = taken_ + (direction * args_.batch + row) * 2 * taken_stride_;
    const TileRow<T> x{own, gates_}, recurrent{own + taken_stride_, recurrent_};
    const Moments<T> of_x = moments_of(normalised.all(hidden));
    const Moments<T> of_r = moments_of(values_of(r, recurrent_ * hidden));
    x_inverse(direction, k) = of_x.inverse;
    r_moments(direction, k) = of_r;
    const auto* const bias_ih = static_cast<const S*>(args_.bias_ih[direction]);
    const auto* const bias_hh = static_cast<const S*>(args_.bias_hh[direction]);
    for_each_part<T>(args_.hidden, gates_, [&](int64_t v, int g, int64_t place, int64_t left) {
      const V n = of_x.normalise(V::load(normalised.at(v, g)));
      n.store(normalised.at(v, g));
      scale(n, gains.ih, bias_ih, place, left).store(x.at(v, g));
    });
    for_each_part<T>(args_.hidden, recurrent_, [&](int64_t v, int g, int64_t place, int64_t left) {
      const V n = of_r.normalise(load_lanes(r + place, left));
      scale(n, gains.hh, bias_hh, place, left).store(recurrent.at(v, g));
    });
    return {direction, row, gains, d_hidden(direction, row), x, recurrent};
  }

  // From the gradients that the cell left of a row to that of W_hh h, which is r.
  void finish_row(const BackwardRow<S>& row, const Chunk& chunk, int64_t t, const S* r) const {
    const int64_t k = steps_.offset(t) + row.row - chunk.begin;
    const Moments<T> moments = r_moments(row.direction, k);
    write_gradient(chunk_gradients_.biased(row.direction, k), recurrent_, row.gains.hh,
                   moments.inverse, chunk_gradients_.recurrent, row.direction, k,
                   [&](int64_t, int, int64_t place, int64_t left) {
                     return moments.normalise(load_lanes(r + place, left));
                   });
  }

  void write(int direction, const Part& part) const {
    const Range columns = columns_of(part);
    const T* const sums[] = {d_gain_ih_, d_gain_hh_};
    const int64_t counts[] = {gates_ * args_.hidden, recurrent_ * args_.hidden};
    for (int q = 0; q < 2; ++q) {
      S* const target = static_cast<S*>(args_.d_parameters[direction][q]);
      const int64_t end = min_of(columns.end, counts[q]);
      if (target == nullptr || columns.begin >= end) continue;
      convert(sums[q] + direction * sum_stride_ + columns.begin, target + columns.begin,
              end - columns.begin);
    }
  }

  // Adds a chunk to the gradients of the gains.
  void add(int direction, const Part& part, const Chunk& chunk, const SavedSteps& saved) const {
    const int64_t hidden = args_.hidden;
    const Range vectors = share((hidden + V::lanes - 1) / V::lanes, part.rank, part.size);
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      const int64_t unit = v * V::lanes, left = min_of(hidden - unit, V::lanes);
      const auto add_to = [&](T* sums, int g, V value) {
        T* const to = sums + direction * sum_stride_ + g * hidden + unit;
        (load_lanes(to, left) + value).store(to, left);
      };
      for (int g = 0; g < gates_; ++g) {
        V sum(T(0));
        for_each_row(chunk, [&](int64_t t, int64_t row, int64_t k) {
          const T* d = chunk_gradients_.input.values(direction, k) + g * hidden + unit;
          sum = sum + load_lanes(d, left) * V::load(x(direction, chunk, t, row).at(v, g));
        });
        add_to(d_gain_ih_, g, sum);
      }
      for (int g = 0; g < recurrent_; ++g) {
        V sum(T(0));
        for_each_row(chunk, [&](int64_t, int64_t, int64_t k) {
          const T* d = chunk_gradients_.biased(direction, k) + g * hidden + unit;
          const S* r = saved.gate_row(chunk.begin + k) + g * hidden + unit;
          sum = sum + load_lanes(d, left) * r_moments(direction, k).normalise(load_lanes(r, left));
        });
        add_to(d_gain_hh_, g, sum);
      }
    }
  }

  // From the gradients that the cell left of a chunk to those of W_ih x.
  void finish_input(int direction, const Part& part, const Chunk& chunk) const {
    const Range own = share(chunk.rows, part.rank, part.size);
    const Gains<S> gains(args_, direction);
    for_each_row(chunk, [&](int64_t t, int64_t row, int64_t k) {
      if (k < own.begin || k >= own.end) return;
      const TileRow<T> x = this->x(direction, chunk, t, row);
      T* const d = chunk_gradients_.input.values(direction, k);
      write_gradient(d, gates_, gains.ih, x_inverse(direction, k), chunk_gradients_.input,
                     direction, k,
                     [&](int64_t v, int g, int64_t, int64_t) { return V::load(x.at(v, g)); });
    });
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<S>& chunk_gradients_;
  const int gates_, recurrent_;  // G and R
  const InputProjection<S> input_;
  const int64_t sum_stride_, d_hidden_stride_, taken_stride_;
  T* x_inverse_;               // [D, rows of a chunk]
  Moments<T>* r_moments_;      // the same
  T *d_gain_ih_, *d_gain_hh_;  // [D, sum_stride]
  T* d_hidden_;                // [D, B, d_hidden_stride]
  T* taken_;                   // [D, B, 2, taken_stride]: what the cell takes of x and of h

  // W_ih x of a row.
  TileRow<T> x(int direction, const Chunk& chunk, int64_t t, int64_t row) const {
    const int64_t slot = steps_.runs_back(direction) ? chunk.last - t : t - chunk.first;
    return {input_.whole_row(direction, slot, row), gates_};
  }
  // Row k of the chunk: one over the standard deviation of W_ih x, and the moments of W_hh h.
  T& x_inverse(int direction, int64_t k) const {
    return x_inverse_[direction * chunk_gradients_.rows + k];
  }
  Moments<T>& r_moments(int direction, int64_t k) const {
    return r_moments_[direction * chunk_gradients_.rows + k];
  }

  // Whole blocks, as tiles store them.
  static int64_t width_of(const Columns<T>& columns) { return columns.blocks * columns.width; }

  Range columns_of(const Part& part) const { return share(sum_stride_, part.rank, part.size); }

  // body(t, row, k): row k of the chunk.
  template <class Body>
  void for_each_row(const Chunk& chunk, Body body) const {
    int64_t k = 0;
    for (int64_t t = chunk.first; t <= chunk.last; ++t) {
      for (int64_t row = 0; row < steps_.rows(t); ++row) body(t, row, k++);
    }
  }

  // Writes row k of `target`, from d of its `parts` and what `normalised` has.
  template <class Normalised>
  void write_gradient(const T* d, int parts, const S* gains, T inverse, const ChunkRows<S>& target,
                      int direction, int64_t k, const Normalised& normalised) const {
    NormSums<T> sums;
    for_each_part<T>(args_.hidden, parts, [&](int64_t v, int g, int64_t place, int64_t left) {
      V n = normalised(v, g, place, left);
      if (left < V::lanes) n = first_lanes(n, left);
      sums.add(load_lanes(d + place, left), load_lanes(gains + place, left), n);
    });
    sums.complete(parts * args_.hidden);
    T* const values = target.values(direction, k);
    F* const factors = target.factors(direction, k);
    for_each_part<T>(args_.hidden, parts, [&](int64_t v, int g, int64_t place, int64_t left) {
      const V dv = sums.gradient(load_lanes(d + place, left), load_lanes(gains + place, left),
                                 normalised(v, g, place, left), inverse);
      store_lanes(dv, values + place, left);
      if constexpr (ChunkRows<S>::kNarrows) store_lanes(dv, factors + place, left);
    });
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
