#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "variant.h"

namespace fastrnn {

extern const CpuVariant variant_baseline;
#if defined(FASTRNN_X86)
extern const CpuVariant variant_avx2, variant_avx512, variant_avx512bf16;
#endif

namespace {

std::vector<const CpuVariant*> find_runnable() {
  std::vector<const CpuVariant*> found;
#if defined(FASTRNN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&variant_avx512bf16);
    found.push_back(&variant_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back(&variant_avx2);
#endif
  found.push_back(&variant_baseline);
  return found;
}

const std::vector<const CpuVariant*>& runnable() {
  static const std::vector<const CpuVariant*> variants = find_runnable();
  return variants;
}

const CpuVariant& choose() {
  const char* wanted = std::getenv("FASTRNN_CPU");
  if (wanted == nullptr || *wanted == '\0') return *runnable().front();
  std::string names;
  for (const CpuVariant* v : runnable()) {
    if (std::strcmp(v->name, wanted) == 0) return *v;
    names += std::string(names.empty() ? "" : ", ") + v->name;
  }
  throw std::runtime_error("FASTRNN_CPU: expected one of " + names + " on this CPU, got '" +
                           wanted + "'");
}

}  // namespace

const CpuVariant* const* runnable_variants(int* count) {
  *count = static_cast<int>(runnable().size());
  return runnable().data();
}

const CpuVariant& active_variant() {
  static const CpuVariant& active = choose();
  return active;
}

}  // namespace fastrnn
