// The forward scan of layers with weights of 8 bits. Before each step the states that go into it
// are quantised, row by row; the products' results are float32, and from there on the cell is that
// of every other scan.
#pragma once

#include "forward_context.h"
#include "int8_weight.h"
#include "scan_common.h"

namespace fastrnn::FASTRNN_VARIANT {

// Memory for quantised rows of a phase. Parts that split units need all rows. If these are few,
// each part quantises them for itself, which spares a barrier; else they share the work.
class Int8Copies {
 public:
  Int8Copies(const Int8Rows& rows, int64_t count, int directions, int threads, Workspace& workspace)
      : rows_(rows), count_(count), copies_(count * threads <= kMostOwn ? threads : 1) {
    memory_ = workspace.take<uint8_t>(directions * copies_ * count * rows.stride);
  }

  // Whether parts that split units have to wait for each other's rows.
  bool are_shared() const { return copies_ == 1; }

  uint8_t* row(int direction, const Part& part, int64_t i) const {
    const int64_t copy = part.splits_units && !are_shared() ? part.rank : 0;
    return memory_ + ((direction * copies_ + copy) * count_ + i) * rows_.stride;
  }

  // Whether a part quantises the i-th row.
  bool is_own(const Part& part, int64_t i) const {
    return !part.splits_units || !are_shared() || i % part.size == part.rank;
  }

 private:
  static constexpr int64_t kMostOwn = 64;  // rows of all parts

  const Int8Rows& rows_;
  const int64_t count_;
  const int64_t copies_;
  uint8_t* memory_;
};

class Int8Scan {
  using V = Vec<float>;
  using Tile = ForwardTile<float>;
  using Step = ForwardStep<float>;
  static constexpr int kCellRows = 16;  // the cell takes the rows of several tiles at once
  static constexpr int64_t kProjectedRows = 256;
  // Blocks that few rows run before their cells, one chain of dependent operations each.
  static constexpr int64_t kFewRows = 2, kBlocks = 4;

 public:
  Int8Scan(const ForwardArgs& args, ForwardLoop<float> loop, const Steps& steps, int threads,
           Workspace& workspace)
      : args_(args),
        loop_(loop),
        steps_(steps),
        projects_(args.weight_hr[0] != nullptr),
        steps_ahead_(max_of(1, min_of(args.steps, kProjectedRows / max_of(1, args.batch)))),
        ih_({args.hidden, args.traits->gates, args.input}, args.weight_ih),
        hh_({args.hidden, args.traits->gates, args.proj}, args.weight_hh),
        hr_({args.proj, 1, args.hidden}, args.weight_hr),
        states_(args, workspace),
        zoneout_(args, states_.stride, workspace),
        context_{args, steps, states_, zoneout_, projects_, hh_.columns.units},
        x_(ih_.rows, steps_ahead_ * args.batch, args.directions, threads, workspace),
        h_(hh_.rows, args.batch, args.directions, threads, workspace),
        hidden_(hr_.rows, projects_ ? args.batch : 0, args.directions, threads, workspace),
        projected_(workspace.take<float>(args.directions * steps_ahead_ * args.batch *
                                         ih_.columns.blocks * ih_.columns.width)) {}

  Work work() const {
    const Columns<float>& columns = hh_.columns;
    return {args_.steps,     steps_.mean_rows(), ih_.groups() + hh_.groups(),
            columns.blocks,  columns.vectors,    Int8Tile::tallest(columns.vectors),
            args_.directions};
  }

  void run(int direction, PhaseRunner& runner) const {
    if (args_.steps == 0) {
      return runner.last_phase([&](const Part& part) { start_states(direction, part, 0); });
    }
    const auto run_all = [&](Phase phase) {
      const int64_t stride = steps_.stride(direction);
      int64_t t = steps_.first(direction);
      for (int64_t i = 0; i < args_.steps; ++i, t += stride) run_step(direction, t, i, phase);
    };
    const bool need_each_other = args_.steps > 1 || x_.are_shared() || h_.are_shared() || projects_;
    runner.step_phases(run_all, true, need_each_other);
  }

