// Compiled once per instruction set; see CMakeLists.txt for the flags.
#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "multiply_add.h"
#include "tile_rate.h"
#include "variant.h"

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)
#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)

namespace fastrnn {

// A variant that differs from another one in the products of bfloat16 alone has no other kernels;
// it calls that one's.
#if defined(FASTRNN_BFLOAT16_OF)
extern const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_BFLOAT16_OF);
#endif

namespace FASTRNN_VARIANT {
namespace {

#if defined(FASTRNN_BFLOAT16_OF)
const CpuVariant* other(DType dtype) {
  return dtype == DType::kBFloat16 ? nullptr : &FASTRNN_JOIN(variant_, FASTRNN_BFLOAT16_OF);
}
#else
const CpuVariant* other(DType) { return nullptr; }
#endif

// Calls f(cell, element) with objects of the cell's and of the element's type.
template <class F>
void visit(int cell, DType dtype, F&& f) {
  Cells::visit(cell, [&](auto c) {
    switch (dtype) {
      case DType::kBFloat16:
        return f(c, BFloat16{});
#if defined(FASTRNN_BFLOAT16_OF)
      default:
        return;
#else
      case DType::kFloat32:
        return f(c, float{});
      case DType::kFloat64:
        return f(c, double{});
      case DType::kFloat16:
        return f(c, Float16{});
#endif
    }
  });
}

void forward(const ForwardArgs& args, int threads) {
  if (const CpuVariant* variant = other(args.dtype)) return variant->forward(args, threads);
  visit(args.cell, args.dtype, [&](auto cell, auto element) {
    forward_dev_impl<Cpu, decltype(cell), decltype(element)>({threads}, args);
  });
}

int64_t pack(const ForwardArgs& args, void* to) {
  if (const CpuVariant* variant = other(args.dtype)) return variant->pack(args, to);
  int64_t bytes = 0;
  visit(args.cell, args.dtype, [&](auto cell, auto element) {
    bytes = pack_layer<decltype(cell), decltype(element)>(args, to);
  });
  return bytes;
}

void backward(const BackwardArgs& args, int threads) {
  if (const CpuVariant* variant = other(args.dtype)) return variant->backward(args, threads);
  visit(args.cell, args.dtype, [&](auto cell, auto element) {
    backward_dev_impl<Cpu, decltype(cell), decltype(element)>({threads}, args);
  });
}

}  // namespace
}  // namespace FASTRNN_VARIANT

extern const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT);
const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT){
    FASTRNN_STRING(FASTRNN_VARIANT), FASTRNN_FLAGS,
    FASTRNN_VARIANT::forward,        FASTRNN_VARIANT::pack,
    FASTRNN_VARIANT::backward,       FASTRNN_VARIANT::multiply_add,
    FASTRNN_VARIANT::run_tile};

}  // namespace fastrnn
