// Compiled once per cell and pass; see CMakeLists.txt.
#include "layer_norm.h"

namespace fastrnn::cuda {
#ifdef FASTRNN_BACKWARD
FASTRNN_NORM_PASSES(extern template, RecurrenceBackward)
template void backward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const RecurrenceBackward&);
#else
FASTRNN_NORM_PASSES(extern template, RecurrenceForward)
template void forward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const RecurrenceForward&);
#endif
}  // namespace fastrnn::cuda
