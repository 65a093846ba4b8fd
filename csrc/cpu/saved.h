// What the forward scan saves of some steps of one direction for the backward scan.
#pragma once

#include "scan.h"

namespace fastrnn::FASTRNN_VARIANT {

// K: the values of a unit and step in `gates`.
inline int saved_values(const LayerArgs& args) {
  return args.layer_norm ? args.traits->recurrent : args.traits->saves;
}

// The cell's own learned vectors of a direction, Q of [H].
inline const void* const* own_parameters(const LayerArgs& args, int direction) {
  return args.parameters[direction] + (args.layer_norm ? args.traits->norms : 0);
}

// Row n of the layer is row n - begin of these buffers.
template <class Gate, class Extra>
struct Saved {
  Gate* gates;   // [rows, gate_stride]: see ForwardArgs::gates; null: not saved
  Extra* extra;  // [rows, extra_stride]: this direction's columns of `extra`; null: not saved
  int64_t gate_stride;   // K*H
  int64_t extra_stride;  // E*H times the directions that share the buffer
  int64_t begin;

  Gate* gate_row(int64_t n) const { return gates + (n - begin) * gate_stride; }
  Extra* extra_row(int64_t n) const { return extra + (n - begin) * extra_stride; }
};

}  // namespace fastrnn::FASTRNN_VARIANT
