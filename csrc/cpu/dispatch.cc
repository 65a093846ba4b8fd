#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(FASTRNN_X86)
#include <cpuid.h>
#endif

#include "int8.h"
#include "variant.h"

#if defined(FASTRNN_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define FASTRNN_DECLARE_INT8(name)    \
  namespace fastrnn::int8_##name {    \
    extern const Int8Kernels kernels; \
  }
FASTRNN_DECLARE_INT8(baseline)
#if defined(FASTRNN_X86)
FASTRNN_DECLARE_INT8(avx2)
FASTRNN_DECLARE_INT8(avxvnni)
FASTRNN_DECLARE_INT8(avx512)
FASTRNN_DECLARE_INT8(avx512vnni)
#elif defined(FASTRNN_ARM64)
FASTRNN_DECLARE_INT8(dotprod)
#endif

namespace fastrnn {

extern const CpuVariant variant_baseline;
#if defined(FASTRNN_X86)
extern const CpuVariant variant_avx2, variant_avx512, variant_avx512bf16;
#endif

namespace {

#if defined(FASTRNN_X86)
// clang 14 does not know this one by name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::vector<const CpuVariant*> find_runnable() {
  std::vector<const CpuVariant*> found;
#if defined(FASTRNN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&variant_avx512bf16);
    found.push_back(&variant_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
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

#if defined(FASTRNN_X86)
// AVX's own form of VNNI, of which gcc 10 does not know: CPUID leaf 7.1, EAX bit 4.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

// FASTRNN_CPU names the variant whose instructions may be used. Without it all may.
const Int8Kernels& choose_int8() {
  const char* const wanted = std::getenv("FASTRNN_CPU");
  const bool is_free = wanted == nullptr || *wanted == '\0';
  const auto is_allowed = [&](const char* variant) {
    return std::strcmp(active_variant().name, variant) == 0;
  };
  static_cast<void>(is_allowed);
  static_cast<void>(is_free);
#if defined(FASTRNN_X86)
  if (is_allowed("avx512bf16") || is_allowed("avx512")) {
    const bool may_use_vnni = is_free || is_allowed("avx512bf16");
    if (may_use_vnni && __builtin_cpu_supports("avx512vnni")) return int8_avx512vnni::kernels;
    return int8_avx512::kernels;
  }
  if (is_allowed("avx2")) {
    return is_free && has_avxvnni() ? int8_avxvnni::kernels : int8_avx2::kernels;
  }
#elif defined(FASTRNN_ARM64)
#if defined(__linux__)
  const bool has_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  constexpr bool has_dotprod = true;  // every arm64 processor that runs macOS
#endif
  if (is_free && has_dotprod) return int8_dotprod::kernels;
#endif
  return int8_baseline::kernels;
}

}  // namespace

const Int8Kernels& active_int8_kernels() {
  static const Int8Kernels& active = choose_int8();
  return active;
}

const CpuVariant* const* runnable_variants(int* count) {
  *count = static_cast<int>(runnable().size());
  return runnable().data();
}

const CpuVariant& active_variant() {
  static const CpuVariant& active = choose();
  return active;
}

const CpuVariant& active_variant(DType dtype) {
  const CpuVariant& active = active_variant();
  return dtype == DType::kBFloat16 || active.others == nullptr ? active : *active.others;
}

}  // namespace fastrnn
