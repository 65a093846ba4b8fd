// One compiled variant of the CPU kernels, as the rest of the library sees it.
#pragma once

#include "scan.h"
#include "schedule.h"

namespace fastrnn {

struct CpuVariant {
  const char* name;
  const char* flags;  // with which it was compiled, see CMakeLists.txt
  void (*forward)(const ForwardArgs& args, int threads);
  // Layers on top of each other that differ in their input alone, from the lowest on.
  StackPlan (*plan_stack)(const ForwardArgs& layer, int count, int threads);
  void (*forward_stack)(const ForwardArgs* layers, int count, const StackPlan& plan, int threads);
  // Packs the weights of a scan of no steps, unless `to` is null; returns the number of bytes.
  int64_t (*pack)(const ForwardArgs& args, void* to);
  void (*backward)(const BackwardArgs& args, int threads);
  void (*backward_stack)(const BackwardArgs* layers, int count, int threads);
  int64_t (*multiply_add)(int64_t rounds);  // see multiply_add.h
  int64_t (*run_tile)(int vectors, int64_t depth, bool transposed, int64_t rounds);  // tile_rate.h
  const CpuVariant* others;  // runs all dtypes but bfloat16; null: this one does
};

// Best first; those that this CPU cannot run are left out.
const CpuVariant* const* runnable_variants(int* count);

// The variant in use: the best, or the one that FASTRNN_CPU names. Throws std::runtime_error if
// that one is unknown or cannot run here.
const CpuVariant& active_variant();

// The one that runs scans of a dtype.
const CpuVariant& active_variant(DType dtype);

}  // namespace fastrnn
