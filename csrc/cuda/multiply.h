// The product of one step in one block: sums[row][column] = weights of the column times states of
// the row. Warps take parts of columns, rows and depth; the parts of the depth are added up by
// SliceSum.
//
// Weights and states lie in blocks of 64 bytes of their depth. Of each block, lane 4r + q holds the
// q-th 16 bytes: of the columns r and r + 8 of every tile, and of rows of states. The order of
// elements within the depth does not matter to a product, so these bytes, as they are, are
// fragments for tensor cores. Without them, each lane multiplies its quarter of the depth and the
// quarters are added up into the same places.
//
// Weights that do not fit into shared memory stay there in part. The others pass through a place of
// one block for each warp: as soon as a lane has used its part of such a block, it begins to copy
// that of the next, while it goes on with those that stay, and while its block waits for states.
//
// A step is a chain of latencies, so loads are issued well before their values are needed, under
// conditions that are predicates and no branches: a branch between two loads makes one wait for the
// other.
#pragma once

#include <type_traits>

#include "element.h"
#include "plan.h"

namespace fastrnn::cuda {

// A thread's place in its warp.
struct Lane {
  int column, quarter;
  FASTRNN_DEVICE Lane() : column(thread_index() % 32 / 4), quarter(thread_index() % 4) {}
};

// Which blocks of a slice's depth do not stay in shared memory: evenly spread from the first on.
class Passing {
 public:
  FASTRNN_DEVICE Passing() : apart_(0), end_(0) {}
  FASTRNN_DEVICE Passing(int blocks, int kept)
      : apart_(blocks / (blocks - kept)), end_(apart_ * (blocks - kept)) {}
  FASTRNN_DEVICE bool is_at(int block) const { return block == next_ && next_ < end_; }
  FASTRNN_DEVICE void advance() { next_ += apart_; }
  // The next one, or the first of the next step.
  FASTRNN_DEVICE int following() const { return next_ < end_ ? next_ : 0; }

 private:
  int apart_, end_, next_ = 0;
};

// How many blocks of states are loaded before the first is used: 8 loads or, where registers are
// left, 16.
template <class S, bool Tensor, int Tiles>
constexpr int blocks_ahead(int octets) {
  return Tensor ? 8 / octets : sizeof(S) < 8 && Tiles <= 2 ? 2 : 1;
}

// The states of one block: of one lane, one of each octet's rows on tensor cores, else all rows.
template <class S, bool Tensor, int Octets>
struct States {
  static constexpr int count = Tensor ? Octets : kOctet;
  static constexpr int rows_apart = Tensor ? kOctet : 1;
  Vector16 of[count];

  template <class Load>
  FASTRNN_DEVICE void read(const char* states, int row_bytes, bool condition, Load load) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      of[n] = load(states + n * rows_apart * row_bytes, condition);
    }
    if constexpr (Tensor && sizeof(S) == 4) round();
  }

 private:
  // The weights are rounded once, before the scan.
  FASTRNN_DEVICE void round() {
#pragma unroll
    for (Vector16& v : of) {
      float values[4];
      __builtin_memcpy(values, &v, sizeof(v));
#pragma unroll
      for (float& value : values) value = round_to_tf32(value);
      __builtin_memcpy(&v, values, sizeof(v));
    }
  }
};

// The weights of one block in tiles of 16 columns, of which the last may lack its second octet.
template <int Tiles, bool InShared>
struct Weights {
  Vector16 of[Tiles][2];

  FASTRNN_DEVICE void read(const char* weights, int octets, bool condition) {
#pragma unroll
    for (int m = 0; m < 2 * Tiles; ++m) {
      const char* at = weights + m * kOctet * kBlockBytes;
      const bool is_there = condition && m < octets;
      of[m / 2][m % 2] = InShared ? load_shared_if(is_there, at) : load_if(is_there, at);
    }
  }
};

// Accumulates tiles of 16 columns by octets of rows; sums(tile, octet) are the values of this lane:
// of column r, then of column r + 8, in the rows 2q and 2q + 1.
template <class S, bool Tensor, int Tiles, int Octets>
struct Accumulator;

template <class S, int Tiles, int Octets>
struct Accumulator<S, true, Tiles, Octets> {
  float sums[Tiles][Octets][4] = {};

  template <bool InShared>
  FASTRNN_DEVICE void add(const Weights<Tiles, InShared>& weights,
                          const States<S, true, Octets>& states) {
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      const auto& [low, high] = weights.of[m];
#pragma unroll
      for (int n = 0; n < Octets; ++n) {
        const Vector16& b = states.of[n];
        mma(S{}, sums[m][n], {low.x, high.x, low.y, high.y}, {b.x, b.y});
        mma(S{}, sums[m][n], {low.z, high.z, low.w, high.w}, {b.z, b.w});
      }
    }
  }
  FASTRNN_DEVICE void finish() {}
};

