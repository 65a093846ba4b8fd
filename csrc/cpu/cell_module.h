// A cell's loops for one dtype in a shared object of their own, compiled after the library, with
// the flags of its variant, and loaded at run time.
#pragma once

#include "../cells/traits.h"
#include "scan.h"

namespace fastrnn {

struct CellModule {
  CellTraits traits;
  DType dtype;
  const void* loops;  // CellLoops of the dtype
};

}  // namespace fastrnn
