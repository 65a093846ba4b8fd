// One cell and one dtype as a CellModule. Built on the user's machine, with
//   FASTRNN_CELL_HEADER, FASTRNN_CELL  the header of the cell, and its name in namespace fastrnn
//   FASTRNN_MODE                       its mode, a string
//   FASTRNN_ELEMENT, FASTRNN_DTYPE     the element type, and its name in DType
#include "cell_module.h"

#include FASTRNN_CELL_HEADER

#include "device.h"
#include "layer_norm.h"

namespace fastrnn::cuda {
namespace {

// The module has a CUDA runtime of its own, whose current device is its own.
void forward(const Cuda& device, const RecurrenceForward& args) {
  set_device(device.device);
  run_forward<FASTRNN_CELL, FASTRNN_ELEMENT>(device, args);
}

void backward(const Cuda& device, const RecurrenceBackward& args) {
  set_device(device.device);
  run_backward<FASTRNN_CELL, FASTRNN_ELEMENT>(device, args);
}

constexpr CellTraits traits() {
  CellTraits traits = traits_of<FASTRNN_CELL>(-1);
  traits.mode = FASTRNN_MODE;
  return traits;
}

}  // namespace
}  // namespace fastrnn::cuda

#define FASTRNN_EXPORTED extern "C" __attribute__((visibility("default")))
FASTRNN_EXPORTED const fastrnn::cuda::CellModule fastrnn_cell;
FASTRNN_EXPORTED const fastrnn::cuda::CellModule fastrnn_cell{
    fastrnn::cuda::traits(),
    fastrnn::DType::FASTRNN_DTYPE,
    fastrnn::cuda::forward,
    fastrnn::cuda::backward,
};
