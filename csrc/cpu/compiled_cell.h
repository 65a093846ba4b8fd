// A cell's loops, compiled: see cell_loops.h.
#pragma once

#include "backward_cell.h"
#include "cell_loops.h"
#include "forward_cell.h"
#include "layer_norm_cell.h"

namespace fastrnn::FASTRNN_VARIANT {

template <class Cell, class S>
constexpr CellLoops<S> compiled_cell() {
  CellLoops<S> loops{
      forward_loop<Cell, S>,
      [](const BackwardContext<S>& context, const BackwardStep<S>& step,
         const BackwardTile<S>& tile) { BackwardCell<Cell, S>(context).run(step, tile); },
      nullptr, nullptr};
  if constexpr (General<Cell>::normalises_state) {
    loops.forward_row = [](const ForwardContext<S>& context, const ForwardStep<S>& step,
                           const ForwardRow<S>& row) {
      ForwardCell<Cell, S>(context).run_whole_row(step, row);
    };
  }
  if constexpr (General<Cell>::norms > 0) {
    loops.backward_row = [](const BackwardContext<S>& context, const BackwardStep<S>& step,
                            const BackwardRow<S>& row) {
      BackwardCell<Cell, S>(context).run_whole_row(step, row);
    };
  }
  return loops;
}

}  // namespace fastrnn::FASTRNN_VARIANT
