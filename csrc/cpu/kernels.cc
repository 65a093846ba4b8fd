// Compiled once per instruction set; see CMakeLists.txt for the flags.
#include <array>

#include "../cells/registry.h"
#include "backward_stack.h"
#include "compiled_cell.h"
#include "forward_stack.h"
#include "multiply_add.h"
#include "tile_rate.h"
#include "variant.h"

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)
#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)

namespace fastrnn {

namespace FASTRNN_VARIANT {
namespace {

// Those of the registry.
template <class S, class... Cell>
constexpr std::array<CellLoops<S>, sizeof...(Cell)> compiled_cells(CellList<Cell...>) {
  return {compiled_cell<Cell, S>()...};
}

template <class S>
const CellLoops<S>& loops_of(const LayerArgs& args) {
  static constexpr auto built_in = compiled_cells<S>(Cells{});
  if (args.loops != nullptr) return *static_cast<const CellLoops<S>*>(args.loops);
  return built_in[args.cell];
}

// Calls f with an object of the element's type.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
#if defined(FASTRNN_BFLOAT16_OF)
    default:  // another variant's: see the end
      return;
#else
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Float16{});
#endif
  }
}

void forward(const ForwardArgs& args, int threads) {
  visit(args.dtype,
        [&]<class S>(S) { forward_dev_impl<Cpu, S>({threads}, args, loops_of<S>(args)); });
}

StackPlan plan_stack(const ForwardArgs& layer, int count, int threads) {
  StackPlan plan;
  visit(layer.dtype, [&]<class S>(S) { plan = stack_plan<S>(layer, count, threads); });
  return plan;
}

void forward_stack(const ForwardArgs* layers, int count, const StackPlan& plan, int threads) {
  visit(layers->dtype, [&]<class S>(S) {
    forward_stack_dev_impl<Cpu, S>({threads}, layers, count, plan, loops_of<S>(*layers));
  });
}

int64_t pack(const ForwardArgs& args, void* to) {
  int64_t bytes = 0;
  visit(args.dtype, [&]<class S>(S) { bytes = pack_layer<S>(args, loops_of<S>(args), to); });
  return bytes;
}

void backward(const BackwardArgs& args, int threads) {
  visit(args.dtype,
        [&]<class S>(S) { backward_dev_impl<Cpu, S>({threads}, args, loops_of<S>(args)); });
}

void backward_stack(const BackwardArgs* layers, int count, int threads) {
  visit(layers->dtype, [&]<class S>(S) {
    backward_stack_dev_impl<Cpu, S>({threads}, layers, count, loops_of<S>(*layers));
  });
}

}  // namespace
}  // namespace FASTRNN_VARIANT

// A variant that differs from another one in the products of bfloat16 alone has no other kernels.
#if defined(FASTRNN_BFLOAT16_OF)
extern const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_BFLOAT16_OF);
#define FASTRNN_OTHERS &FASTRNN_JOIN(variant_, FASTRNN_BFLOAT16_OF)
#else
#define FASTRNN_OTHERS nullptr
#endif

extern const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT);
const CpuVariant FASTRNN_JOIN(variant_, FASTRNN_VARIANT){FASTRNN_STRING(FASTRNN_VARIANT),
                                                         FASTRNN_FLAGS,
                                                         FASTRNN_VARIANT::forward,
                                                         FASTRNN_VARIANT::plan_stack,
                                                         FASTRNN_VARIANT::forward_stack,
                                                         FASTRNN_VARIANT::pack,
                                                         FASTRNN_VARIANT::backward,
                                                         FASTRNN_VARIANT::backward_stack,
                                                         FASTRNN_VARIANT::multiply_add,
                                                         FASTRNN_VARIANT::run_tile,
                                                         FASTRNN_OTHERS};

}  // namespace fastrnn