template <class S, int Tiles>
struct Accumulator<S, false, Tiles, 1> {
  using T = Compute<S>;
  T quarters[Tiles][2][kOctet] = {};
  T sums[Tiles][1][4];

  template <bool InShared>
  FASTRNN_DEVICE void add(const Weights<Tiles, InShared>& weights,
                          const States<S, false, 1>& states) {
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Widened<S> w(weights.of[m][half]);
#pragma unroll
        for (int row = 0; row < kOctet; ++row) {
          const Widened<S> state(states.of[row]);
#pragma unroll
          for (int i = 0; i < Widened<S>::count; ++i) {
            quarters[m][half][row] += w.values[i] * state.values[i];
          }
        }
      }
    }
  }

  FASTRNN_DEVICE void finish() {
    const int quarter = Lane().quarter;
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T four[4], two[2];
        halve(quarters[m][half], quarter & 2, 2, four);
        halve(four, quarter & 1, 1, two);
        sums[m][0][2 * half] = two[0];
        sums[m][0][2 * half + 1] = two[1];
      }
    }
  }

 private:
  // Two lanes add up what they have: each half of the values in one of them.
  template <int Count>
  FASTRNN_DEVICE static void halve(const T (&values)[2 * Count], bool upper, int mask,
                                   T (&result)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const T kept = upper ? values[Count + i] : values[i];
      const T sent = upper ? values[i] : values[Count + i];
      result[i] = kept + shuffle_xor(sent, mask);
    }
  }
};

// The product of a block, by the parts that its warps take. Where a warp's first part lies takes
// some divisions, so it is found out once, before the first step.
// sums: [slices][rows][columns + kSkew].
// WideSets: blocks of weights that lie in registers beside four tiles of sums; 1 leaves room for
// items that need many. FromGlobal: no weights stay on the chip.
template <class S, bool Tensor, int WideSets, bool FromGlobal = false>
class Product {
 public:
  using T = Compute<S>;

  FASTRNN_DEVICE Product(const Layout& layout, const char* packed, T* sums)
      : layout_(layout),
        packed_(packed),
        sums_(sums),
        row_bytes_(static_cast<int>(layout.stride) * static_cast<int>(sizeof(S))),
        block_bytes_(layout.columns * kBlockBytes),
        pitch_(layout.columns + kSkew),
        parts_(layout.parts()),
        first_(layout, thread_index() / 32) {
    if (layout.kept == 0 || thread_index() / 32 >= parts_) return;
    passing_ = Passing(first_.end - first_.begin, layout.kept);
    copy_passing(first_, 0);
  }

  // load(p, condition) reads 16 bytes of states, or zeros.
  template <class Load>
  FASTRNN_DEVICE void run(const char* states, Load load) const {
    int index = thread_index() / 32;
    if (index >= parts_) return;
    Part part = first_;
    while (true) {
      if constexpr (FromGlobal) {
        run_part<Where::kGlobal>(part, states, load);
      } else if (layout_.resident) {
        run_part<Where::kShared>(part, states, load);
      } else if (layout_.kept > 0) {
        run_part<Where::kPassing>(part, states, load);
      } else {
        run_part<Where::kGlobal>(part, states, load);
      }
      index += kWarps;
      if (index >= parts_) return;
      part = Part(layout_, index);
    }
  }

  // After the last step: no copy may outlive its block.
  FASTRNN_DEVICE void finish() const {
    if (layout_.kept > 0) wait_for_copies();
  }

 private:
  static constexpr int kTiles = warp_tiles(sizeof(S));  // at most, of a part
  enum class Where { kGlobal, kShared, kPassing };

  struct Part {
    int slice, row, column;
    int begin, end;             // blocks of the depth
    int column_octets, octets;  // of columns and rows
    FASTRNN_DEVICE Part(const Layout& layout, int index) {
      slice = index % layout.slices;
      row = index / layout.slices % layout.row_parts * Layout::rows_per_warp(Tensor);
      column = index / layout.slices / layout.row_parts * (kTiles * kTile);
      const int depth = static_cast<int>(layout.depth_blocks);
      begin = depth * slice / layout.slices;
      end = depth * (slice + 1) / layout.slices;
      column_octets = (layout.columns - column) / kOctet;
      octets = (layout.rows - row) / kOctet;
    }
  };

  // What the loops are unrolled by is one of a few numbers; the rest are conditions.
  template <Where From, class Load>
  FASTRNN_DEVICE void run_part(const Part& part, const char* states, Load load) const {
    const auto with_octets = [&](auto tiles) {
      if constexpr (Tensor) {
        if (part.octets > 1) {
          return run_part<From, decltype(tiles)::value, 2>(part, states, load);
        }
      }
      run_part<From, decltype(tiles)::value, 1>(part, states, load);
    };
    if (kTiles == 1 || part.column_octets <= 2) {
      with_octets(std::integral_constant<int, 1>{});
    } else if (part.column_octets <= 4) {
      with_octets(std::integral_constant<int, kTiles == 1 ? 1 : 2>{});
    } else {
      with_octets(std::integral_constant<int, kTiles>{});
    }
  }

