// The gradients of layer normalisation, and those of its gains: of rows n = (v - mean) * inverse,
// where the cell gave the gradient d of gain * n + bias,
//   dv = inverse * (gain * d - mean(gain * d) - n * mean(gain * d * n))
// The cell's rows are finished with W_hh h as they come, since the step before needs that, and with
// W_ih x when a chunk is complete. Sums over rows, of biases and gains, come from the d of a chunk.
#pragma once

#include "chunk_gradients.h"
#include "input_projection.h"
#include "layer_norm.h"
#include "saved.h"

namespace fastrnn::FASTRNN_VARIANT {

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

template <class Cell, class S>
class LayerNormGradient {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  using C = General<Cell>;
  using SavedSteps = Saved<const S, const T>;
  static constexpr int G = C::gates, R = C::recurrent;

 public:
  LayerNormGradient(const BackwardArgs& args, const Steps& steps,
                    const ChunkGradients<Cell, S>& chunk_gradients, Workspace& workspace)
      : args_(args),
        steps_(steps),
        chunk_gradients_(chunk_gradients),
        input_(args, steps, G, workspace, nullptr),
        sum_stride_(odd_lines<T>(G * args.hidden)),
        d_hidden_stride_(odd_lines<T>(width_of(Columns<T>(args.hidden)))) {
    const int64_t rows = args.directions * chunk_gradients.rows;
    x_inverse_ = workspace.take<T>(rows);
    r_moments_ = workspace.take<Moments<T>>(rows);
    d_gain_ih_ = workspace.take<T>(args.directions * sum_stride_);
    d_gain_hh_ = workspace.take<T>(args.directions * sum_stride_);
    d_hidden_ = workspace.take<T>(args.directions * args.batch * d_hidden_stride_);
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
  template <class Phase>
  void project(int direction, const Chunk& chunk, int64_t first, const Phase& phase) const {
    input_.run(direction, first, chunk.last - chunk.first + 1, phase);
  }

  // W_ih x of a row, which the cell normalises in place.
  TileRow<G, T> x(int direction, const Chunk& chunk, int64_t t, int64_t row) const {
    const int64_t slot = steps_.runs_back(direction) ? chunk.last - t : t - chunk.first;
    return {input_.whole_row(direction, slot, row)};
  }
  // Row k of the chunk: one over the standard deviation of W_ih x, and the moments of W_hh h.
  T& x_inverse(int direction, int64_t k) const {
    return x_inverse_[direction * chunk_gradients_.rows + k];
  }
  Moments<T>& r_moments(int direction, int64_t k) const {
    return r_moments_[direction * chunk_gradients_.rows + k];
  }
  // What reaches h of a row by products.
  T* d_hidden(int direction, int64_t row) const {
    return d_hidden_ + (direction * args_.batch + row) * d_hidden_stride_;
  }

  // Adds a chunk to the gradients of the gains.
  void add(int direction, const Part& part, const Chunk& chunk, const SavedSteps& saved) const {
    const int64_t hidden = args_.hidden;
    const Range vectors = share((hidden + V::lanes - 1) / V::lanes, part.rank, part.size);
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      const int64_t unit = v * V::lanes, left = min_of(hidden - unit, V::lanes);
      V ih[G], hh[R];
      for (V& sum : ih) sum = V(T(0));
      for (V& sum : hh) sum = V(T(0));
      for_each_row(chunk, [&](int64_t t, int64_t row, int64_t k) {
        const TileRow<G, T> x = this->x(direction, chunk, t, row);
        const T* d_x = chunk_gradients_.input.values(direction, k) + unit;
        for (int g = 0; g < G; ++g) {
          ih[g] = ih[g] + load_lanes(d_x + g * hidden, left) * V::load(x.at(v, g));
        }
        const T* d_r = chunk_gradients_.biased(direction, k) + unit;
        const S* r = saved.gate_row(chunk.begin + k) + unit;
        const Moments<T>& moments = r_moments(direction, k);
        for (int g = 0; g < R; ++g) {
          const V n = moments.normalise(load_lanes(r + g * hidden, left));
          hh[g] = hh[g] + load_lanes(d_r + g * hidden, left) * n;
        }
      });
      const auto add_to = [&](T* sums, int g, V value) {
        T* const to = sums + direction * sum_stride_ + g * hidden + unit;
        (load_lanes(to, left) + value).store(to, left);
      };
      for (int g = 0; g < G; ++g) add_to(d_gain_ih_, g, ih[g]);
      for (int g = 0; g < R; ++g) add_to(d_gain_hh_, g, hh[g]);
    }
  }

