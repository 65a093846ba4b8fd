// One compiled variant of the kernels of layers with weights of 8 bits, as the rest of the library
// sees it.
//
// A row of a weight is scale * q, with integers q in [-127, 127] and scale = max |w| / 127. Rows of
// inputs and of states are quantised in the same way as they come. Products are sums of integers
// in 32 bits, which are exact, so that they are the same in every variant, for any number of rows
// and threads. Gates and states are float32. No sum or product of floats is contracted: so all
// results are the same bit for bit in every variant, too.
#pragma once

#include "scan.h"

namespace fastrnn {

// A weight [gates * columns, depth].
struct Int8Shape {
  int64_t columns;
  int gates;
  int64_t depth;
};

// The greatest depth for which no sum, of two rows or of one row times 128, leaves 32 bits.
constexpr int64_t kMaxInt8Depth = int64_t{1} << 17;

struct Int8Kernels {
  const char* name;

  // A weight and the scales of its rows in the order in which the kernels read them. Aligned to a
  // cache line.
  int64_t (*packed_bytes)(const Int8Shape& shape);
  void (*pack)(const Int8Shape& shape, const int8_t* weight, const float* scales, void* packed);
  void (*unpack)(const Int8Shape& shape, const void* packed, int8_t* weight, float* scales);

  // The scan of a cell of cells/registry.h. Weights are packed, everything else is float32. A row
  // of x or of states that holds infinity or NaN makes NaN. Neither `gates` nor `boundaries` are
  // written, `extra` only for c_t.
  void (*forward)(const ForwardArgs& args, int threads);
};

// The best that this CPU can run and FASTRNN_CPU, if it is set, allows.
const Int8Kernels& active_int8_kernels();

}  // namespace fastrnn
