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

// Which units keep their states in a step: see ../cpu/zoneout.h, whose bits these are.
struct ZoneoutArgs {
  double probability[2];  // of h and of c; 0: none does
  uint32_t limit[2];      // words below it say so
  const int64_t* seed;    // one number; null: the state is the mean of both
  double one_in_mean;     // 1 / (1 - probability of h)
  int64_t first_step;     // of the layer, where the scan is over a part of its steps,
  int first_direction;    // and one of its directions

  FASTRNN_HD constexpr bool is_on() const { return probability[0] > 0 || probability[1] > 0; }
};

// Layer normalisation of W_hh h, and of the c that an LSTM's output reads: see layer_norm.h.
struct LayerNormArgs {
  const void* gains;  // [D, R*H], and of cells that normalise c its gain and its bias: [D,
                      // (R+2)*H]; null: there is none
  void* scratch;      // [D, B, (R+3)*H], in the type that is computed in
  void* raw;          // [D, N, R*H]: W_hh h, which forward saves, if it is not null
  const void* gates;  // [D, N, G*H], backward: W_ih x, normalised, + b_ih
  void* sums;         // [D, B, (2R+2)*H], backward, in the type that is computed in: gradients of
                      // the gains of W_hh h, of b_hh, and of the gain and the bias of c

  FASTRNN_HD constexpr bool is_on() const { return gains != nullptr; }
};

// What both passes are told.
struct Recurrence {
  Problem problem;
  int64_t total;  // N
  Places places;
  const void* weight_hh[kMaxDirections];  // [R*H, H]
  const void* h_0;                        // [D, B, H] or null for zeros
  const void* c_0;                        // [D, B, C*H]
  const void* inputs;                     // [N, D*Z*H]
  const void* parameters;                 // [D, Q, H], the learned vectors
  const void* bias_hh[kMaxDirections];    // [R*H] or null; backward reads it with layer_norm
  const void* h_mask;  // [D, B, H] or null: multiplies the h that W_hh multiplies
  LayerNormArgs layer_norm;
  ZoneoutArgs zoneout;
  // [1+C, D, B, H] in the type that is computed in, or null. h and the other states, or their
  // gradients, unrounded: what the pass carries from the first step on in place of its initial
  // ones, and what it leaves.
  void* carried;
};

struct RecurrenceForward : Recurrence {
  const void* gates;  // [D, N, G*H]: W_ih x + b_ih

  void* saved;   // [D, N, K*H] or null; it may be `gates`, if K is G
  void* output;  // [N, D*H]
  void* h_n;     // [D, B, H]
  void* c_n;     // [D, B, C*H]
  void* extra;   // [N, D*E*H] or null
};

struct RecurrenceBackward : Recurrence {
  const void* output;
  const void* saved;
  const void* extra;

  // What flows back from a step to the one before it, through h and c, is multiplied by the step's
  // scale and then held to a magnitude.
  const void* grad_scale;  // [N] or null, in the type that is computed in
  double grad_clip;        // 0: any magnitude

  const void* d_output;  // null means zero
  const void* d_h_n;
  const void* d_c_n;
  const void* d_extra;

  void* d_gates;  // [D, N, G*H]: gradients of W_ih x + b_ih
  // Of cells that split the gradient, those of W_hh h + b_hh in the last `split` gates,
  // [D, N, split*H]: in all R, or of a built-in cell in the last alone, where the others are the
  // same as in d_gates.
  void* d_recurrent;
  int split;
  void* d_h_0;  // [D, B, H] or null
  void* d_c_0;
  void* d_inputs;  // as inputs, or null
  // [D, Q, B, H], zeros before the pass: those of the learned vectors, to be added up over B. In
  // the type that is computed in, or null.
  void* d_parameters;
};

// Where and how a scan runs.
struct Cuda {
  int device;
  void* stream;
  Plan plan;
  void* workspace;  // Layout::workspace bytes, aligned to 16
};

template <class Device, class Cell>
void forward_dev_impl(const Device& device, const RecurrenceForward& args);
template <class Device, class Cell>
void backward_dev_impl(const Device& device, const RecurrenceBackward& args);

}  // namespace fastrnn::cuda
