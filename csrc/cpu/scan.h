// What a scan on the CPU is told: one layer in all its directions, with the products of its input
// and of its weight gradients. Sizes and layouts are those of ../scan.h.
//
// The caller owns every buffer. All are contiguous and hold the dtype of the scan, except `extra`,
// d_extra and `boundaries`, which are float32 for the 16-bit dtypes, as is everything that is
// carried from step to step.
#pragma once

#include "../cells/traits.h"
#include "../scan.h"

namespace fastrnn {

// What packed weights are stored in: the factors of the scan's own dtype, or bfloat16, which
// float32 scans widen as they read them.
enum class Storage : int { kOwn, kBFloat16 };

// What both passes are told.
struct LayerArgs : ScanShape {
  const CellTraits* traits;
  // CellLoops of the dtype, of a cell that is loaded at run time; null: of the registry's.
  const void* loops;

  const int64_t* batch_sizes;  // [T], not increasing, each <= B; null: all rows live for all steps
  const bool* resets;          // [N] or null: this step begins a new segment of its row

  const void* x;                          // [N, I]
  const void* weight_ih[kMaxDirections];  // [G*H, I]
  const void* weight_hh[kMaxDirections];  // [R*H, P]
  const void* bias_ih[kMaxDirections];    // [G*H] or null
  const void* bias_hh[kMaxDirections];    // [R*H], if there is bias_ih
  const void* weight_hr[kMaxDirections];  // [P, H] projects h; null: P = H. Not with a direct path.
  const void* h_0;                        // [D, B, P] or null for zeros
  const void* c_0;                        // [D, B, C*H] or null; only cells with such states
  const void* inputs;                     // [N, D*Z*H], only of cells with inputs
  const void* h_mask;  // [D, B, P] or null: multiplies the h that W_hh multiplies
  // With these probabilities a unit keeps its state in a step; without a seed the state is the mean
  // of both, weighted so. See zoneout.h.
  double zoneout_h, zoneout_c;
  const int64_t* seed;                            // one number, or null
  const void* const* parameters[kMaxDirections];  // Q of [H], after those of layer_norm
  // Normalises what the cell takes: see layer_norm.h. `parameters` then begin with the gains of
  // W_ih x [G*H] and of W_hh h [R*H] and, of cells that normalise c, gain and bias [H] of it.
  bool layer_norm;

  // Of layers on top of each other, see forward_stack.h: multiplies the output before the layer
  // above takes it. [N, P] or null.
  const void* dropout;
};

struct ForwardArgs : LayerArgs {
  void* output;   // [N, D*P]: every h_t
  void* dropped;  // [N, P], with `dropout`: the layer above's x
  void* h_n;      // [D, B, P]: h after each row's last step. Must not alias h_0.
  void* c_n;      // [D, B, C*H]; only cells with such states

  // What backward needs, or null if there will be no backward.
  // [N, K*H]: the activated gates, or what else a cell saves; with layer_norm W_hh h, R for K.
  void* gates[kMaxDirections];
  void* extra;  // [N, D*E*H]: states beside h, as c_t; GRU: W_hn h + b_hn; only cells that have it
  // With checkpoint_every in place of `gates`: [S-1, D, B, P + C*H], the states that a direction
  // carries across each boundary between two of the S segments. Boundary k lies between steps (k +
  // 1) * checkpoint_every - 1 and the next.
  void* boundaries;

  // All weights, as pack() wrote them before, or null: then each scan packs them for itself, or
  // reads them as they lie. With them, weight_* only says which there are, and no sum depends on
  // how many rows there are.
  const void* packed;
  Storage storage;
};

// The buffers that forward wrote are only read here, so that backward can run twice on them.
struct BackwardArgs : LayerArgs {
  const void* output;
  // Null with checkpoint_every, where backward computes them again, a segment at a time.
  const void* gates[kMaxDirections];
  const void* extra;
  const void* boundaries;

  // What flows back from a step to the one before it, through all states, is multiplied by the
  // step's scale and then held to a magnitude.
  const void* grad_scale;  // [N] or null, in the type that states are carried in
  double grad_clip;        // 0: any magnitude

  // Incoming gradients; null means zero.
  const void* d_output;  // [N, D*P]; in a stack, the layer above writes it
  // In a stack: what is to be added to that, where the output is a result too. [N, P] or null.
  const void* d_result;
  const void* d_h_n;    // [D, B, P]
  const void* d_c_n;    // [D, B, C*H]
  const void* d_extra;  // [N, D*C*H]; only cells whose extra are states

  // Outgoing gradients; null if not wanted.
  void* d_x;                          // [D, N, I]: the part of each direction, to be added up
  void* d_h_0;                        // [D, B, P]
  void* d_c_0;                        // [D, B, C*H]
  void* d_inputs;                     // [N, D*Z*H]
  void* d_weight_ih[kMaxDirections];  // [G*H, I]
  void* d_weight_hh[kMaxDirections];  // [R*H, P]
  void* d_weight_hr[kMaxDirections];  // [P, H]
  void* d_bias_ih[kMaxDirections];    // [G*H]; both or none
  void* d_bias_hh[kMaxDirections];    // [R*H]
  void* const* d_parameters[kMaxDirections];  // like `parameters`, each may be null
};

}  // namespace fastrnn
