// The product of one step in one block: sums[row][column] = weights of the column times states of
// the row. Warps take parts of columns, rows and depth; the parts of the depth are added up by
// sum_slices.
//
// Weights and states lie in blocks of 64 bytes of their depth. Of each block, lane 4r + q holds the
// q-th 16 bytes: of the columns r and r + 8 of every tile, and of rows of states. The order of
// elements within the depth does not matter to a product, so these bytes, as they are, are
// fragments for tensor cores. Without them, each lane multiplies its quarter of the depth and the
// quarters are added up into the same places.
#pragma once

#include "element.h"
#include "plan.h"

namespace fastrnn::cuda {

// A thread's place in its warp.
struct Lane {
  int column, quarter;
  FASTRNN_DEVICE Lane() : column(thread_index() % 32 / 4), quarter(thread_index() % 4) {}
};

// Accumulates tiles of 16 columns by octets of rows; sums(tile, octet) are the values of this lane:
// of column r, then of column r + 8, in the rows 2q and 2q + 1.
template <class S, bool Tensor>
struct Accumulator;

template <class S>
struct Accumulator<S, true> {
  static constexpr int octets = 2;
  static constexpr int ahead = 4;  // blocks of states that are loaded at once
  struct Fragments {
    Vector16 of[octets];
  };
  float sums[kWarpTiles][octets][4] = {};

  template <class Load>
  FASTRNN_DEVICE static Fragments read(const char* states, int64_t row_bytes, int parts,
                                       Load load) {
    Fragments result;
#pragma unroll
    for (int n = 0; n < octets; ++n) {
      if (n < parts) result.of[n] = load(states + n * kOctet * row_bytes);
    }
    return result;
  }

  FASTRNN_DEVICE void add(const char* weights, int tiles, const Fragments& states, int parts) {
    Vector16 b[octets];
#pragma unroll
    for (int n = 0; n < octets; ++n) b[n] = prepare(states.of[n]);
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      if (m >= tiles) break;
      const Vector16 low = load(weights + m * kTile * kBlockBytes);
      const Vector16 high = load(weights + (m * kTile + kTile / 2) * kBlockBytes);
#pragma unroll
      for (int n = 0; n < octets; ++n) {
        if (n >= parts) break;
        mma(S{}, sums[m][n], {low.x, high.x, low.y, high.y}, {b[n].x, b[n].y});
        mma(S{}, sums[m][n], {low.z, high.z, low.w, high.w}, {b[n].z, b[n].w});
      }
    }
  }
  FASTRNN_DEVICE void finish(int) {}

  // The weights are rounded once, before the scan.
  FASTRNN_DEVICE static Vector16 prepare(Vector16 v) {
    if constexpr (sizeof(S) == 4) {
      float values[4];
      __builtin_memcpy(values, &v, sizeof(v));
#pragma unroll
      for (float& value : values) value = round_to_tf32(value);
      __builtin_memcpy(&v, values, sizeof(v));
    }
    return v;
  }
  FASTRNN_DEVICE static int64_t first_row(const Lane& lane) { return lane.column; }
};

template <class S>
struct Accumulator<S, false> {
  static constexpr int octets = 1;
  static constexpr int ahead = 1;
  struct Fragments {
    Vector16 of[kOctet];
  };
  using T = Compute<S>;
  T quarters[kWarpTiles][2][kOctet] = {};
  T sums[kWarpTiles][octets][4];

  template <class Load>
  FASTRNN_DEVICE static Fragments read(const char* states, int64_t row_bytes, int, Load load) {
    Fragments result;
#pragma unroll
    for (int row = 0; row < kOctet; ++row) result.of[row] = load(states + row * row_bytes);
    return result;
  }

  FASTRNN_DEVICE void add(const char* weights, int tiles, const Fragments& states, int) {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      if (m >= tiles) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Widened<S> w(load(weights + (m * 2 + half) * kOctet * kBlockBytes));
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

  FASTRNN_DEVICE void finish(int tiles) {
    const int quarter = Lane().quarter;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      if (m >= tiles) break;
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

  FASTRNN_DEVICE static int64_t first_row(const Lane&) { return 0; }

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

// Writes the sums of an accumulator to `target`, rows of `pitch`.
template <class Acc, class T>
FASTRNN_DEVICE void store_sums(const Acc& acc, const Lane& lane, int tiles, int octets, int pitch,
                               T* target) {
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
    if (m >= tiles) break;
#pragma unroll
    for (int n = 0; n < Acc::octets; ++n) {
      if (n >= octets) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        target[(n * kOctet + i % 2) * pitch + m * kTile + i / 2 * kOctet + lane.column] =
            acc.sums[m][n][i];
      }
    }
  }
}

// sums: [slices][rows][columns + kSkew]; load_state reads 16 bytes of states.
template <class S, bool Tensor, class Load>
FASTRNN_DEVICE void multiply(const Layout& layout, const char* weights, const char* states,
                             Load load_state, Compute<S>* sums) {
  using Acc = Accumulator<S, Tensor>;
  const Lane lane;
  const int64_t row_bytes = layout.stride * sizeof(S);
  const int64_t block_bytes = int64_t{layout.columns} * kBlockBytes;
  const int pitch = layout.columns + kSkew;
  const int parts = layout.slices * layout.row_parts * layout.column_parts;
  for (int part = thread_index() / 32; part < parts; part += kWarps) {
    const int slice = part % layout.slices;
    const int row = part / layout.slices % layout.row_parts * (Acc::octets * kOctet);
    const int column = part / layout.slices / layout.row_parts * (kWarpTiles * kTile);
    const int tiles = (layout.columns - column) / kTile;
    const int octets = (layout.rows - row) / kOctet;
    const int64_t end = layout.depth_blocks * (slice + 1) / layout.slices;
    const char* w = weights + (column + lane.column) * kBlockBytes + lane.quarter * 16;
    const char* s = states + (row + Acc::first_row(lane)) * row_bytes + lane.quarter * 16;
    Acc acc;
    for (int64_t k = layout.depth_blocks * slice / layout.slices; k < end; k += Acc::ahead) {
      typename Acc::Fragments read[Acc::ahead];
#pragma unroll
      for (int j = 0; j < Acc::ahead; ++j) {
        if (k + j < end) {
          read[j] = Acc::read(s + (k + j) * kBlockBytes, row_bytes, octets, load_state);
        }
      }
#pragma unroll
      for (int j = 0; j < Acc::ahead; ++j) {
        if (k + j < end) acc.add(w + (k + j) * block_bytes, tiles, read[j], octets);
      }
    }
    acc.finish(tiles);
    store_sums(acc, lane, tiles, octets, pitch,
               sums + (slice * layout.rows + row + 2 * lane.quarter) * pitch + column);
  }
}

}  // namespace fastrnn::cuda
