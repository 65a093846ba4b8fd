// The gradients of all weights and biases of a layer, a chunk of steps at a time: the gradients of
// the gates are used while they are in cache and never stored as a whole, and sums over a few rows
// each lose less to rounding than one long sum.
#pragma once

#include "chunk_gradients.h"
#include "scan_common.h"
#include "weight_gradient.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
class LayerGradients {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int64_t kShortSum = 8;

 public:
  LayerGradients(const BackwardArgs& args, const Steps& steps,
                 const ChunkGradients<S>& chunk_gradients, bool is_one_chunk, int max_parts,
                 Workspace& workspace)
      : args_(args),
        steps_(steps),
        chunk_gradients_(chunk_gradients),
        gate_columns_(args.traits->gates * args.hidden),
        recurrent_columns_(args.traits->recurrent * args.hidden),
        sum_columns_(gate_columns_ + chunk_gradients.vectors(args) * args.hidden),
        is_one_chunk_(is_one_chunk),
        max_parts_(max_parts),
        ih_(gate_columns_, args.input, args.directions, !is_one_chunk, workspace),
        hh_(recurrent_columns_, args.proj, args.directions, !is_one_chunk, workspace),
        hr_(args.weight_hr[0] == nullptr ? 0 : args.proj, args.hidden, args.directions,
            !is_one_chunk, workspace) {
    const int64_t biases = args.directions * chunk_gradients.stride;
    bias_ih_ = workspace.take<T>(biases);
    bias_hh_ = args.traits->splits_gradient ? workspace.take<T>(biases) : bias_ih_;
    panels_ = workspace.take<F>(args.directions * max_parts * panel_size());
    sources_ = workspace.take<const S*>(args.directions * max_parts * chunk_gradients.rows);
    if (args.h_mask != nullptr) {
      masked_ = workspace.take<S>(args.directions * max_parts * masked_size());
    }
  }

  void start(int direction, const Part& part) const {
    if (!is_one_chunk_) {
      for_each_share(direction, part,
                     [&](const WeightGradient<F>& gradient, Weight, int64_t block, Range rows) {
                       gradient.clear(direction, block, rows);
                     });
    }
    const Range columns = bias_columns(part);
    for (T* bias : {bias_ih_, bias_hh_}) {
      std::memset(bias_of(bias, direction) + columns.begin, 0,
                  (columns.end - columns.begin) * sizeof(T));
    }
  }

  // Adds a chunk to the gradients of the weights, from the gradients of their products.
  void add(int direction, const Part& part, const Chunk& chunk) const {
    const int64_t scratch = direction * max_parts_ + part.rank;
    F* panel = panels_ + scratch * panel_size();
    const S** sources = sources_ + scratch * chunk_gradients_.rows;
    S* masked = at(masked_, scratch * masked_size());
    for_each_share(
        direction, part,
        [&](const WeightGradient<F>& gradient, Weight weight, int64_t block, Range rows) {
          pack_panel(direction, chunk, gradient, weight, block, sources, masked, panel);
          const F* left = rows_of(weight).zipped(direction);
          if (is_one_chunk_) {
            gradient.assign(block, rows, left, chunk_gradients_.stride, panel, chunk.rows,
                            target(direction, weight));
          } else {
            gradient.add(direction, block, rows, left, chunk_gradients_.stride, panel, chunk.rows);
          }
        });
  }

  // Adds a chunk to those of the biases and learned vectors, from what the cell left.
  void add_sums(int direction, const Part& part, const Chunk& chunk) const {
    if (args_.d_bias_ih[direction] == nullptr && chunk_gradients_.vectors(args_) == 0) return;
    const Range columns = bias_columns(part);
    add_bias(chunk_gradients_.input.values(direction, 0), chunk.rows, columns,
             bias_of(bias_ih_, direction));
    if (args_.traits->splits_gradient) {
      add_bias(chunk_gradients_.biased(direction, 0), chunk.rows, columns,
               bias_of(bias_hh_, direction));
    }
  }

