// What a scan on CUDA is told: the recurrence of a layer alone, in device pointers, and a plan.
//
// The large products are not its own. The forward scan finds W_ih x + b_ih of all steps, the
// backward scan leaves the gradients of the gates of all steps. The caller owns every buffer; all
// are contiguous and on the device, `extra` and d_extra in the type that is computed in.
#pragma once

#include "plan.h"

namespace fastrnn::cuda {

// For rows that do not all live, unbroken, for all steps; null else.
struct Places {
  const int64_t* place;  // [T, B]: n, where the row's step lies in N; -1: not a valid step
  const int64_t* before[kMaxDirections];  // [T, B]: the same of the step before it in the
                                          // direction's order; kInitial or kReset
  const int64_t* lengths;                 // [B]: beyond it no step is valid
};
constexpr int64_t kInitial = -1;  // the initial state comes before
constexpr int64_t kReset = -2;    // a segment begins: zeros come before

// What both passes are told.
struct Recurrence {
  Problem problem;
  int64_t total;  // N
  Places places;
  const void* weight_hh[kMaxDirections];  // [G*H, H]
  const void* h_0;                        // [D, B, H] or null for zeros
  const void* c_0;
  // [2, D, B, H] in the type that is computed in, or null. h and c, or their gradients, unrounded:
  // what the pass carries from the first step on in place of its initial ones, and what it leaves.
  void* carried;
};

struct RecurrenceForward : Recurrence {
  const void* bias_hh[kMaxDirections];  // [G*H] or null

  void* gates;  // [D, N, G*H]: W_ih x + b_ih in; the activated gates out, if `keep`
  bool keep;
  void* output;  // [N, D*H]
  void* h_n;     // [D, B, H]
  void* c_n;
  void* extra;  // [N, D*H] or null
};

struct RecurrenceBackward : Recurrence {
  const void* output;
  const void* gates;
  const void* extra;

  const void* d_output;  // null means zero
  const void* d_h_n;
  const void* d_c_n;
  const void* d_extra;

  void* d_gates;      // [D, N, G*H]: gradients of W_ih x + b_ih
  void* d_recurrent;  // [D, N, H]: of the last gate of W_hh h + b_hh; cells that split the gradient
  void* d_h_0;        // [D, B, H] or null
  void* d_c_0;
};

// Where and how a scan runs.
struct Cuda {
  void* stream;
  Plan plan;
  void* workspace;  // Layout::workspace bytes, aligned to 16
};

template <class Device, class Cell>
void forward_dev_impl(const Device& device, const RecurrenceForward& args);
template <class Device, class Cell>
void backward_dev_impl(const Device& device, const RecurrenceBackward& args);

}  // namespace fastrnn::cuda
