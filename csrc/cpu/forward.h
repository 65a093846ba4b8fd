// The forward scan on the CPU: for each step and each block of hidden units, a register tile
// computes W_hh h_{t-1} for all gates of some rows, and the cell finishes these rows from
// registers.
//
// W_ih x runs through the same tiles, a few steps ahead, into a buffer that stays in cache: a
// projection of the whole sequence would be written to memory and read back, and inference would
// need room for it. A projection of h (LSTM only) is a second product per step, after the first is
// complete.
#pragma once

#include "math.h"
#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class ForwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  static constexpr int G = Cell::gates;
  // Rows projected at once: enough to use the tallest tiles and to read W_ih rarely.
  static constexpr int64_t kProjectedRows = 256;
  // Up to so many rows in all steps, packing a weight takes longer than it saves: dot products with
  // the weight as it lies end in a sum over lanes, the shorter the more often.
  static constexpr int64_t few_rows(int64_t depth) {
    return std::is_same_v<S, F> && Step<F>::values == 1 ? min_of(depth * 3 / 4, 256) : 32;
  }

 public:
  ForwardScan(const ForwardArgs& args, Workspace& workspace)
      : args_(args),
        steps_(args, workspace),
        input_(args.input),
        input_stride_(packed_depth<F>(args.input)),
        hidden_(args.hidden),
        shown_(args.proj),
        projects_(args.weight_hr[0] != nullptr),
        stride_(odd_lines<T>(max_of(args.hidden, args.proj))),
        units_(units_per_block<T>(args.hidden, G)),
        width_(units_ * G * V::lanes),
        blocks_((args.hidden + units_ * V::lanes - 1) / (units_ * V::lanes)),
        hr_(args.proj),
        ahead_(max_of(1, min_of(args.steps, kProjectedRows / max_of(1, args.batch)))) {
    const int64_t states = args.directions * args.batch * stride_;
    const int64_t rows = args.directions * ahead_ * args.batch;
    const auto take_packed = [&](const void* weight, int64_t blocks, int64_t depth, int64_t width) {
      const bool is_worth_it = weight != nullptr && steps_.total() > few_rows(depth);
      const int64_t size = args.directions * blocks * packed_depth<F>(depth) * width;
      return is_worth_it ? workspace.take<F>(size) : nullptr;
    };
    packed_ih_ = take_packed(args.weight_ih[0], blocks_, input_, width_);
    packed_hh_ = take_packed(args.weight_hh[0], blocks_, shown_, width_);
    packed_hr_ = take_packed(args.weight_hr[0], hr_.blocks, hidden_, hr_.width);
    projected_ = workspace.take<T>(rows * blocks_ * width_);
    copied_ = workspace.take<F>(kCopies ? rows * input_stride_ : 0);
    for (F*& h : h_) h = workspace.take<F>(states);
    direct_ = workspace.take<T>(kKeepsDirect ? states : 0);
    cell_ = workspace.take<T>(Cell::has_cell_state ? states : 0);
    unprojected_ = workspace.take<F>(projects_ ? states : 0);
  }

  Work work() const {
    const int vectors = units_ * G;
    return {args_.steps, steps_.mean_rows(), input_ + shown_, blocks_,
            vectors,     max_rows(vectors),  args_.directions};
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    start_states(direction, part);
    part.meet();
    const int64_t step = steps_.runs_back(direction) ? -1 : 1;
    int64_t t = step == 1 ? 0 : steps_.count() - 1;
    for (int64_t i = 0; i < steps_.count(); ++i, t += step) {
      if (i % ahead_ == 0) project(direction, part, t, step, min_of(ahead_, steps_.count() - i));
      const int64_t rows = steps_.rows(t);
      run_rows(direction, part, t, i, rows);
      if (projects_) {
        if (part.meets_each_step) part.meet();
        project_hidden(direction, part, t, i, rows);
      }
      // Rows that end here leave their final state.
      copy_final(direction, part, t, min_of(rows, steps_.rows(t + step)), rows);
      if (part.meets_each_step) part.meet();
    }
  }

 private:
  // x is copied into its factors where these have another type or whole pairs.
  static constexpr bool kCopies = !std::is_same_v<S, F> || Step<F>::values > 1;
  // Where h is rounded as a factor, the direct path takes it from elsewhere.
  static constexpr bool kKeepsDirect = Cell::has_direct_path && !std::is_same_v<F, T>;

  const ForwardArgs& args_;
  const Steps steps_;
  const int64_t input_, input_stride_, hidden_, shown_;
  const bool projects_;
  const int64_t stride_;  // between rows of states
  const int units_;       // vectors of hidden units in a block
  const int64_t width_;   // columns of a block: its units, all gates
  const int64_t blocks_;
  const Columns<T> hr_;
  const int64_t ahead_;  // steps projected at once
  F* packed_ih_;         // [D, blocks, depth, width], or null: the weight is read as it lies
  F* packed_hh_;
  F* packed_hr_;
  T* projected_;
  F* copied_;  // x of the steps projected at once
  // What a step hands to the next, [D, B, stride]: h, read from one and written to the other, and
  // the cell state. Zero where a reset stands between them.
  F* h_[2];
  T* direct_;
  T* cell_;
  F* unprojected_;  // o * tanh(c) of this step

  int64_t state_offset(int direction, int64_t row) const {
    return (direction * args_.batch + row) * stride_;
  }
  // Row `row` of [D, B, columns]
  template <class Pointer>
  auto state_row(Pointer* base, int direction, int64_t row, int64_t columns) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const S, S>;
    return static_cast<Element*>(base) + (direction * args_.batch + row) * columns;
  }
  // Row `row` of step t of [N, D*columns]
  template <class Element>
  Element* step_row(Element* base, int direction, int64_t t, int64_t row, int64_t columns) const {
    return base + ((steps_.offset(t) + row) * args_.directions + direction) * columns;
  }
  F* packed_ih(int direction, int64_t block) const {
    return packed(packed_ih_, direction * blocks_ + block, input_, width_);
  }
  F* packed_hh(int direction, int64_t block) const {
    return packed(packed_hh_, direction * blocks_ + block, shown_, width_);
  }
  F* packed_hr(int direction, int64_t block) const {
    return packed(packed_hr_, direction * hr_.blocks + block, hidden_, hr_.width);
  }
  static F* packed(F* base, int64_t block, int64_t depth, int64_t width) {
    return base == nullptr ? nullptr : base + block * packed_depth<F>(depth) * width;
  }
  // W_ih x + b_ih of one row for one block, in the order of the tile's columns; slot counts steps
  // ahead.
  T* projected(int direction, int64_t block, int64_t slot, int64_t row) const {
    return projected_ +
           (((direction * blocks_ + block) * ahead_ + slot) * args_.batch + row) * width_;
  }

  // The hidden units [begin, end) of the part's blocks.
  Range unit_range(const Part& part) const {
    const int64_t units = units_ * V::lanes;
    return {min_of(part.blocks.begin * units, hidden_), min_of(part.blocks.end * units, hidden_)};
  }
  // The part's blocks of features of h, if it is projected, and all its own features.
  Range shown_blocks(const Part& part) const {
    return part.meets_each_step ? share(hr_.blocks, part.rank, part.size) : Range{0, hr_.blocks};
  }
  Range shown_range(const Part& part) const {
    if (!projects_) return unit_range(part);
    const Range blocks = shown_blocks(part);
    return {min_of(blocks.begin * hr_.width, shown_), min_of(blocks.end * hr_.width, shown_)};
  }

  void pack(int direction, const Part& part) const {
    // Threads that split rows share all weights, threads that split units need only their own.
    const Range blocks =
        part.meets_each_step ? part.blocks : share(part.blocks.end, part.rank, part.size);
    const auto pack_blocks = [](Range blocks, const void* weight, int64_t columns, int64_t depth,
                                int gates, int units, auto target) {
      for (int64_t b = blocks.begin; b < blocks.end && target(b) != nullptr; ++b) {
        pack_forward(static_cast<const S*>(weight), columns, depth, gates, units, b, target(b));
      }
    };
    pack_blocks(blocks, args_.weight_ih[direction], hidden_, input_, G, units_,
                [&](int64_t b) { return packed_ih(direction, b); });
    pack_blocks(blocks, args_.weight_hh[direction], hidden_, shown_, G, units_,
                [&](int64_t b) { return packed_hh(direction, b); });
    pack_blocks(share(projects_ ? hr_.blocks : 0, part.rank, part.size), args_.weight_hr[direction],
                shown_, hidden_, 1, hr_.units, [&](int64_t b) { return packed_hr(direction, b); });
  }

  // Both buffers of h begin with h_0: in one direction rows begin at different steps. Rows without
  // any step keep their initial states.
  void start_states(int direction, const Part& part) const {
    const int64_t first = steps_.runs_back(direction) ? steps_.count() - 1 : 0;
    for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
      const bool cut = steps_.cut_before(direction, first, row);
      const auto start = [&](const void* initial, Range own, int64_t columns, auto* target) {
        const bool is_last = own.begin < own.end && own.end == columns;
        const int64_t end = is_last ? stride_ : own.end;
        target += state_offset(direction, row);
        std::memset(target + own.begin, 0, (end - own.begin) * sizeof(*target));
        if (initial != nullptr && !cut) {
          convert(state_row(initial, direction, row, columns) + own.begin, target + own.begin,
                  own.end - own.begin);
        }
      };
      for (F* h : h_) start(args_.h_0, shown_range(part), shown_, h);
      if constexpr (kKeepsDirect) start(args_.h_0, shown_range(part), shown_, direct_);
      if constexpr (Cell::has_cell_state) start(args_.c_0, unit_range(part), hidden_, cell_);
      if (row < steps_.rows(0)) continue;
      const Range own = shown_range(part);
      convert(h_[0] + state_offset(direction, row) + own.begin,
              state_row(args_.h_n, direction, row, shown_) + own.begin, own.end - own.begin);
      copy_cell(direction, part, row);
    }
  }

  void copy_final(int direction, const Part& part, int64_t t, int64_t begin, int64_t end) const {
    const Range own = shown_range(part);
    for (int64_t row = max_of(begin, part.rows.begin); row < min_of(end, part.rows.end); ++row) {
      convert(step_row(static_cast<const S*>(args_.output), direction, t, row, shown_) + own.begin,
              state_row(args_.h_n, direction, row, shown_) + own.begin, own.end - own.begin);
      copy_cell(direction, part, row);
    }
  }

  void copy_cell(int direction, const Part& part, int64_t row) const {
    if constexpr (Cell::has_cell_state) {
      const Range own = unit_range(part);
      convert(cell_ + state_offset(direction, row) + own.begin,
              state_row(args_.c_n, direction, row, hidden_) + own.begin, own.end - own.begin);
    }
  }

  // sums[r * vectors + v] = the block's columns of a weight [gates * columns, depth] times row r.
  void multiply(const S* weight, int gates, int64_t columns, int units, const F* packed,
                int64_t block, const F* const* rows, int count, int64_t depth, int64_t tile,
                V* sums) const {
    const int vectors = units * gates;
    if (packed != nullptr) {
      const F* later = later_of(packed, depth, vectors, tile);
      const int64_t apart = vectors * V::lanes * Step<F>::values;
      return tile_for<Multiply<F>>(vectors, count)(rows, packed, apart, later, depth, sums);
    }
    for (int v = 0; v < vectors; ++v) {
      const int64_t unit = (block * units + v / gates) * V::lanes;
      if (unit >= columns) continue;
      const S* own = weight + (v % gates * columns + unit) * depth;
      for_each_tile(0, count, Dot<S, F>::max_rows, [&](int64_t first, int some, int64_t) {
        V* own_sums = sums + first * vectors + v;
        dot_for<S, F>(some)(rows + first, own, columns - unit, depth, own_sums, vectors);
      });
    }
  }

  // Fills `projected` for `count` steps from t on, for the part's rows and blocks.
  void project(int direction, const Part& part, int64_t t, int64_t step, int64_t count) const {
    const S* x = static_cast<const S*>(args_.x);
    F* copied = copied_ + direction * ahead_ * args_.batch * input_stride_;
    // A tile takes rows across steps, so that a small batch fills it too.
    const auto for_each_row = [&](auto body) {
      for (int64_t slot = 0; slot < count; ++slot) {
        const int64_t now = t + slot * step;
        const int64_t end = min_of(part.rows.end, steps_.rows(now));
        for (int64_t row = part.rows.begin; row < end; ++row) {
          body(slot, row, x + (steps_.offset(now) + row) * input_,
               copied + (slot * args_.batch + row) * input_stride_);
        }
      }
    };
    if constexpr (kCopies) {
      int64_t i = 0;
      for_each_row([&](int64_t, int64_t, const S* from, F* to) {
        if (!part.meets_each_step || i++ % part.size == part.rank) {
          pack_row(from, input_, input_stride_, to);
        }
      });
      if (part.meets_each_step) part.meet();
    }

    const int vectors = units_ * G;
    const int most = max_rows(vectors);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      V biases[kMaxVectors];
      load_bias(static_cast<const S*>(args_.bias_ih[direction]), block, biases);
      const F* rows[kMaxRows];
      T* targets[kMaxRows];
      int gathered = 0;
      int64_t tile = 0;
      const auto multiply_gathered = [&] {
        V sums[kMaxRows * kMaxVectors];
        multiply(static_cast<const S*>(args_.weight_ih[direction]), G, hidden_, units_,
                 packed_ih(direction, block), block, rows, gathered, input_, tile++, sums);
        for (int r = 0; r < gathered; ++r) {
          for (int v = 0; v < vectors; ++v) {
            (sums[r * vectors + v] + biases[v]).store(targets[r] + v * V::lanes);
          }
        }
        gathered = 0;
      };
      for_each_row([&](int64_t slot, int64_t row, const S* from, F* to) {
        if constexpr (kCopies) {
          rows[gathered] = to;
        } else {
          rows[gathered] = from;
        }
        targets[gathered] = projected(direction, block, slot, row);
        if (++gathered == most) multiply_gathered();
      });
      if (gathered > 0) multiply_gathered();
    }
  }

  // The bias of a block's columns; zero beyond H and without a bias.
  void load_bias(const S* bias, int64_t block, V* biases) const {
    for (int v = 0; v < units_ * G; ++v) {
      const int64_t unit = (block * units_ + v / G) * V::lanes;
      const int64_t left = max_of(0, min_of(hidden_ - unit, V::lanes));
      biases[v] = bias == nullptr ? V(T(0)) : V::load(bias + v % G * hidden_ + unit, left);
    }
  }

  // Step t, the i-th of the scan, of its first `end` rows.
  void run_rows(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const int vectors = units_ * G;
    const F* h = h_[i % 2];
    const int64_t slot = i % ahead_;
    const bool is_zero = i == 0 && args_.h_0 == nullptr;
    end = min_of(end, part.rows.end);
    const int64_t group = blocks_at_once(end - part.rows.begin);
    for (int64_t first = part.blocks.begin; first < part.blocks.end; first += group) {
      const int64_t last = min_of(first + group, part.blocks.end);
      V biases[kMaxBlocks * kMaxVectors];
      for (int64_t b = first; b < last; ++b) {
        load_bias(static_cast<const S*>(args_.bias_hh[direction]), b,
                  biases + (b - first) * vectors);
      }
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V sums[kMaxRows * kMaxVectors];
        if (is_zero) {
          for (int j = 0; j < (last - first) * count * vectors; ++j) sums[j] = V(T(0));
        } else {
          const F* rows[kMaxRows];
          for (int r = 0; r < count; ++r) rows[r] = h + state_offset(direction, row + r);
          if (group > 1 && last - first == group) {
            const int64_t apart = packed_depth<F>(shown_) * width_;
            tile_for<MultiplyBlocks<F>>(vectors, count)(rows, packed_hh(direction, first), apart,
                                                        shown_, sums);
          } else {
            for (int64_t b = first; b < last; ++b) {
              multiply(static_cast<const S*>(args_.weight_hh[direction]), G, hidden_, units_,
                       packed_hh(direction, b), b, rows, count, shown_, index,
                       sums + (b - first) * count * vectors);
            }
          }
        }
        for (int64_t b = first; b < last; ++b) {
          for (int u = 0; u < units_; ++u) {
            const int64_t unit = (b * units_ + u) * V::lanes;
            const Tile tile{direction,
                            t,
                            i,
                            row,
                            count,
                            unit,
                            sums + (b - first) * count * vectors + u * G,
                            biases + (b - first) * vectors + u * G,
                            projected(direction, b, slot, row) + u * G * V::lanes};
            if (hidden_ - unit >= V::lanes) {
              finish<true>(tile);
            } else if (hidden_ > unit) {
              finish<false>(tile);
            }
          }
        }
      };
      for_each_tile(part.rows.begin, end, max_rows(vectors), run_tile);
    }
  }

  // One or two rows take several blocks together: their products fill the multipliers, and their
  // cells, one chain of dependent operations each, run side by side.
  static constexpr int kMaxBlocks = MultiplyBlocks<F>::blocks(1);
  int64_t blocks_at_once(int64_t rows) const {
    const bool few = 0 < rows && rows <= MultiplyBlocks<F>::max_rows && packed_hh_ != nullptr;
    return few ? MultiplyBlocks<F>::blocks(static_cast<int>(rows)) : 1;
  }

  // h_t = W_hr times what run_rows left, for the part's rows and features.
  void project_hidden(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const Range blocks = shown_blocks(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto run_tile = [&](int64_t row, int count, int64_t index) {
        V sums[kMaxRows * kMaxVectors];
        const F* rows[kMaxRows];
        for (int r = 0; r < count; ++r) rows[r] = unprojected_ + state_offset(direction, row + r);
        multiply(static_cast<const S*>(args_.weight_hr[direction]), 1, shown_, hr_.units,
                 packed_hr(direction, block), block, rows, count, hidden_, index, sums);
        for (int r = 0; r < count; ++r) {
          S* output = step_row(static_cast<S*>(args_.output), direction, t, row + r, shown_);
          F* h_next = h_[(i + 1) % 2] + state_offset(direction, row + r);
          const bool cut = steps_.cut_after(direction, t, row + r);
          for (int u = 0; u < hr_.units; ++u) {
            const int64_t column = (block * hr_.units + u) * V::lanes;
            const int64_t left = min_of(shown_ - column, V::lanes);
            if (left <= 0) break;
            V h = sums[r * hr_.units + u];
            if (left < V::lanes) h = first_lanes(h, left);
            h.store(output + column, left);
            (cut ? V(T(0)) : h).store(h_next + column);
          }
        }
      };
      for_each_tile(part.rows.begin, min_of(end, part.rows.end), max_rows(hr_.units), run_tile);
    }
  }

  // One vector of units of some rows.
  struct Tile {
    int direction;
    int64_t t, i, row;
    int count;
    int64_t unit;
    const V* sums;       // W_hh h_{t-1}
    const V* bias;       // b_hh
    const T* projected;  // W_ih x_t + b_ih
  };

  // The cell on one tile. Full: no lane lies beyond H.
  template <bool Full>
  void finish(const Tile& tile) const {
    const int64_t left = hidden_ - tile.unit;
    const auto store = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };

    const int64_t n = steps_.offset(tile.t) + tile.row;
    const int64_t features = args_.directions * hidden_;
    const int64_t feature = n * features + tile.direction * hidden_ + tile.unit;
    const int64_t state = state_offset(tile.direction, tile.row) + tile.unit;
    const F* h_prev = h_[tile.i % 2] + state;
    F* h_next = h_[(tile.i + 1) % 2] + state;
    T* kept_direct = direct_ + state;
    T* cell = cell_ + state;
    F* unprojected = unprojected_ + state;
    S* output = static_cast<S*>(args_.output) + feature;
    T* extra = args_.extra == nullptr ? nullptr : static_cast<T*>(args_.extra) + feature;
    S* gates = static_cast<S*>(args_.gates[tile.direction]);
    if (gates != nullptr) gates += n * G * hidden_ + tile.unit;

    for (int r = 0; r < tile.count; ++r) {
      V x[G], recurrent[G], kept(T(0)), direct(T(0));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        x[g] = V::load(tile.projected + r * width_ + g * V::lanes);
        recurrent[g] = tile.sums[r * units_ * G + g] + tile.bias[g];
      }
      if constexpr (kKeepsDirect) {
        direct = V::load(kept_direct + r * stride_);
      } else if constexpr (Cell::has_direct_path) {
        direct = V::load(h_prev + r * stride_);
      }
      if constexpr (Cell::has_cell_state) kept = V::load(cell + r * stride_);

      V h = Cell::forward(x, recurrent, direct, kept);
      if constexpr (!Full) h = first_lanes(h, left);

      if constexpr (Cell::saves_gates) {
        if (gates != nullptr) {
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) store(gates + (r * G + g) * hidden_, x[g]);
        }
      }
      if constexpr (Cell::has_extra) {
        if (extra != nullptr) store(extra + r * features, kept);
      }
      const bool cut = steps_.cut_after(tile.direction, tile.t, tile.row + r);
      if (projects_) {
        h.store(unprojected + r * stride_);
      } else {
        store(output + r * features, h);
        (cut ? V(T(0)) : h).store(h_next + r * stride_);
        if constexpr (kKeepsDirect) (cut ? V(T(0)) : h).store(kept_direct + r * stride_);
      }
      if constexpr (Cell::has_cell_state) (cut ? V(T(0)) : kept).store(cell + r * stride_);
    }
  }
};

template <class Device, class Cell, class S>
void forward_dev_impl(const Device& device, const ForwardArgs& args) {
  Workspace workspace;
  const ForwardScan<Cell, S> scan(args, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
