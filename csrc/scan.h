// A scan runs one cell over T steps of one layer, in all its directions. These structs are
// everything that a scan is told; the device code behind forward_dev_impl / backward_dev_impl reads
// nothing else.
//
// Sizes: T steps, B batch rows, I input features, H hidden units, P features of h (H unless it is
// projected), D directions, G gates of the cell, N steps of all rows.
//
// Rows may end at different steps. They are then sorted by length, longest first, and stored
// without padding, as in torch's PackedSequence: batch_sizes[t] rows are alive at step t and lie
// one after the other. Without batch_sizes all B rows live for T steps and N = T * B. Either way, a
// buffer over steps is N rows of features, and the rows of one step are contiguous.
//
// A reset marks a step that begins a new segment of its row: nothing goes from the step before it
// to this one, nor back in the reverse direction. Both enter such a segment with a zero state.
//
// The caller owns every buffer. All are contiguous and hold the dtype of the scan, except `extra`
// and d_extra, which are float32 for the 16-bit dtypes, as is everything that is carried from step
// to step.
#pragma once

#include <cstdint>

namespace fastrnn {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

constexpr int kMaxDirections = 2;

struct ForwardArgs {
  int cell;  // index into cells/registry.h
  DType dtype;
  int64_t steps, batch, input, hidden, shown;  // T, B, I, H, P
  int directions;              // the second one runs from each row's last step to its first,
  bool reverse;                // or a single one does
  const int64_t* batch_sizes;  // [T], not increasing, each <= B; null: all rows live for all steps
  const bool* resets;          // [N] or null: this step begins a new segment of its row

  const void* x;                          // [N, I]
  const void* weight_ih[kMaxDirections];  // [G*H, I]
  const void* weight_hh[kMaxDirections];  // [G*H, P]
  const void* weight_hr[kMaxDirections];  // [P, H] projects h; null: P = H. Not with a direct path.
  const void* bias_ih[kMaxDirections];    // [G*H] or null
  const void* bias_hh[kMaxDirections];    // the same
  const void* h_0;                        // [D, B, P] or null for zeros
  const void* c_0;                        // [D, B, H] or null; only cells with a cell state

  void* output;  // [N, D*P]: every h_t
  void* h_n;     // [D, B, P]: h after each row's last step. Must not alias h_0.
  void* c_n;     // [D, B, H]; only cells with a cell state

  // What backward needs of each step, or null if there will be no backward.
  void* gates[kMaxDirections];  // [N, G*H]: the activated gates; only cells that save them
  void* extra;                  // [N, D*H]: LSTM: c_t; GRU: W_hn h + b_hn; only cells that have it
};

// The buffers that forward wrote are only read here, so that backward can run twice on them.
struct BackwardArgs {
  int cell;
  DType dtype;
  int64_t steps, batch, input, hidden, shown;
  int directions;
  bool reverse;
  const int64_t* batch_sizes;
  const bool* resets;

  const void* x;
  const void* weight_ih[kMaxDirections];
  const void* weight_hh[kMaxDirections];
  const void* weight_hr[kMaxDirections];
  const void* h_0;
  const void* c_0;
  const void* output;
  const void* gates[kMaxDirections];
  const void* extra;

  // Incoming gradients; null means zero.
  const void* d_output;  // [N, D*P]
  const void* d_h_n;     // [D, B, P]
  const void* d_c_n;     // [D, B, H]
  const void* d_extra;   // [N, D*H]; only cells whose extra is the cell state

  // Outgoing gradients; null if not wanted.
  void* d_x;                          // [D, N, I]: the part of each direction, to be added up
  void* d_h_0;                        // [D, B, P]
  void* d_c_0;                        // [D, B, H]
  void* d_weight_ih[kMaxDirections];  // [G*H, I]
  void* d_weight_hh[kMaxDirections];  // [G*H, P]
  void* d_weight_hr[kMaxDirections];  // [P, H]
  void* d_bias_ih[kMaxDirections];    // [G*H]
  void* d_bias_hh[kMaxDirections];    // [G*H]
};

}  // namespace fastrnn
