// A weight of 8 bits, packed once, times quantised rows, a register tile at a time.
#pragma once

#include "int8.h"
#include "int8_rows.h"

namespace fastrnn::FASTRNN_VARIANT {

// A tile: MR rows by NV vectors of columns.
struct Int8Tile {
  using V = Vec<float>;

  // The tallest one whose sums leave registers for what is multiplied.
  static constexpr int tallest(int vectors) {
    const auto registers = [vectors](int rows) {
      const int waiting =
          rows < vectors ? rows * Group::kLeftRegisters : vectors * Group::kRightRegisters;
      return rows * vectors + waiting +
             (rows < vectors ? Group::kRightRegisters : Group::kLeftRegisters) +
             Group::kOtherRegisters;
    };
    int rows = kMaxRows;
    while (rows > 1 && registers(rows) > FASTRNN_REGISTERS) --rows;
    return rows;
  }

  // sums[r * NV + v] = rows[r] times the v-th vector of columns. `block`: see Int8Weight. A tile of
  // few rows waits for its weights: it asks for them some time ahead, others for a cache line of
  // `next` with each group.
  template <int NV, int MR>
  static void run(const uint8_t* const* rows, const char* block, int64_t groups, const char* next,
                  V* sums) {
    constexpr int64_t step = NV * FASTRNN_VECTOR_BYTES;
    // Sums of few rows are divided into several, or each would wait for the one before it.
    constexpr int chains = MR * NV >= 8 ? 1 : MR * NV > 2 ? 2 : 4;
    const float* const scales = reinterpret_cast<const float*>(block + groups * step);
    const int32_t* const offsets = reinterpret_cast<const int32_t*>(scales + NV * V::lanes);
    Int acc[chains][MR][NV];
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c)
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          if (c == 0) {
            std::memcpy(&acc[c][r][v], offsets + v * V::lanes, sizeof(Int));
          } else {
            acc[c][r][v] = Int{};
          }
        }
    const uint8_t* row[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) row[r] = rows[r];
    int64_t k = 0;
    for (; k + chains <= groups; k += chains) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        add_group<NV, MR>(acc[c], row, block + (k + c) * step, k + c);
        if constexpr (MR > 2) __builtin_prefetch(next + (k + c) * FASTRNN_VECTOR_BYTES, 0, 2);
      }
    }
    for (; k < groups; ++k) add_group<NV, MR>(acc[0], row, block + k * step, k);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      float scale;
      std::memcpy(&scale, row[r] + groups * kGroup, sizeof(scale));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Int sum = acc[0][r][v];
#pragma GCC unroll 4
        for (int c = 1; c < chains; ++c) sum += acc[c][r][v];
        const V value = V::Raw(__builtin_convertvector(sum, V::Raw));
        sums[r * NV + v] = value * V(scale) * V::load(scales + v * V::lanes);
      }
    }
  }

 private:
  static constexpr int64_t kAhead = 4096;  // bytes

  template <int NV, int MR>
  [[gnu::always_inline]] static void add_group(Int (&acc)[MR][NV], const uint8_t* const (&row)[MR],
                                               const char* weights, int64_t k) {
    const auto right = [weights](int v) {
      Int vector;
      std::memcpy(&vector, weights + v * FASTRNN_VECTOR_BYTES, sizeof(vector));
      return Group::right(vector);
    };
    if constexpr (MR <= 2) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        __builtin_prefetch(weights + v * FASTRNN_VECTOR_BYTES + kAhead, 0, 3);
      }
    }
    // The shorter side of the tile waits in registers for the other.
    if constexpr (MR < NV) {
      Group::Left left[MR];
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) left[r] = Group::left(row[r] + k * kGroup);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Group::Right w = right(v);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) acc[r][v] = Group::multiply_add(acc[r][v], left[r], w);
      }
    } else {
      Group::Right w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = right(v);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const Group::Left left = Group::left(row[r] + k * kGroup);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Group::multiply_add(acc[r][v], left, w[v]);
      }
    }
  }
};