 private:
  const ForwardArgs& args_;
  const ForwardLoop<float> loop_;
  const Steps& steps_;
  const bool projects_;
  const int64_t steps_ahead_;
  const Int8Weight ih_, hh_, hr_;
  const States<float> states_;
  const Zoneout<float> zoneout_;
  const ForwardContext<float> context_;
  const Int8Copies x_, h_, hidden_;
  float* const projected_;  // W_ih x + b_ih of some steps

  // Step t, the i-th of those that run. phase(body) calls body with the parts: see
  // PhaseRunner::step_phases.
  void run_step(int direction, int64_t t, int64_t i, Phase phase) const {
    const int64_t rows = steps_.rows(t);
    const bool projects_input = i % steps_ahead_ == 0;
    const int64_t ahead = min_of(steps_ahead_, args_.steps - i);
    const auto prepare = [&](const Part& part) {
      if (i == 0) start_states(direction, part, t);
      if (projects_input) quantize_x(direction, part, t, ahead);
      quantize_h(direction, part, t, i, rows);
    };
    const bool shares = h_.are_shared() || (projects_input && x_.are_shared());
    if (shares) phase(prepare);
    phase([&](const Part& part) {
      if (!shares) prepare(part);
      if (projects_input) project_input(direction, part, t, ahead);
      zoneout_.draw(Zoneout<float>::kC, direction, t, rows_of(part, rows), unit_range(part));
      if (!projects_) {
        zoneout_.draw(Zoneout<float>::kH, direction, t, rows_of(part, rows), unit_range(part));
      }
      run_rows(direction, part, t, i, rows);
      if (!projects_) finish_rows(direction, part, t, rows);
    });
    if (!projects_) return;
    const auto quantize = [&](const Part& part) { quantize_hidden(direction, part, rows); };
    if (hidden_.are_shared()) phase(quantize);
    phase([&](const Part& part) {
      if (!hidden_.are_shared()) quantize(part);
      project_hidden(direction, part, t, i, rows);
      finish_rows(direction, part, t, rows);
    });
  }

  // -- What goes into a step

  // Row `row` of [D, B, columns], null for null.
  const float* state_row(const void* base, int direction, int64_t row, int64_t columns) const {
    return at<float>(base, steps_.state_offset(direction, row, columns));
  }

  // Sets the states of the part's own columns before the first step, t.
  void start_states(int direction, const Part& part, int64_t t) const {
    const Range features = feature_range(part), units = unit_range(part);
    for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
      const bool reset = steps_.resets_before(direction, t, row);
      states_.set(direction, row, features,
                  reset ? nullptr : state_row(args_.h_0, direction, row, args_.proj), units,
                  reset
                      ? nullptr
                      : state_row(args_.c_0, direction, row, args_.traits->states * args_.hidden));
      if (row >= steps_.rows(0)) write_final(direction, part, row);  // has no step
    }
  }

  void quantize_x(int direction, const Part& part, int64_t t, int64_t count) const {
    const auto* x = static_cast<const float*>(args_.x);
    for_each_row(direction, part, t, count, [&](int64_t slot, int64_t row, int64_t n) {
      const int64_t i = slot * args_.batch + row;
      if (x_.is_own(part, i)) ih_.rows.quantize(x + n * args_.input, x_.row(direction, part, i));
    });
  }

  // The states of all features. Before the first step the other parts may not have set theirs.
  void quantize_h(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    if (i == 0 && args_.h_0 == nullptr) return;
    end = min_of(end, part.rows.end);
    for (int64_t row = part.rows.begin; row < end; ++row) {
      if (!h_.is_own(part, row)) continue;
      const float* h = states_.h(i) + states_.offset(direction, row);
      if (i == 0 && !steps_.resets_before(direction, t, row)) {
        h = state_row(args_.h_0, direction, row, args_.proj);
      } else if (i == 0) {
        h = nullptr;
      }
      hh_.rows.quantize(h, h_.row(direction, part, row));
    }
  }

  void quantize_hidden(int direction, const Part& part, int64_t end) const {
    end = min_of(end, part.rows.end);
    for (int64_t row = part.rows.begin; row < end; ++row) {
      if (!hidden_.is_own(part, row)) continue;
      hr_.rows.quantize(states_.unprojected() + states_.offset(direction, row),
                        hidden_.row(direction, part, row));
    }
  }

