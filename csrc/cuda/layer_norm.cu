// What layers with layer normalisation have in common, whatever their cell.
#include "layer_norm.h"

namespace fastrnn::cuda {
FASTRNN_NORM_PASSES(template, RecurrenceForward)
FASTRNN_NORM_PASSES(template, RecurrenceBackward)
}  // namespace fastrnn::cuda