  // From the gradients that the cell left of a chunk to those of W_ih x.
  void finish_input(int direction, const Part& part, const Chunk& chunk) const {
    const Range own = share(chunk.rows, part.rank, part.size);
    const Gains<Cell, S> gains(args_, direction);
    for_each_row(chunk, [&](int64_t t, int64_t row, int64_t k) {
      if (k < own.begin || k >= own.end) return;
      const TileRow<G, T> x = this->x(direction, chunk, t, row);
      T* const d = chunk_gradients_.input.values(direction, k);
      finish_row<G>(d, gains.ih, x_inverse(direction, k), chunk_gradients_.input, direction, k,
                    [&](int64_t v, int g, int64_t) { return V::load(x.at(v, g)); });
    });
  }

  // The same of W_hh h of row k, whose values are r.
  void finish_recurrent(int direction, int64_t k, const S* r, const Gains<Cell, S>& gains) const {
    const Moments<T> moments = r_moments(direction, k);
    finish_row<R>(chunk_gradients_.biased(direction, k), gains.hh, moments.inverse,
                  chunk_gradients_.recurrent, direction, k, [&](int64_t v, int g, int64_t left) {
                    return moments.normalise(load_lanes(r + g * args_.hidden + v * V::lanes, left));
                  });
  }

  void write(int direction, const Part& part) const {
    const Range columns = columns_of(part);
    const T* const sums[] = {d_gain_ih_, d_gain_hh_};
    const int64_t counts[] = {G * args_.hidden, R * args_.hidden};
    for (int q = 0; q < 2; ++q) {
      S* const target = static_cast<S*>(args_.d_parameters[direction][q]);
      const int64_t end = min_of(columns.end, counts[q]);
      if (target == nullptr || columns.begin >= end) continue;
      convert(sums[q] + direction * sum_stride_ + columns.begin, target + columns.begin,
              end - columns.begin);
    }
  }

 private:
  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<Cell, S>& chunk_gradients_;
  const InputProjection<S> input_;
  const int64_t sum_stride_, d_hidden_stride_;
  T* x_inverse_;               // [D, rows of a chunk]
  Moments<T>* r_moments_;      // the same
  T *d_gain_ih_, *d_gain_hh_;  // [D, sum_stride]
  T* d_hidden_;                // [D, B, d_hidden_stride]

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

  // Writes row k of `target`, from d of its N parts and what `normalised` has.
  template <int N, class Normalised>
  void finish_row(const T* d, const S* gains, T inverse, const ChunkRows<S>& target, int direction,
                  int64_t k, const Normalised& normalised) const {
    const int64_t hidden = args_.hidden, full = hidden / V::lanes, rest = hidden % V::lanes;
    const auto for_each = [&](const auto& body) {
      for (int64_t v = 0; v < full; ++v) {
#pragma GCC unroll 4
        for (int g = 0; g < N; ++g) body(v, g, V::lanes);
      }
      if (rest == 0) return;
      for (int g = 0; g < N; ++g) body(full, g, rest);
    };
    NormSums<T> sums;
    for_each([&](int64_t v, int g, int64_t left) {
      const int64_t column = g * hidden + v * V::lanes;
      V n = normalised(v, g, left);
      if (left < V::lanes) n = first_lanes(n, left);
      sums.add(load_lanes(d + column, left), load_lanes(gains + column, left), n);
    });
    sums.complete(N * hidden);
    T* const values = target.values(direction, k);
    F* const factors = target.factors(direction, k);
    for_each([&](int64_t v, int g, int64_t left) {
      const int64_t column = g * hidden + v * V::lanes;
      const V dv = sums.gradient(load_lanes(d + column, left), load_lanes(gains + column, left),
                                 normalised(v, g, left), inverse);
      store_lanes(dv, values + column, left);
      if constexpr (ChunkRows<S>::kNarrows) store_lanes(dv, factors + column, left);
    });
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