// W [gates * columns, depth] as blocks: the integers of a block as [group][vector][lane][k], and
// after them for each column its scale and what a sum begins with, -kOffset times the sum of the
// row.
class Int8Weight {
  using V = Vec<float>;

 public:
  explicit Int8Weight(const Int8Shape& shape, const void* const* packed = nullptr)
      : columns(shape.columns, shape.gates),
        rows(shape.depth),
        groups_(groups_of(shape.depth)),
        depth_(shape.depth),
        packed_(packed) {}

  const Columns<float> columns;
  const Int8Rows rows;  // that it is multiplied with

  int64_t bytes() const { return columns.blocks * block_bytes(); }
  int64_t groups() const { return groups_; }

  void pack(const int8_t* weight, const float* scales, char* packed) const {
    std::memset(packed, 0, bytes());
    for_each_column([&](int64_t row, int64_t block, int64_t lane) {
      char* const to = packed + block * block_bytes();
      const int8_t* const from = weight + row * depth_;
      int32_t sum = 0;
      for (int64_t k = 0; k < depth_; ++k) {
        to[place(lane, k)] = static_cast<char>(from[k]);
        sum += from[k];
      }
      const int32_t offset = -kOffset * sum;
      std::memcpy(to + scales_begin() + lane * 4, scales + row, 4);
      std::memcpy(to + scales_begin() + (columns.width + lane) * 4, &offset, 4);
    });
  }

  void unpack(const char* packed, int8_t* weight, float* scales) const {
    for_each_column([&](int64_t row, int64_t block, int64_t lane) {
      const char* const from = packed + block * block_bytes();
      for (int64_t k = 0; k < depth_; ++k) {
        weight[row * depth_ + k] = static_cast<int8_t>(from[place(lane, k)]);
      }
      std::memcpy(scales + row, from + scales_begin() + lane * 4, 4);
    });
  }

  // sums[r * vectors + v] = rows[r] times the block's v-th vector of columns. `tile`: how many
  // tiles of this block came before; `next`: the block that will be multiplied after it.
  void multiply(int direction, int64_t block, int64_t next, const uint8_t* const* rows, int count,
                int64_t tile, V* sums) const {
    const char* const packed = static_cast<const char*>(packed_[direction]);
    // The first `vectors` tiles prefetch the next block, a part each.
    const int64_t part = tile < columns.vectors ? tile * groups_ * FASTRNN_VECTOR_BYTES : 0;
    tile_for<Int8Tile>(columns.vectors, count)(rows, packed + block * block_bytes(), groups_,
                                               packed + next * block_bytes() + part, sums);
  }

  // A bias [gates * columns] in the order of the block's vectors; zero beyond the columns and for
  // null.
  void load_bias(const void* bias, int64_t block, V* vectors) const {
    columns.load(static_cast<const float*>(bias), block, vectors);
  }

 private:
  const int64_t groups_, depth_;
  const void* const* const packed_;  // of each direction

  int64_t scales_begin() const { return groups_ * kGroup * columns.width; }
  int64_t block_bytes() const { return scales_begin() + columns.width * 8; }

  // Where the k-th integer of the lane-th column of a block lies.
  int64_t place(int64_t lane, int64_t k) const {
    return (k / kGroup * columns.width + lane) * kGroup + k % kGroup;
  }

  // Calls body(row of the weight, its block, its column in the block).
  template <class Body>
  void for_each_column(const Body& body) const {
    for (int64_t block = 0; block < columns.blocks; ++block) {
      for (int v = 0; v < columns.vectors; ++v) {
        const int64_t first = columns.column(block, v / columns.gates);
        for (int i = 0; i < V::lanes && first + i < columns.count; ++i) {
          body(v % columns.gates * columns.count + first + i, block, v * V::lanes + i);
        }
      }
    }
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