  void write(int direction, const Part& part) const {
    if (!is_one_chunk_) {
      for_each_share(
          direction, part,
          [&](const WeightGradient<F>& gradient, Weight weight, int64_t block, Range rows) {
            gradient.write(direction, block, rows, target(direction, weight));
          });
    }
    const Range columns = bias_columns(part);
    // The part's own columns of the sums [first, first + count).
    const auto write_sums = [&](T* sums, int64_t first, int64_t count, void* target) {
      if (target == nullptr) return;
      const int64_t begin = max_of(columns.begin, first);
      const int64_t end = min_of(columns.end, first + count);
      if (begin >= end) return;
      convert(bias_of(sums, direction) + begin, static_cast<S*>(target) + begin - first,
              end - begin);
    };
    write_sums(bias_ih_, 0, gate_columns_, args_.d_bias_ih[direction]);
    write_sums(bias_hh_, 0, recurrent_columns_, args_.d_bias_hh[direction]);
    // The gains of layer normalisation come before these: see LayerNormGradient.
    const int others = args_.layer_norm ? 2 : 0;
    for (int q = 0; q < chunk_gradients_.vectors(args_); ++q) {
      write_sums(bias_ih_, gate_columns_ + q * args_.hidden, args_.hidden,
                 args_.d_parameters[direction][others + q]);
    }
  }

 private:
  enum class Weight { kInput, kRecurrent, kProjection };

  const BackwardArgs& args_;
  const Steps& steps_;
  const ChunkGradients<S>& chunk_gradients_;
  const int64_t gate_columns_, recurrent_columns_;
  const int64_t sum_columns_;  // the gates', and those of the learned vectors
  const bool is_one_chunk_;
  const int max_parts_;
  const WeightGradient<F> ih_, hh_, hr_;
  T* bias_ih_;  // [D, stride]; after them the learned vectors
  T* bias_hh_;
  F* panels_;            // of each direction and part, what one block is multiplied with
  const S** sources_;    // and where its rows lie
  S* masked_ = nullptr;  // or they themselves, where h is masked

  int64_t masked_size() const { return chunk_gradients_.rows * hh_.columns().width; }

  int64_t panel_size() const {
    return packed_depth<F>(chunk_gradients_.rows) * kMaxVectors * V::lanes;
  }
  T* bias_of(T* base, int direction) const { return base + direction * chunk_gradients_.stride; }

  const ChunkRows<S>& rows_of(Weight weight) const {
    return weight == Weight::kInput       ? chunk_gradients_.input
           : weight == Weight::kRecurrent ? chunk_gradients_.recurrent
                                          : chunk_gradients_.projected;
  }
  S* target(int direction, Weight weight) const {
    void* const* targets = weight == Weight::kInput       ? args_.d_weight_ih
                           : weight == Weight::kRecurrent ? args_.d_weight_hh
                                                          : args_.d_weight_hr;
    return static_cast<S*>(targets[direction]);
  }

