// A cell's kernels for one dtype in a shared object of their own, built after the library and
// loaded at run time. Its functions call those that are FASTRNN_SHARED in the library.
#pragma once

#include "../cells/traits.h"
#include "scan.h"

namespace fastrnn {

struct CellModule {
  CellTraits traits;
  DType dtype;
  void (*forward)(const ForwardArgs& args, int threads);
  int64_t (*pack)(const ForwardArgs& args, void* to);  // as CpuVariant's
  void (*backward)(const BackwardArgs& args, int threads);
};

}  // namespace fastrnn
