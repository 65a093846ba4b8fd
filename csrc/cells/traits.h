// What a cell is, for code that knows it by its index alone.
#pragma once

#include <cstdint>

namespace fastrnn {

struct CellTraits {
  const char* mode;  // its name, as in torch.nn.RNNBase.mode
  int index;
  int gates;       // G, the rows of weight_ih per unit
  int recurrent;   // R, those of weight_hh; 0: the cell has none
  int states;      // C, carried from step to step beside h
  int extras;      // E, values per unit and step beside h that backward reads: the states, if any
  int saves;       // K, values per unit and step that forward saves for backward alone
  int inputs;      // Z, those of each step and unit that no weight multiplies
  int parameters;  // Q, learned vectors [H]
  int norms;       // those of layer normalisation, before the Q; 0: it has none
  bool splits_gradient, has_direct_path;
  bool rebuilds_cell_state;  // from what forward saves and the state before: see lstm.h

  bool has_cell_state() const { return states > 0; }
  bool has_extra() const { return extras > 0; }
  bool saves_gates() const { return saves > 0; }
  // Projections of h are in the kernels of cells that carry another state beside it.
  bool can_project() const { return states == 1 && !has_direct_path && inputs + parameters == 0; }
  // Learned vectors of a direction.
  int vectors(bool layer_norm) const { return parameters + (layer_norm ? norms : 0); }
  // Tensors per direction.
  int least_weights(bool layer_norm) const { return (recurrent > 0 ? 2 : 1) + vectors(layer_norm); }
  int most_weights(bool layer_norm) const { return (recurrent > 0 ? 5 : 2) + vectors(layer_norm); }
  // Whether that many are those of so many directions.
  bool has_weights(int64_t count, int64_t entries, bool layer_norm) const {
    return count % entries == 0 && least_weights(layer_norm) <= count / entries &&
           count / entries <= most_weights(layer_norm);
  }
};

}  // namespace fastrnn
