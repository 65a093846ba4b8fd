// Compiled once per cell and pass; see CMakeLists.txt.
#include "layer_norm.h"

namespace fastrnn::cuda {
#ifdef FASTRNN_BACKWARD
template void backward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const RecurrenceBackward&);
#else
template void forward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const RecurrenceForward&);
#endif
}  // namespace fastrnn::cuda
