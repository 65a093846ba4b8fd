// One cell and one dtype as a CellModule. Built on the user's machine, with
//   FASTRNN_CELL_HEADER, FASTRNN_CELL  the header of the cell, and its name in namespace fastrnn
//   FASTRNN_MODE                       its mode, a string
//   FASTRNN_ELEMENT, FASTRNN_DTYPE     the element type, and its name in DType
// and the macros of vec.h.
#include "cell_module.h"

#include FASTRNN_CELL_HEADER

#include "compiled_cell.h"

namespace fastrnn {
namespace FASTRNN_VARIANT {
namespace {

constexpr CellTraits traits() {
  CellTraits traits = traits_of<FASTRNN_CELL>(-1);
  traits.mode = FASTRNN_MODE;
  return traits;
}

constexpr CellLoops<FASTRNN_ELEMENT> loops = compiled_cell<FASTRNN_CELL, FASTRNN_ELEMENT>();

}  // namespace
}  // namespace FASTRNN_VARIANT
}  // namespace fastrnn

extern "C" __attribute__((visibility("default"))) const fastrnn::CellModule fastrnn_cell;
extern "C" const fastrnn::CellModule fastrnn_cell{fastrnn::FASTRNN_VARIANT::traits(),
                                                  fastrnn::DType::FASTRNN_DTYPE,
                                                  &fastrnn::FASTRNN_VARIANT::loops};