  // -- The input

  // Calls body(slot, row, n) for the part's rows of `count` steps from t on: the slot-th of these
  // steps, and where in x the row lies.
  template <class Body>
  void for_each_row(int direction, const Part& part, int64_t t, int64_t count,
                    const Body& body) const {
    for (int64_t slot = 0; slot < count; ++slot, t += steps_.stride(direction)) {
      const int64_t end = min_of(part.rows.end, steps_.rows(t));
      for (int64_t row = part.rows.begin; row < end; ++row) {
        body(slot, row, steps_.offset(t) + row);
      }
    }
  }

  // Of one row for one block, in the order of the tile's columns. The rows of a part lie together.
  float* projected(int direction, const Part& part, int64_t block, int64_t slot,
                   int64_t row) const {
    const int64_t rows = part.rows.end - part.rows.begin;
    const int64_t before =
        (direction * args_.batch + part.rows.begin) * steps_ahead_ * ih_.columns.blocks +
        (block * steps_ahead_ + slot) * rows + row - part.rows.begin;
    return projected_ + before * ih_.columns.width;
  }

  // A tile takes rows across steps, so that a small batch fills it too.
  void project_input(int direction, const Part& part, int64_t t, int64_t count) const {
    const int vectors = ih_.columns.vectors, height = Int8Tile::tallest(vectors);
    sweep(part.blocks(ih_.columns.blocks), 1, false, [&](int64_t block, int64_t, int64_t next) {
      V biases[kMaxVectors];
      ih_.load_bias(args_.bias_ih[direction], block, biases);
      const uint8_t* rows[kMaxRows];
      float* targets[kMaxRows];
      int gathered = 0;
      int64_t tile = 0;
      const auto multiply_gathered = [&] {
        V sums[kMaxRows * kMaxVectors];
        ih_.multiply(direction, block, next, rows, gathered, tile++, sums);
        for (int r = 0; r < gathered; ++r) {
          for (int v = 0; v < vectors; ++v) {
            (sums[r * vectors + v] + biases[v]).store(targets[r] + v * V::lanes);
          }
        }
        gathered = 0;
      };
      for_each_row(direction, part, t, count, [&](int64_t slot, int64_t row, int64_t) {
        rows[gathered] = x_.row(direction, part, slot * args_.batch + row);
        targets[gathered] = projected(direction, part, block, slot, row);
        if (++gathered == height) multiply_gathered();
      });
      if (gathered > 0) multiply_gathered();
    });
  }

  // -- A step

  void run_rows(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const int vectors = hh_.columns.vectors, height = Int8Tile::tallest(vectors);
    const bool is_zero = i == 0 && args_.h_0 == nullptr;
    const int64_t extra = direction * args_.traits->states * args_.hidden;
    const Saved<float, float> saved{
        nullptr, args_.traits->states > 0 ? at(static_cast<float*>(args_.extra), extra) : nullptr,
        0, args_.directions * args_.traits->states * args_.hidden, 0};
    const Step step{t, i, saved};
    end = min_of(end, part.rows.end);
    const int64_t group = end - part.rows.begin <= kFewRows ? kBlocks : 1;
    const auto run_blocks = [&](int64_t first, int64_t last, int64_t next) {
      V biases[kBlocks * kMaxVectors], sums[kBlocks * kCellRows * kMaxVectors];
      for (int64_t b = first; b < last; ++b) {
        hh_.load_bias(args_.bias_hh[direction], b, biases + (b - first) * vectors);
      }
      int64_t begin = part.rows.begin;
      int gathered = 0;
      const auto run_gathered = [&] {
        for (int64_t b = first; b < last; ++b) {
          const int64_t k = b - first;
          loop_(context_, step,
                Tile{direction, begin, gathered, hh_.columns.column(b, 0),
                     sums + k * kCellRows * vectors, biases + k * vectors,
                     projected(direction, part, b, i % steps_ahead_, begin)});
        }
        begin += gathered;
        gathered = 0;
      };
      for_each_tile(begin, end, height, [&](int64_t row, int count, int64_t tile) {
        const TileRows<uint8_t> h(count, [&](int r) { return h_.row(direction, part, row + r); });
        for (int64_t b = first; b < last; ++b) {
          V* const own = sums + ((b - first) * kCellRows + gathered) * vectors;
          if (is_zero) {
            for (int j = 0; j < count * vectors; ++j) own[j] = V(0.0f);
          } else {
            hh_.multiply(direction, b, b + 1 < last ? b + 1 : next, h.rows, count, tile, own);
          }
        }
        gathered += count;
        if (gathered + height > kCellRows) run_gathered();
      });
      if (gathered > 0) run_gathered();
    };
    sweep(part.blocks(hh_.columns.blocks), group, i % 2 != 0, run_blocks);
  }

