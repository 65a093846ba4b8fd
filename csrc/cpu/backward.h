// The backward scan on the CPU, in the shape of the forward one: a register tile computes the part
// of dh_t that comes through W_hh from the following step, and the cell turns dh_t into gate
// gradients. Some steps at a time, these go on into the gradients of the input and of the weights.
// Where h is projected, its gradient is completed first and a second product per step takes it to
// the units.
#pragma once

#include "gradients.h"
#include "math.h"
#include "multiply.h"
#include "pack.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
class BackwardScan {
  using T = Compute<S>;
  using F = Factor<S>;
  using V = Vec<T>;
  // Gate gradients are kept as factors of products too, where these have another type.
  static constexpr bool kNarrows = !std::is_same_v<F, T>;
  static constexpr int kValues = Step<F>::values;
  static constexpr bool kZips = kValues > 1;
  static constexpr int G = Cell::gates;
  // Rows of gate gradients in a chunk: a panel of as many rows, one register tile wide, fits into
  // L1.
  static constexpr int64_t kChunkRows = 128;
  static constexpr int64_t kShortSum = 8;
  static constexpr int64_t kFewRows = 32;

 public:
  BackwardScan(const BackwardArgs& args, int threads, Workspace& workspace)
      : args_(args),
        steps_(args, workspace),
        input_(args.input),
        hidden_(args.hidden),
        shown_(args.proj),
        wide_(G * args.hidden),
        projects_(args.weight_hr[0] != nullptr),
        stride_(odd_lines<T>(wide_)),
        chunk_steps_(max_of(1, min_of(args.steps, kChunkRows / max_of(1, args.batch)))),
        threads_(threads),
        hh_(args.proj),
        ih_(args.input),
        hr_(args.hidden),
        is_one_chunk_(args.steps > 0 && args.steps <= chunk_steps_),
        gradient_ih_(wide_, args.input, args.directions, !is_one_chunk_, workspace),
        gradient_hh_(wide_, args.proj, args.directions, !is_one_chunk_, workspace),
        gradient_hr_(projects_ ? args.proj : 0, args.hidden, args.directions, !is_one_chunk_,
                     workspace) {
    const size_t directions = args.directions;
    const size_t states = directions * args.batch * hidden_;
    const size_t projected = projects_ ? directions * chunk_rows() : 0;
    const auto take_packed = [&](bool is_used, const Columns<T>& columns, int64_t depth) {
      const size_t size = directions * columns.blocks * packed_depth<F>(depth) * columns.width;
      return workspace.take<F>(is_used ? size : 0);
    };
    packed_hh_ = take_packed(multiplies_hh(), hh_, wide_);
    packed_ih_ = take_packed(args.d_x != nullptr, ih_, wide_);
    packed_hr_ = take_packed(projects_, hr_, shown_);
    chunk_h_ = workspace.take<T>(projected * stride_);
    chunk_hidden_ = workspace.take<F>(projected * stride_);
    carry_h_ = workspace.take<T>(Cell::has_direct_path ? states : 0);
    carry_c_ = workspace.take<T>(Cell::has_cell_state ? states : 0);
    carry_gates_ = workspace.take<F>(directions * args.batch * stride_);
    chunk_ = workspace.take<T>(directions * chunk_rows() * stride_);
    chunk_hh_ =
        Cell::splits_gradient ? workspace.take<T>(directions * chunk_rows() * stride_) : chunk_;
    factors_ = take_factors(chunk_, directions, workspace);
    factors_hh_ = chunk_hh_ == chunk_ ? factors_ : take_factors(chunk_hh_, directions, workspace);
    factors_h_ = projects_ ? take_factors(chunk_h_, directions, workspace) : nullptr;
    zipped_ = take_zipped(factors_, directions, workspace);
    zipped_hh_ =
        factors_hh_ == factors_ ? zipped_ : take_zipped(factors_hh_, directions, workspace);
    zipped_h_ = projects_ ? take_zipped(factors_h_, directions, workspace) : nullptr;
    bias_ih_ = workspace.take<T>(directions * stride_);
    bias_hh_ = Cell::splits_gradient ? workspace.take<T>(directions * stride_) : bias_ih_;
    panels_ = workspace.take<F>(directions * threads * packed_depth<F>(chunk_rows()) * kMaxVectors *
                                V::lanes);
    sources_ = workspace.take<const S*>(directions * threads * chunk_rows());
    zeros_ = workspace.take<F>(stride_);
    std::memset(zeros_, 0, stride_ * sizeof(F));
  }