  // The part's own share of the weights: body(gradient, weight, block, rows of the weight).
  // No two parts of a phase share a sum.
  template <class Body>
  void for_each_share(int direction, const Part& part, Body body) const {
    const int64_t ih = args_.d_weight_ih[direction] == nullptr ? 0 : ih_.blocks();
    const int64_t hh = args_.d_weight_hh[direction] == nullptr ? 0 : hh_.blocks();
    const int64_t hr = args_.d_weight_hr[direction] == nullptr ? 0 : hr_.blocks();
    const int64_t blocks = ih + hh + hr;
    if (blocks == 0) return;
    // Where there are fewer blocks than parts, the rows of each block are divided, too.
    const int sharers = static_cast<int>((part.size + blocks - 1) / blocks);
    const Range items = share(blocks * sharers, part.rank, part.size);
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t block = i / sharers;
      const int sharer = static_cast<int>(i % sharers);
      if (block < ih) {
        body(ih_, Weight::kInput, block, share(gate_columns_, sharer, sharers));
      } else if (block < ih + hh) {
        body(hh_, Weight::kRecurrent, block - ih, share(recurrent_columns_, sharer, sharers));
      } else {
        body(hr_, Weight::kProjection, block - ih - hh, share(args_.proj, sharer, sharers));
      }
    }
  }

  // The part's own columns of the bias gradients.
  Range bias_columns(const Part& part) const {
    const Range vectors = share((sum_columns_ + V::lanes - 1) / V::lanes, part.rank, part.size);
    return {vectors.begin * V::lanes, vectors.end * V::lanes};
  }

  // A block of columns of what the weight was multiplied with in forward.
  void pack_panel(int direction, const Chunk& chunk, const WeightGradient<F>& gradient,
                  Weight weight, int64_t block, const S** sources, S* masked, F* panel) const {
    if (weight == Weight::kProjection) {
      const auto hidden = [&](int64_t k, int64_t first) -> const F* {
        return chunk_gradients_.hidden(direction, k) + first;
      };
      return gradient.pack(block, hidden, chunk.rows, panel);
    }
    if (weight == Weight::kRecurrent) {
      find_previous(direction, chunk, sources);
    } else {
      const S* x = static_cast<const S*>(args_.x) + chunk.begin * args_.input;
      for (int64_t k = 0; k < chunk.rows; ++k) sources[k] = x + k * args_.input;
    }
    if (weight == Weight::kRecurrent && args_.h_mask != nullptr) {
      mask_rows(direction, chunk, gradient.columns(), block, sources, masked);
      const int64_t width = gradient.columns().width;
      const auto masked_row = [&](int64_t k, int64_t) -> const S* {
        return sources[k] == nullptr ? nullptr : masked + k * width;
      };
      return gradient.pack(block, masked_row, chunk.rows, panel);
    }
    const auto source = [&](int64_t k, int64_t first) { return at(sources[k], first); };
    gradient.pack(block, source, chunk.rows, panel);
  }

  // masked[k]: the block's columns of sources[k], masked as in forward.
  void mask_rows(int direction, const Chunk& chunk, const Columns<T>& columns, int64_t block,
                 const S* const* sources, S* masked) const {
    const int64_t first = block * columns.width;
    const int64_t count = min_of(columns.width, columns.count - first);
    const S* masks = static_cast<const S*>(args_.h_mask);
    for (int64_t t = chunk.first; t <= chunk.last; ++t) {
      for (int64_t row = 0; row < steps_.rows(t); ++row, ++sources, masked += columns.width) {
        if (*sources == nullptr) continue;
        const S* mask = masks + steps_.state_offset(direction, row, args_.proj) + first;
        for (int64_t i = 0; i < count; i += V::lanes) {
          const int64_t left = min_of(count - i, V::lanes);
          (V::load(*sources + first + i, left) * V::load(mask + i, left)).store(masked + i, left);
        }
      }
    }
  }

  // Where h_{t-1} of each row of the chunk lies; null for zeros.
  void find_previous(int direction, const Chunk& chunk, const S** sources) const {
    const S* output = static_cast<const S*>(args_.output);
    const S* h_0 = static_cast<const S*>(args_.h_0);
    for (int64_t t = chunk.first; t <= chunk.last; ++t) {
      const int64_t before = t - steps_.stride(direction);
      const int64_t rows_before = steps_.rows(before);
      for (int64_t row = 0; row < steps_.rows(t); ++row) {
        if (steps_.resets_before(direction, t, row)) {
          *sources++ = nullptr;
        } else if (row < rows_before) {
          const int64_t n = steps_.offset(before) + row;
          *sources++ = output + (n * args_.directions + direction) * args_.proj;
        } else {
          *sources++ =
              h_0 == nullptr ? nullptr : h_0 + (direction * args_.batch + row) * args_.proj;
        }
      }
    }
  }

  void add_bias(const T* d_gates, int64_t rows, Range columns, T* bias) const {
    for (int64_t j = columns.begin; j < columns.end; j += V::lanes) {
      V sum(T(0));  // a sum of short sums loses less than a long one
      for (int64_t k = 0; k < rows; k += kShortSum) {
        V short_sum(T(0));
        for (int64_t i = k; i < min_of(k + kShortSum, rows); ++i) {
          short_sum = short_sum + V::load(d_gates + i * chunk_gradients_.stride + j);
        }
        sum = sum + short_sum;
      }
      (V::load(bias + j) + sum).store(bias + j);
    }
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
