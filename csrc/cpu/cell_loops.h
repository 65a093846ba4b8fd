// The loops in which a cell's functions stand: all that is compiled for each cell. The scans know a
// cell by these and by its traits.
#pragma once

#include "backward_context.h"
#include "forward_context.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class S>
struct CellLoops {
  // On a register tile.
  ForwardLoop<S> forward;
  void (*backward)(const BackwardContext<S>& context, const BackwardStep<S>& step,
                   const BackwardTile<S>& tile);
  // On a whole row, with layer normalisation; null of cells that have none. Only cells that
  // normalise c need forward_row: others take the normalised row as tiles.
  void (*forward_row)(const ForwardContext<S>& context, const ForwardStep<S>& step,
                      const ForwardRow<S>& row);
  void (*backward_row)(const BackwardContext<S>& context, const BackwardStep<S>& step,
                       const BackwardRow<S>& row);
};

}  // namespace fastrnn::FASTRNN_VARIANT