  Work work() const {
    return {args_.steps,
            steps_.mean_rows(),
            wide_ * 4,  // every weight is met twice
            hh_.blocks,
            hh_.units,
            max_rows(hh_.units),
            args_.directions,
            args_.batch_sizes != nullptr};
  }

  void run(int direction, const Part& part) const {
    pack(direction, part);
    start_gradients(direction, part);
    const int64_t step = steps_.runs_back(direction) ? -1 : 1;
    int64_t t = step == 1 ? steps_.count() - 1 : 0;
    for (int64_t i = 0; i < steps_.count(); i += chunk_steps_) {
      const int64_t count = min_of(chunk_steps_, steps_.count() - i);
      const int64_t last = t - (count - 1) * step;
      const Chunk chunk = make_chunk(min_of(t, last), max_of(t, last));
      for (; t != last - step; t -= step) run_step(direction, part, chunk, t, step);
      // The gate gradients of the chunk are complete; all threads share the products with them.
      if (!part.meets_each_step) part.meet();
      if constexpr (kZips) {
        zip_factors(direction, part, chunk);
        part.meet();
      }
      add_gradients(direction, part, chunk, step);
      keep_last(direction, part, chunk, last);
      part.meet();
    }
    finish_rows(
        direction, part, false, [](int64_t) { return nullptr; }, steps_.rows(0), args_.batch);
    write_gradients(direction, part);
  }

 private:
  const BackwardArgs& args_;
  const Steps steps_;
  const int64_t input_, hidden_, shown_, wide_;
  const bool projects_;
  const int64_t stride_;  // between rows of gate gradients
  const int64_t chunk_steps_;
  const int threads_;
  const Columns<T> hh_, ih_, hr_;
  const bool is_one_chunk_;
  const WeightGradient<F> gradient_ih_, gradient_hh_, gradient_hr_;
  F* packed_hh_;
  F* packed_hr_;
  F* packed_ih_;
  // What a step hands to the one before it: [D, B, H], and the gate gradients of a chunk's last
  // step.
  T* carry_h_;
  T* carry_c_;
  F* carry_gates_;
  T* chunk_;  // [D, rows of a chunk, stride]
  T* chunk_hh_;
  F* factors_;  // the same as factors of products
  F* factors_hh_;
  F* factors_h_;
  F* zipped_;  // the same again, pairs of rows zipped where steps take two values
  F* zipped_hh_;
  F* zipped_h_;
  T* chunk_h_;       // the same rows: gradients of a projected h
  F* chunk_hidden_;  // and what it was projected from
  T* bias_ih_;       // [D, stride]
  T* bias_hh_;
  F* panels_;
  const S** sources_;
  F* zeros_;  // the gate gradients of a step beyond a reset

  // Steps [first, last] in time, which are `rows` rows of features from `begin` on.
  struct Chunk {
    int64_t first, last, begin, rows;
  };

  int64_t chunk_rows() const { return chunk_steps_ * args_.batch; }
  int64_t zipped_rows() const { return packed_depth<F>(chunk_rows()); }

  Chunk make_chunk(int64_t first, int64_t last) const {
    const int64_t begin = steps_.offset(first);
    return {first, last, begin, steps_.offset(last) + steps_.rows(last) - begin};
  }

  F* take_factors(T* chunk, size_t directions, Workspace& workspace) const {
    if constexpr (kNarrows) {
      const size_t count = directions * chunk_rows() * stride_;
      return static_cast<F*>(std::memset(workspace.take<F>(count), 0, count * sizeof(F)));
    } else {
      return chunk;
    }
  }

  F* take_zipped(F* factors, size_t directions, Workspace& workspace) const {
    if constexpr (kZips) return workspace.take<F>(directions * zipped_rows() * stride_);
    return factors;
  }

  template <class Element>
  Element* chunk_row(Element* base, int direction, int64_t row) const {
    return base + (direction * chunk_rows() + row) * stride_;
  }

  // Where one step stands among its neighbours in scan order.
  struct Step {
    int64_t t, before;
    bool has_after, has_before;
    const F* after;  // the gate gradients of the step after t
    const Chunk& chunk;
  };