  // h_t = W_hr times what run_rows left.
  void project_hidden(int direction, const Part& part, int64_t t, int64_t i, int64_t end) const {
    const Columns<float>& columns = hr_.columns;
    const int height = Int8Tile::tallest(columns.units);
    zoneout_.draw(Zoneout<float>::kH, direction, t, rows_of(part, end), feature_range(part));
    sweep(part.blocks(columns.blocks), 1, i % 2 != 0, [&](int64_t block, int64_t, int64_t next) {
      const auto run_tile = [&](int64_t row, int count, int64_t tile) {
        V sums[kMaxRows * kMaxVectors];
        const TileRows<uint8_t> hidden(
            count, [&](int r) { return hidden_.row(direction, part, row + r); });
        hr_.multiply(direction, block, next, hidden.rows, count, tile, sums);
        for (int r = 0; r < count; ++r) {
          context_.store_projected({t, i, direction, row + r}, columns, block,
                                   sums + r * columns.units);
        }
      };
      for_each_tile(part.rows.begin, min_of(end, part.rows.end), height, run_tile);
    });
  }

  // -- What comes out

  // The part's own hidden units, and features of h.
  Range unit_range(const Part& part) const {
    return hh_.columns.range(part.blocks(hh_.columns.blocks));
  }
  // Of the part's rows those that are alive, where the first `end` are.
  static Range rows_of(const Part& part, int64_t end) {
    return {part.rows.begin, min_of(end, part.rows.end)};
  }
  Range feature_range(const Part& part) const {
    return projects_ ? hr_.columns.range(part.blocks(hr_.columns.blocks)) : unit_range(part);
  }

  float* output_row(int direction, int64_t t, int64_t row) const {
    return static_cast<float*>(args_.output) + steps_.feature_offset(direction, t, row, args_.proj);
  }

  // The final states of a row that has no step, or of one whose last step is done.
  void write_final(int direction, const Part& part, int64_t row) const {
    write_final(direction, part, row, states_.h(0) + states_.offset(direction, row));
  }
  void write_final(int direction, const Part& part, int64_t row, const float* h) const {
    const Range features = feature_range(part), units = unit_range(part);
    const auto copy = [](const float* from, void* base, int64_t offset, Range own) {
      convert(from + own.begin, static_cast<float*>(base) + offset + own.begin,
              own.end - own.begin);
    };
    copy(h, args_.h_n, steps_.state_offset(direction, row, args_.proj), features);
    if (args_.traits->states > 0) {
      copy(states_.cell(direction, row), args_.c_n,
           steps_.state_offset(direction, row, args_.hidden), units);
    }
  }

  // The rows that end at step t, of which `end` rows are alive at it.
  void finish_rows(int direction, const Part& part, int64_t t, int64_t end) const {
    const int64_t begin = min_of(end, steps_.rows(t + steps_.stride(direction)));
    const int64_t last = min_of(end, part.rows.end);
    for (int64_t row = max_of(begin, part.rows.begin); row < last; ++row) {
      write_final(direction, part, row, output_row(direction, t, row));
    }
  }
};

inline void int8_forward(const ForwardArgs& args, ForwardLoop<float> loop, int threads) {
  Workspace workspace;
  const Steps steps(args, workspace);
  const Int8Scan scan(args, loop, steps, threads, workspace);
  run_scan(args, scan.work(), threads, workspace, scan);
}

}  // namespace fastrnn::FASTRNN_VARIANT
