// A cell's kernels for one dtype in a shared object of their own, built for the GPUs at hand and
// loaded at run time.
#pragma once

#include "../cells/traits.h"
#include "scan.h"

namespace fastrnn::cuda {

struct CellModule {
  CellTraits traits;
  DType dtype;
  void (*forward)(const Cuda& device, const RecurrenceForward& args);
  void (*backward)(const Cuda& device, const RecurrenceBackward& args);
};

}  // namespace fastrnn::cuda
