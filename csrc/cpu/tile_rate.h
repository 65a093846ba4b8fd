// One register tile over and over, on data in L1: what it loses against multiply_add.h is lost in
// every layer.
#pragma once

#include <cstring>

#include "multiply.h"
#include "workspace.h"

namespace fastrnn::FASTRNN_VARIANT {

// Runs the tallest tile of so many vectors, `rounds` times. Transposed: that of weight gradients.
// Returns the number of floating-point operations.
inline int64_t run_tile(int vectors, int64_t depth, bool transposed, int64_t rounds) {
  using V = Vec<float>;
  const int rows = max_rows(vectors);
  const int64_t width = vectors * V::lanes;
  Workspace workspace;
  const auto take = [&workspace](int64_t count) {
    float* const zeros = workspace.take<float>(count);
    std::memset(zeros, 0, count * sizeof(float));
    return zeros;
  };
  float *left = take(rows * depth), *packed = take(depth * width), *target = take(rows * width);
  if (transposed) {
    const auto run = tile_for<Accumulate<float>>(vectors, rows);
    for (int64_t i = 0; i < rounds; ++i) run(left, rows, packed, depth, target);
  } else {
    const float* row_of[kMaxRows];
    for (int r = 0; r < rows; ++r) row_of[r] = left + r * depth;
    V sums[kMaxRows * kMaxVectors];
    const auto run = tile_for<Multiply<float>>(vectors, rows);
    for (int64_t i = 0; i < rounds; ++i) run(row_of, packed, width, packed, depth, sums);
  }
  return 2 * rows * width * depth * rounds;
}

}  // namespace fastrnn::FASTRNN_VARIANT