  void run_step(int direction, const Part& part, const Chunk& chunk, int64_t t,
                int64_t step) const {
    const int64_t rows = steps_.rows(t);
    const int64_t going_on = min_of(rows, steps_.rows(t + step));  // their scan has a step after t
    const int64_t old = min_of(rows, steps_.rows(t - step));       // their scan has a step before t
    const F* after = nullptr;
    if (going_on > 0) {
      const bool inside = chunk.first <= t + step && t + step <= chunk.last;
      after = inside ? chunk_row(factors_hh_, direction, steps_.offset(t + step) - chunk.begin)
                     : carry_gates_ + direction * args_.batch * stride_;
    }
    // At most one of the two lies between: rows end in one direction and begin in the other.
    const int64_t cut = going_on > 0 && going_on < rows ? going_on : old;
    run_rows(direction, part, {t, t - step, going_on > 0, old > 0, after, chunk}, 0, cut);
    run_rows(direction, part, {t, t - step, going_on == rows, old == rows, after, chunk}, cut,
             rows);
    if (part.meets_each_step) part.meet();
    // Rows whose scan began at t are through.
    const F* now = chunk_row(factors_hh_, direction, steps_.offset(t) - chunk.begin);
    const auto first = [&](int64_t row) {
      return steps_.cut_before(direction, t, row) ? zeros_ : now + row * stride_;
    };
    finish_rows(direction, part, true, first, old, rows);
  }

