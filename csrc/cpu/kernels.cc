// Compiled once per instruction set; see CMakeLists.txt for the flags.
#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "variant.h"

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)
#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)

namespace fastrnn {
namespace FASTRNN_VARIANT {
namespace {

void forward(const ForwardArgs& args, int threads) {
  Cells::visit(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    if (args.dtype == DType::kFloat32) {
      forward_dev_impl<Cpu, Cell, float>({threads}, args);
    } else {
      forward_dev_impl<Cpu, Cell, double>({threads}, args);
    }
  });
}

void backward(const BackwardArgs& args, int threads) {
  Cells::visit(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    if (args.dtype == DType::kFloat32) {
      backward_dev_impl<Cpu, Cell, float>({threads}, args);
    } else {
      backward_dev_impl<Cpu, Cell, double>({threads}, args);
    }
  });
}

}  // namespace
}  // namespace FASTRNN_VARIANT

extern const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT);
const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT){
    FASTRNN_STRING(FASTRNN_VARIANT), FASTRNN_VARIANT::forward, FASTRNN_VARIANT::backward};

}  // namespace fastrnn
