// A scan runs one cell over T steps of one layer, in all its directions.
//
// Sizes: T steps, B batch rows, I input features, H hidden units, P features of h (H unless it is
// projected), D directions, G gates of the cell, N steps of all rows. R gates have rows in W_hh:
// all, unless a cell is more general (cells/general.h). It then has C states beside h, K saved
// values, Z inputs and Q learned vectors per unit; for the built-in ones see cells/traits.h.
//
// Rows may end at different steps. They are then sorted by length, longest first, and stored
// without padding, as in torch's PackedSequence: batch_sizes[t] rows are alive at step t and lie
// one after the other. Without batch_sizes all B rows live for T steps and N = T * B. Either way, a
// buffer over steps is N rows of features, and the rows of one step are contiguous.
//
// A reset marks a step that begins a new segment of its row: nothing goes from the step before it
// to this one, nor back in the reverse direction. Both enter such a segment with a zero state.
#pragma once

#include <cstdint>

namespace fastrnn {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int kMaxDirections = 2;

struct ScanShape {
  int cell;  // index into cells/registry.h
  DType dtype;
  int64_t steps, batch, input, hidden, proj;  // T, B, I, H, P
  int directions;            // the second one runs from each row's last step to its first,
  bool reverse;              // or a single one does
  int64_t checkpoint_every;  // steps of a segment that backward computes again; 0: none
};

}  // namespace fastrnn
