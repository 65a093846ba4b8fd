// Compiled once per instruction set that multiplies integers in its own way; see CMakeLists.txt for
// the flags.
#include "int8.h"

#include <array>

#include "../cells/registry.h"
#include "forward_cell.h"
#include "int8_scan.h"

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)

namespace fastrnn {
namespace FASTRNN_VARIANT {
namespace {

template <class... Cell>
constexpr std::array<ForwardLoop<float>, sizeof...(Cell)> forward_loops(CellList<Cell...>) {
  return {forward_loop<Cell, float>...};
}

int64_t packed_bytes(const Int8Shape& shape) { return Int8Weight(shape).bytes(); }

void pack(const Int8Shape& shape, const int8_t* weight, const float* scales, void* packed) {
  Int8Weight(shape).pack(weight, scales, static_cast<char*>(packed));
}

void unpack(const Int8Shape& shape, const void* packed, int8_t* weight, float* scales) {
  Int8Weight(shape).unpack(static_cast<const char*>(packed), weight, scales);
}

void forward(const ForwardArgs& args, int threads) {
  static constexpr auto loops = forward_loops(Cells{});
  int8_forward(args, loops[args.cell], threads);
}

}  // namespace

extern const Int8Kernels kernels;
const Int8Kernels kernels{FASTRNN_STRING(FASTRNN_INT8), packed_bytes, pack, unpack, forward};

}  // namespace FASTRNN_VARIANT
}  // namespace fastrnn
