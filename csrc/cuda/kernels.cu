// Compiled once per cell and pass; see CMakeLists.txt.
#include "backward.h"
#include "forward.h"

namespace fastrnn::cuda {
#ifdef FASTRNN_BACKWARD
template void backward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const BackwardArgs&);
#else
template void forward_dev_impl<Cuda, FASTRNN_CELL>(const Cuda&, const ForwardArgs&);
#endif
}  // namespace fastrnn::cuda
