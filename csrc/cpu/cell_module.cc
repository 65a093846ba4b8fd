// One cell and one dtype as a CellModule. Built on the user's machine, with
//   FASTRNN_CELL_HEADER, FASTRNN_CELL  the header of the cell, and its name in namespace fastrnn
//   FASTRNN_MODE                       its mode, a string
//   FASTRNN_ELEMENT, FASTRNN_DTYPE     the element type, and its name in DType
// and the macros of vec.h.
#include "cell_module.h"

#include FASTRNN_CELL_HEADER

#include "backward.h"
#include "forward.h"

namespace fastrnn {
namespace FASTRNN_VARIANT {
namespace {

void forward(const ForwardArgs& args, int threads) {
  forward_dev_impl<Cpu, FASTRNN_CELL, FASTRNN_ELEMENT>({threads}, args);
}

int64_t pack(const ForwardArgs& args, void* to) {
  return pack_layer<FASTRNN_CELL, FASTRNN_ELEMENT>(args, to);
}

void backward(const BackwardArgs& args, int threads) {
  backward_dev_impl<Cpu, FASTRNN_CELL, FASTRNN_ELEMENT>({threads}, args);
}

constexpr CellTraits traits() {
  CellTraits traits = traits_of<FASTRNN_CELL>(-1);
  traits.mode = FASTRNN_MODE;
  return traits;
}

}  // namespace
}  // namespace FASTRNN_VARIANT
}  // namespace fastrnn

extern "C" FASTRNN_SHARED const fastrnn::CellModule fastrnn_cell;
extern "C" const fastrnn::CellModule fastrnn_cell{
    fastrnn::FASTRNN_VARIANT::traits(), fastrnn::DType::FASTRNN_DTYPE,
    fastrnn::FASTRNN_VARIANT::forward,  fastrnn::FASTRNN_VARIANT::pack,
    fastrnn::FASTRNN_VARIANT::backward,
};