  // In [D, B, columns]
  int64_t state_offset(int direction, int64_t row, int64_t columns) const {
    return (direction * args_.batch + row) * columns;
  }
  // In [N, D*columns]
  int64_t feature_offset(int direction, int64_t t, int64_t row, int64_t columns) const {
    return ((steps_.offset(t) + row) * args_.directions + direction) * columns;
  }
  static const S* at(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const S*>(base) + offset;
  }
  static const T* extra_at(const void* base, int64_t offset) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
  }
  F* packed_hh(int direction, int64_t block) const {
    return packed_hh_ + (direction * hh_.blocks + block) * packed_depth<F>(wide_) * hh_.width;
  }
  F* packed_hr(int direction, int64_t block) const {
    return packed_hr_ + (direction * hr_.blocks + block) * packed_depth<F>(shown_) * hr_.width;
  }
  F* packed_ih(int direction, int64_t block) const {
    return packed_ih_ + (direction * ih_.blocks + block) * packed_depth<F>(wide_) * ih_.width;
  }

  // One step alone has none after it.
  bool multiplies_hh() const { return args_.steps > 1 || args_.d_h_0 != nullptr; }

  // Few rows read whole blocks of a weight as they lie: a copy would take longer than the product.
  bool packs(const Columns<T>& columns, int64_t block, int64_t width) const {
    const bool is_whole = (block + 1) * columns.width <= width;
    return !is_whole || !kReadsUnpacked || steps_.total() > kFewRows;
  }
  static constexpr bool kReadsUnpacked = std::is_same_v<S, F> && !kZips;

  void pack(int direction, const Part& part) const {
    const auto pack_blocks = [&](Range blocks, const Columns<T>& columns, const void* weight,
                                 int64_t depth, int64_t width, auto target) {
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        if (!packs(columns, b, width)) continue;
        pack_backward(static_cast<const S*>(weight), depth, width, columns.units, b, target(b));
      }
    };
    // Threads that split rows share the weights, threads that split units need only their own.
    const auto all = [&part](int64_t blocks) { return share(blocks, part.rank, part.size); };
    if (multiplies_hh()) {
      pack_blocks(part.meets_each_step ? part.blocks : all(hh_.blocks), hh_,
                  args_.weight_hh[direction], wide_, shown_,
                  [&](int64_t b) { return packed_hh(direction, b); });
    }
    if (projects_) {
      pack_blocks(all(hr_.blocks), hr_, args_.weight_hr[direction], shown_, hidden_,
                  [&](int64_t b) { return packed_hr(direction, b); });
    }
    if (args_.d_x != nullptr) {
      pack_blocks(all(ih_.blocks), ih_, args_.weight_ih[direction], wide_, input_,
                  [&](int64_t b) { return packed_ih(direction, b); });
    }
    part.meet();
  }

  // sums[r * units + u] = the columns of a block of a weight [depth, width] times row r.
  void multiply(const Columns<T>& columns, const void* weight, int64_t width, F* packed,
                int64_t block, const F* const* rows, int count, int64_t depth, int64_t tile,
                V* sums) const {
    const F* from = packed;
    int64_t apart = columns.width * kValues;
    if constexpr (kReadsUnpacked) {
      if (!packs(columns, block, width)) {
        from = static_cast<const F*>(weight) + block * columns.width;
        apart = width;
      }
    }
    const F* later = later_of(from, depth, columns.units, tile);
    tile_for<Multiply<F>>(columns.units, count)(rows, from, apart, later, depth, sums);
  }

  // Calls finish(row, count, column, sums) for every vector of columns of h of every tile of rows
  // [begin, end); sums[r * units + u] is W_hh^T times the gate gradients `after(row)`, or zero
  // without any. Before that, fetch(row, count, column) may ask for what finish will read.
  template <class After, class Fetch, class Finish>
  void for_each_column(int direction, const Part& part, bool has_after, After after, int64_t begin,
                       int64_t end, Fetch fetch, Finish finish) const {
    begin = max_of(begin, part.rows.begin);
    end = min_of(end, part.rows.end);
    for (int64_t block = part.blocks.begin; block < part.blocks.end; ++block) {
      for_each_tile(begin, end, max_rows(hh_.units), [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        if (has_after) {
          fetch(row, count, block * hh_.width);
          const F* rows[kMaxRows];
          for (int r = 0; r < count; ++r) rows[r] = after(row + r);
          multiply(hh_, args_.weight_hh[direction], shown_, packed_hh(direction, block), block,
                   rows, count, wide_, i, sums);
        } else {
          for (int j = 0; j < count * hh_.units; ++j) sums[j] = V(T(0));
        }
        for (int u = 0; u < hh_.units; ++u) {
          const int64_t column = (block * hh_.units + u) * V::lanes;
          if (column < shown_) finish(row, count, column, sums + u);
        }
      });
    }
  }

  void run_rows(int direction, const Part& part, const Step& step, int64_t begin,
                int64_t end) const {
    const auto fetch = [&](int64_t row, int count, int64_t unit) {
      const int64_t bytes = hh_.width * sizeof(T);
      for (int r = 0; r < count; ++r) {
        const int64_t n = (steps_.offset(step.t) + row + r) * G * hidden_ + unit;
        const int64_t feature = feature_offset(direction, step.t, row + r, shown_) + unit;
        if constexpr (Cell::saves_gates) {
          for (int g = 0; g < G; ++g) {
            prefetch(at(args_.gates[direction], n + g * hidden_), bytes);
          }
        }
        if (args_.d_output != nullptr) prefetch(at(args_.d_output, feature), bytes);
      }
    };
    const auto after = [&](int64_t row) {
      return steps_.cut_after(direction, step.t, row) ? zeros_ : step.after + row * stride_;
    };
    const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
      if (projects_) {
        keep_shown(direction, step, row, count, column, sums);
      } else if (hidden_ - column >= V::lanes) {
        differentiate<true>(direction, step, row, count, column, sums, hh_.units);
      } else {
        differentiate<false>(direction, step, row, count, column, sums, hh_.units);
      }
    };
    for_each_column(direction, part, step.has_after, after, begin, end, fetch, finish);
    if (projects_) {
      if (part.meets_each_step) part.meet();
      run_projected_rows(direction, part, step, begin, end);
    }
  }

  // The gradient of a projected h_t, complete.
  void keep_shown(int direction, const Step& step, int64_t row, int count, int64_t column,
                  const V* sums) const {
    const int64_t left = min_of(shown_ - column, V::lanes);
    for (int r = 0; r < count; ++r) {
      V dh = sums[r * hh_.units];
      if (args_.d_output != nullptr) {
        dh = dh + V::load(at(args_.d_output,
                             feature_offset(direction, step.t, row + r, shown_) + column),
                          left);
      }
      if (!step.has_after && args_.d_h_n != nullptr) {
        dh = dh + V::load(at(args_.d_h_n, state_offset(direction, row + r, shown_) + column), left);
      }
      const int64_t local = steps_.offset(step.t) + row + r - step.chunk.begin;
      if (left < V::lanes) dh = first_lanes(dh, left);
      dh.store(chunk_row(chunk_h_, direction, local) + column);
      if constexpr (kNarrows) dh.store(chunk_row(factors_h_, direction, local) + column);
    }
  }

  // W_hr^T takes it to the units, where the cell takes over.
  void run_projected_rows(int direction, const Part& part, const Step& step, int64_t begin,
                          int64_t end) const {
    const Range blocks = hr_blocks(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto run_tile = [&](int64_t row, int count, int64_t i) {
        V sums[kMaxRows * kMaxVectors];
        const F* rows[kMaxRows];
        const int64_t local = steps_.offset(step.t) + row - step.chunk.begin;
        for (int r = 0; r < count; ++r) rows[r] = chunk_row(factors_h_, direction, local + r);
        multiply(hr_, args_.weight_hr[direction], hidden_, packed_hr(direction, block), block, rows,
                 count, shown_, i, sums);
        for (int u = 0; u < hr_.units; ++u) {
          const int64_t unit = (block * hr_.units + u) * V::lanes;
          if (hidden_ - unit >= V::lanes) {
            differentiate<true>(direction, step, row, count, unit, sums + u, hr_.units);
          } else if (hidden_ > unit) {
            differentiate<false>(direction, step, row, count, unit, sums + u, hr_.units);
          }
        }
      };
      for_each_tile(max_of(begin, part.rows.begin), min_of(end, part.rows.end), max_rows(hr_.units),
                    run_tile);
    }
  }

  Range hr_blocks(const Part& part) const {
    return part.meets_each_step ? share(hr_.blocks, part.rank, part.size) : Range{0, hr_.blocks};
  }
  // The part's own units of the cell state.
  Range unit_range(const Part& part) const {
    const Range blocks = projects_ ? hr_blocks(part) : part.blocks;
    return {min_of(blocks.begin * hr_.width, hidden_), min_of(blocks.end * hr_.width, hidden_)};
  }

  // The cell's backward on one vector of units of some rows; sums[r * stride] is what reaches h by
  // a product. Full: no lane lies beyond H.
  template <bool Full>
  void differentiate(int direction, const Step& step, int64_t row, int count, int64_t unit,
                     const V* sums, int stride) const {
    const int64_t left = hidden_ - unit;
    const auto load = [left](const auto* p) {
      if constexpr (Full) return V::load(p);
      return V::load(p, left);
    };
    const auto load_or_zero = [&load](const auto* p) { return p == nullptr ? V(T(0)) : load(p); };
    const auto store = [left](auto* p, V v) {
      if constexpr (Full) return v.store(p);
      return v.store(p, left);
    };

    for (int r = 0; r < count; ++r) {
      const int64_t n = (steps_.offset(step.t) + row + r) * G * hidden_ + unit;
      const int64_t state = state_offset(direction, row + r, hidden_) + unit;
      const int64_t feature = feature_offset(direction, step.t, row + r, hidden_) + unit;
      const int64_t before =
          step.has_before ? feature_offset(direction, step.before, row + r, hidden_) + unit : 0;

      const bool cut = steps_.cut_before(direction, step.t, row + r);
      V gate[G], h_prev(T(0)), h(T(0)), extra_prev(T(0)), extra(T(0)), d_extra(T(0));
      if constexpr (Cell::saves_gates) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) gate[g] = load(at(args_.gates[direction], n + g * hidden_));
      } else {
        h = load(at(args_.output, feature));
      }
      if constexpr (Cell::has_extra) extra = load(extra_at(args_.extra, feature));
      if (Cell::has_direct_path && !cut) {
        h_prev =
            step.has_before ? load(at(args_.output, before)) : load_or_zero(at(args_.h_0, state));
      }
      if constexpr (Cell::has_cell_state) {
        if (!cut) {
          extra_prev = step.has_before ? load(extra_at(args_.extra, before))
                                       : load_or_zero(at(args_.c_0, state));
        }
        d_extra = step.has_after ? load(carry_c_ + state) : load_or_zero(at(args_.d_c_n, state));
        if (args_.d_extra != nullptr) d_extra = d_extra + load(extra_at(args_.d_extra, feature));
      }

      V dh = sums[r * stride];
      if (!projects_) {
        if (args_.d_output != nullptr) dh = dh + load(at(args_.d_output, feature));
        if (!step.has_after) dh = dh + load_or_zero(at(args_.d_h_n, state));
      }
      if (Cell::has_direct_path && step.has_after) dh = dh + load(carry_h_ + state);

      V dx[G], dr[G];
      const V direct = Cell::backward(gate, h_prev, h, extra_prev, extra, dh, d_extra, dx, dr);

      const int64_t local = steps_.offset(step.t) + row + r - step.chunk.begin;
      if constexpr (Cell::has_cell_state) {
        if (projects_) {
          Cell::hidden(gate, extra).store(chunk_row(chunk_hidden_, direction, local) + unit);
        }
      }
      T* d_gates = chunk_row(chunk_, direction, local) + unit;
      T* d_gates_hh = chunk_row(chunk_hh_, direction, local) + unit;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        store(d_gates + g * hidden_, dx[g]);
        if constexpr (Cell::splits_gradient) store(d_gates_hh + g * hidden_, dr[g]);
        if constexpr (kNarrows) {
          store(chunk_row(factors_, direction, local) + unit + g * hidden_, dx[g]);
          if constexpr (Cell::splits_gradient) {
            store(chunk_row(factors_hh_, direction, local) + unit + g * hidden_, dr[g]);
          }
        }
      }
      if constexpr (Cell::has_direct_path) store(carry_h_ + state, cut ? V(T(0)) : direct);
      if constexpr (Cell::has_cell_state) store(carry_c_ + state, cut ? V(T(0)) : d_extra);
    }
  }

  // Gradients of the initial states of rows whose scan has ended; first(row) are the gate gradients
  // of its first step. Rows without steps have none: their final states were the initial ones.
  template <class First>
  void finish_rows(int direction, const Part& part, bool had_steps, First first, int64_t begin,
                   int64_t end) const {
    if (args_.d_h_0 != nullptr) {
      const auto fetch = [](int64_t, int, int64_t) {};
      const auto finish = [&](int64_t row, int count, int64_t column, const V* sums) {
        const int64_t left = min_of(shown_ - column, V::lanes);
        for (int r = 0; r < count; ++r) {
          const int64_t state = state_offset(direction, row + r, shown_) + column;
          V dh = sums[r * hh_.units];
          if (!had_steps) {
            dh = args_.d_h_n == nullptr ? V(T(0)) : V::load(at(args_.d_h_n, state), left);
          } else if constexpr (Cell::has_direct_path) {
            dh = dh + V::load(carry_h_ + state, left);
          }
          dh.store(static_cast<S*>(args_.d_h_0) + state, left);
        }
      };
      for_each_column(direction, part, had_steps, first, begin, end, fetch, finish);
    }
    if (args_.d_c_0 != nullptr && Cell::has_cell_state) {
      const Range own = unit_range(part);
      const int64_t count = own.end - own.begin;
      const int64_t last = min_of(end, part.rows.end);
      for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
        const int64_t state = state_offset(direction, row, hidden_) + own.begin;
        S* d_c_0 = static_cast<S*>(args_.d_c_0) + state;
        if (had_steps) {
          convert(carry_c_ + state, d_c_0, count);
        } else if (args_.d_c_n != nullptr) {
          convert(at(args_.d_c_n, state), d_c_0, count);
        } else {
          std::memset(d_c_0, 0, count * sizeof(S));
        }
      }
    }
  }

  enum class Weight { kInput, kRecurrent, kProjection };

  // The part's own share of the weight gradients: body(gradient, weight, block, rows of the
  // weight). The same at every call, so that no sum is ever touched by two threads.
  template <class Body>
  void for_each_gradient(int direction, const Part& part, Body body) const {
    const int64_t ih = args_.d_weight_ih[direction] == nullptr ? 0 : gradient_ih_.blocks();
    const int64_t hh = args_.d_weight_hh[direction] == nullptr ? 0 : gradient_hh_.blocks();
    const int64_t hr = args_.d_weight_hr[direction] == nullptr ? 0 : gradient_hr_.blocks();
    const int64_t blocks = ih + hh + hr;
    if (blocks == 0) return;
    const int cuts = static_cast<int>((part.size + blocks - 1) / blocks);
    const Range items = share(blocks * cuts, part.rank, part.size);
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t block = i / cuts;
      const int cut = static_cast<int>(i % cuts);
      if (block < ih) {
        body(gradient_ih_, Weight::kInput, block, share(wide_, cut, cuts));
      } else if (block < ih + hh) {
        body(gradient_hh_, Weight::kRecurrent, block - ih, share(wide_, cut, cuts));
      } else {
        body(gradient_hr_, Weight::kProjection, block - ih - hh, share(shown_, cut, cuts));
      }
    }
  }

  S* target(int direction, Weight weight) const {
    void* const* targets = weight == Weight::kInput       ? args_.d_weight_ih
                           : weight == Weight::kRecurrent ? args_.d_weight_hh
                                                          : args_.d_weight_hr;
    return static_cast<S*>(targets[direction]);
  }

  // The part's own columns of the bias gradients.
  Range bias_columns(const Part& part) const {
    const Range vectors = share((wide_ + V::lanes - 1) / V::lanes, part.rank, part.size);
    return {vectors.begin * V::lanes, vectors.end * V::lanes};
  }

  void start_gradients(int direction, const Part& part) const {
    const auto clear = [&](const WeightGradient<F>& gradient, Weight, int64_t block, Range rows) {
      gradient.clear(direction, block, rows);
    };
    if (!is_one_chunk_) for_each_gradient(direction, part, clear);
    const Range columns = bias_columns(part);
    for (T* bias : {bias_ih_, bias_hh_}) {
      std::memset(bias + direction * stride_ + columns.begin, 0,
                  (columns.end - columns.begin) * sizeof(T));
    }
  }

  F* zipped(F* base, int direction) const { return base + direction * zipped_rows() * stride_; }

  void zip_factors(int direction, const Part& part, const Chunk& chunk) const {
    const Range pairs = share((chunk.rows + 1) / 2, part.rank, part.size);
    const auto zip = [&](F* from, F* to) {
      for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
        const F* even = chunk_row(from, direction, 2 * pair);
        zip_rows(even, 2 * pair + 1 < chunk.rows ? even + stride_ : nullptr, stride_, stride_,
                 zipped(to, direction) + 2 * pair * stride_);
      }
    };
    zip(factors_, zipped_);
    if (factors_hh_ != factors_) zip(factors_hh_, zipped_hh_);
    if (projects_) zip(factors_h_, zipped_h_);
  }

  // Adds a chunk to the gradients of the weights and biases, and writes that of its input.
  void add_gradients(int direction, const Part& part, const Chunk& chunk, int64_t step) const {
    const int64_t scratch = direction * threads_ + part.rank;
    F* panel = panels_ + scratch * packed_depth<F>(chunk_rows()) * kMaxVectors * V::lanes;
    const S** sources = sources_ + scratch * chunk_rows();
    for_each_gradient(
        direction, part,
        [&](const WeightGradient<F>& gradient, Weight weight, int64_t block, Range rows) {
          const F* left = zipped(zipped_, direction);
          if (weight == Weight::kProjection) {
            const F* hidden = chunk_row(chunk_hidden_, direction, 0);
            left = zipped(zipped_h_, direction);
            gradient.pack(
                block, [&](int64_t k) { return hidden + k * stride_; }, chunk.rows, panel);
          } else {
            if (weight == Weight::kRecurrent) {
              left = zipped(zipped_hh_, direction);
              find_previous(direction, chunk, step, sources);
            } else {
              for (int64_t k = 0; k < chunk.rows; ++k)
                sources[k] = at(args_.x, (chunk.begin + k) * input_);
            }
            gradient.pack(block, [&](int64_t k) { return sources[k]; }, chunk.rows, panel);
          }
          if (is_one_chunk_) {
            gradient.assign(block, rows, left, stride_, panel, chunk.rows,
                            target(direction, weight));
          } else {
            gradient.add(direction, block, rows, left, stride_, panel, chunk.rows);
          }
        });
    if (args_.d_bias_ih[direction] != nullptr) {
      add_bias(chunk_row(chunk_, direction, 0), chunk.rows, bias_columns(part),
               bias_ih_ + direction * stride_);
      if constexpr (Cell::splits_gradient) {
        add_bias(chunk_row(chunk_hh_, direction, 0), chunk.rows, bias_columns(part),
                 bias_hh_ + direction * stride_);
      }
    }
    if (args_.d_x != nullptr) write_d_x(direction, part, chunk);
  }

  // Where h_{t-1} of each row of the chunk lies; null for zeros.
  void find_previous(int direction, const Chunk& chunk, int64_t step, const S** sources) const {
    for (int64_t t = chunk.first; t <= chunk.last; ++t) {
      const int64_t old = steps_.rows(t - step);
      for (int64_t row = 0; row < steps_.rows(t); ++row) {
        *sources++ = steps_.cut_before(direction, t, row) ? nullptr
                     : row < old
                         ? at(args_.output, feature_offset(direction, t - step, row, shown_))
                         : at(args_.h_0, state_offset(direction, row, shown_));
      }
    }
  }

  void add_bias(const T* d_gates, int64_t rows, Range columns, T* bias) const {
    for (int64_t j = columns.begin; j < columns.end; j += V::lanes) {
      V sum(T(0));  // a sum of short sums loses less than a long one
      for (int64_t k = 0; k < rows; k += kShortSum) {
        V part(T(0));
        for (int64_t i = k; i < min_of(k + kShortSum, rows); ++i) {
          part = part + V::load(d_gates + i * stride_ + j);
        }
        sum = sum + part;
      }
      (V::load(bias + j) + sum).store(bias + j);
    }
  }

  void write_d_x(int direction, const Part& part, const Chunk& chunk) const {
    // Each thread its own columns, or its own rows where there are too few columns.
    const bool by_columns = ih_.blocks >= part.size;
    const Range blocks =
        by_columns ? share(ih_.blocks, part.rank, part.size) : Range{0, ih_.blocks};
    const Range own = by_columns ? Range{0, chunk.rows} : share(chunk.rows, part.rank, part.size);
    S* d_x = static_cast<S*>(args_.d_x) + (direction * steps_.total() + chunk.begin) * input_;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for_each_tile(own.begin, own.end, max_rows(ih_.units),
                    [&](int64_t row, int count, int64_t i) {
                      V sums[kMaxRows * kMaxVectors];
                      const F* rows[kMaxRows];
                      for (int r = 0; r < count; ++r)
                        rows[r] = chunk_row(factors_, direction, row + r);
                      multiply(ih_, args_.weight_ih[direction], input_, packed_ih(direction, block),
                               block, rows, count, wide_, i, sums);
                      for (int r = 0; r < count; ++r) {
                        for (int u = 0; u < ih_.units; ++u) {
                          const int64_t column = (block * ih_.units + u) * V::lanes;
                          const int64_t left = input_ - column;
                          S* target = d_x + (row + r) * input_ + column;
                          if (left >= V::lanes) {
                            sums[r * ih_.units + u].store(target);
                          } else if (left > 0) {
                            sums[r * ih_.units + u].store(target, left);
                          }
                        }
                      }
                    });
    }
  }

  // The step before the chunk's last one will ask for its gate gradients when the chunk is gone.
  void keep_last(int direction, const Part& part, const Chunk& chunk, int64_t last) const {
    const Range rows = share(steps_.rows(last), part.rank, part.size);
    const F* source = chunk_row(factors_hh_, direction, steps_.offset(last) - chunk.begin);
    F* target = carry_gates_ + direction * args_.batch * stride_;
    std::memcpy(target + rows.begin * stride_, source + rows.begin * stride_,
                (rows.end - rows.begin) * stride_ * sizeof(F));
  }

  void write_gradients(int direction, const Part& part) const {
    const auto write = [&](const WeightGradient<F>& gradient, Weight weight, int64_t block,
                           Range rows) {
      gradient.write(direction, block, rows, target(direction, weight));
    };
    if (!is_one_chunk_) for_each_gradient(direction, part, write);
    if (args_.d_bias_ih[direction] == nullptr) return;
    const Range columns = bias_columns(part);
    const int64_t count = min_of(columns.end, wide_) - columns.begin;
    const int64_t own = direction * stride_ + columns.begin;
    convert(bias_ih_ + own, static_cast<S*>(args_.d_bias_ih[direction]) + columns.begin, count);
    convert(bias_hh_ + own, static_cast<S*>(args_.d_bias_hh[direction]) + columns.begin, count);
  }
};

template <class Device, class Cell, class S>
void backward_dev_impl(const Device& device, const BackwardArgs& args) {
  Workspace workspace;
  const BackwardScan<Cell, S> scan(args, device.threads, workspace);
  run_scan(args, scan.work(), device.threads, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