  template <Where From, int Tiles, int Octets, class Load>
  FASTRNN_DEVICE void run_part(const Part& part, const char* states, Load load) const {
    constexpr int ahead = blocks_ahead<S, Tensor, Tiles>(Octets);
    const Lane lane;
    const int own = (part.column + lane.column) * kBlockBytes + lane.quarter * 16;
    const int first = From == Where::kPassing ? part.slice * layout_.kept : part.begin;
    const char* w = (From == Where::kGlobal ? packed_ : dynamic_shared()) + own;
    w += first * block_bytes_;
    const char* s = states + (part.row + (Tensor ? lane.column : 0)) * row_bytes_ +
                    part.begin * kBlockBytes + lane.quarter * 16;
    const int count = part.end - part.begin;
    Accumulator<S, Tensor, Tiles, Octets> sums;
    States<S, Tensor, Octets> read[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      read[j].read(s + j * kBlockBytes, row_bytes_, j < count, load);
    }
    // Weights are nearer than states: one block ahead is enough.
    constexpr int sets = !Tensor || From == Where::kPassing ? 1 : Tiles == 4 ? WideSets : 2;
    Weights<Tiles, From != Where::kGlobal> weights[sets];
    Passing passing = passing_;
    if constexpr (sets == 2) weights[0].read(w, part.column_octets, true);
    for (int k = 0; k < count; k += ahead) {
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        if (k + j >= count) break;
        if constexpr (From == Where::kPassing) {
          const bool passes = passing.is_at(k + j);
          if (passes) wait_for_copies();
          weights[0].read(passes ? passing_place() : w, part.column_octets, true);
          if (!passes) w += block_bytes_;
          sums.add(weights[0], read[j]);
          if (passes) {
            passing.advance();
            copy_passing(part, passing.following());
          }
        } else {
          const int next = k + j + sets - 1;
          weights[next % sets].read(w + next * block_bytes_, part.column_octets, next < count);
          sums.add(weights[j % sets], read[j]);
        }
        const int later = k + j + ahead;
        read[j].read(s + later * kBlockBytes, row_bytes_, later < count, load);
      }
    }
    sums.finish();
    store(part, lane, sums.sums);
  }

  // The lane's part of its warp's place for weights that pass.
  FASTRNN_DEVICE char* passing_place() const {
    const int warp = thread_index() / 32;
    const int bytes = static_cast<int>(Layout::next_bytes(layout_.columns, sizeof(S)));
    const Lane lane;
    return dynamic_shared() + layout_.shared_next + warp * bytes + lane.column * kBlockBytes +
           lane.quarter * 16;
  }
  // Begins to copy there what it will use of a block of the slice. Nobody else reads it, and what
  // lies there has been used: nothing needs a barrier.
  FASTRNN_DEVICE void copy_passing(const Part& part, int block) const {
    const Lane lane;
    const char* const from = packed_ + int64_t{part.begin + block} * block_bytes_ +
                             (part.column + lane.column) * kBlockBytes + lane.quarter * 16;
    char* const to = passing_place();
#pragma unroll
    for (int m = 0; m < 2 * kTiles; ++m) {
      if (m >= part.column_octets) break;
      begin_copy(to + m * kOctet * kBlockBytes, from + m * kOctet * kBlockBytes);
    }
  }

  template <int Tiles, int Octets>
  FASTRNN_DEVICE void store(const Part& part, const Lane& lane,
                            const T (&sums)[Tiles][Octets][4]) const {
    T* target = sums_ + (part.slice * layout_.rows + part.row + 2 * lane.quarter) * pitch_ +
                part.column + lane.column;
#pragma unroll
    for (int m = 0; m < 2 * Tiles; ++m) {
      if (m >= part.column_octets) break;
#pragma unroll
      for (int n = 0; n < Octets; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          target[(n * kOctet + i) * pitch_ + m * kOctet] = sums[m / 2][n][2 * (m % 2) + i];
        }
      }
    }
  }

  const Layout& layout_;
  const char* const packed_;
  T* const sums_;
  const int row_bytes_, block_bytes_, pitch_, parts_;
  const Part first_;
  Passing passing_;  // as a step begins
};

// The product for one row and one of the block's columns: its parts over the depth, added up in
// order. All are loaded at once.
template <class T>
class SliceSum {
 public:
  FASTRNN_DEVICE SliceSum(const Layout& layout, const T* sums)
      : sums_(sums),
        slices_(layout.slices),
        pitch_(layout.columns + kSkew),
        slice_(layout.rows * pitch_) {}

  FASTRNN_DEVICE T operator()(int row, int column) const {
    const T* first = sums_ + row * pitch_ + column;
    T parts[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) parts[i] = i < slices_ ? first[i * slice_] : T(0);
    T sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += parts[i];
    return sum;
  }

 private:
  const T* const sums_;
  const int slices_, pitch_, slice_;
};

}  // namespace fastrnn::cuda
