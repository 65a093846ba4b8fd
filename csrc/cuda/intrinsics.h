// Everything that the kernels ask of the hardware. tests/cuda/harness has the same names for a CPU,
// so that the kernels run where there is no GPU.
#pragma once

#ifndef __CUDACC__
#include "harness.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define FASTRNN_DEVICE __device__ __forceinline__
#define FASTRNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTRNN_ARGUMENT const __grid_constant__

namespace fastrnn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct alignas(16) Vector16 {
  uint32_t x, y, z, w;
};

struct Index3 {
  int x, y, z;
};

// Whether code for tensor cores, or else code that takes their place, is compiled for this
// architecture.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif
// Whether kernels on elements of 16 bits without tensor cores are compiled.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasNarrowFma = false;
#else
constexpr bool kHasNarrowFma = true;
#endif

// Where a thread is.
FASTRNN_DEVICE int thread_index() { return threadIdx.x; }
FASTRNN_DEVICE Index3 block_index() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
FASTRNN_DEVICE Index3 grid_size() {
  return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)};
}

FASTRNN_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FASTRNN_DEVICE void sync_block() { __syncthreads(); }
template <class T>
FASTRNN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}

// What the other one of two neighbouring lanes gives, which the rest of the warp need not call.
FASTRNN_DEVICE uint32_t swap_with_neighbour(uint32_t value) {
  return __shfl_xor_sync(3u << (thread_index() & 30), value, 1);
}

FASTRNN_DEVICE Vector16 load(const void* p) { return *static_cast<const Vector16*>(p); }
FASTRNN_DEVICE void store(void* p, Vector16 v) { *static_cast<Vector16*>(p) = v; }

// 16 bytes, or zeros. Predicated loads, where the compiler would branch: of global memory, of the
// block's shared memory, and of the cache that all blocks share, as another block may just have
// written there.
#define FASTRNN_LOAD_IF(name, instruction, letter, address)                      \
  FASTRNN_DEVICE Vector16 name(bool condition, const void* p) {                  \
    Vector16 v{0, 0, 0, 0};                                                      \
    asm volatile("{.reg .pred is;\n\tsetp.ne.b32 is, %4, 0;\n\t@is " instruction \
                 " {%0,%1,%2,%3}, [%5];}"                                        \
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)                    \
                 : "r"(static_cast<int>(condition)), letter(address)             \
                 : "memory");                                                    \
    return v;                                                                    \
  }
FASTRNN_LOAD_IF(load_if, "ld.global.v4.u32", "l", __cvta_generic_to_global(p))
FASTRNN_LOAD_IF(load_shared_cache_if, "ld.global.cg.v4.u32", "l", __cvta_generic_to_global(p))
FASTRNN_LOAD_IF(load_shared_if, "ld.shared.v4.u32", "r",
                static_cast<uint32_t>(__cvta_generic_to_shared(p)))
#undef FASTRNN_LOAD_IF

// A copy of 16 bytes from global to the block's shared memory, which goes on beside what follows;
// the thread that began it may read them after wait_for_copies.
FASTRNN_DEVICE void begin_copy(char* to, const char* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from))
               : "memory");
#else
  store(to, load(from));
#endif
}
FASTRNN_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A flag between blocks: what was written before its release is seen after a wait for it.
FASTRNN_DEVICE void release(int64_t* flag, int64_t value) {
  asm volatile("st.release.gpu.global.s64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(flag)), "l"(value)
               : "memory");
}
FASTRNN_DEVICE void wait_for(const int64_t* flag, int64_t value) {
  int64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.s64 %0, [%1];"
                 : "=l"(seen)
                 : "l"(__cvta_generic_to_global(flag))
                 : "memory");
  } while (seen < value);
}

// A cluster's barrier in two halves, and stores to the shared memory of its blocks.
// `releases`: what this thread, and those it has waited for, wrote is seen after the wait.
FASTRNN_DEVICE void arrive_cluster([[maybe_unused]] bool releases) {
#if __CUDA_ARCH__ >= 900
  if (releases) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
#endif
}
FASTRNN_DEVICE void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  __syncwarp();  // unlike __syncthreads, the barrier does not make a warp converge
#endif
}
template <class S>
FASTRNN_DEVICE void store_in_cluster([[maybe_unused]] S* own, [[maybe_unused]] int rank,
                                     [[maybe_unused]] S value) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  *reinterpret_cast<S*>(there) = value;
#endif
}

// An mbarrier in the block's shared memory, for one phase after the other: a phase is over when as
// many bytes have come as were announced for it. Begun by one thread, before the cluster's barrier.
FASTRNN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
FASTRNN_DEVICE void begin_mbarrier([[maybe_unused]] uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
          shared_address(barrier))
      : "memory");
#endif
}
FASTRNN_DEVICE void expect_bytes([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Until the phase of this parity is over, the first one having 0. What was sent is seen then.
FASTRNN_DEVICE void wait_for_bytes([[maybe_unused]] const uint64_t* barrier,
                                   [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t is_over;
  do {
    asm volatile(
        "{.reg .pred is_over;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 is_over, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, is_over;}"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (is_over == 0);
  __syncwarp();
#endif
}
// A store to the shared memory of a block of the cluster, whose mbarrier counts its bytes. `own`
// and `barrier`: the same places in this block's.
template <class Word>
FASTRNN_DEVICE void send([[maybe_unused]] Word* own, [[maybe_unused]] int rank,
                         [[maybe_unused]] Word value, [[maybe_unused]] const uint64_t* barrier) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8);
#if __CUDA_ARCH__ >= 900
  uint32_t there, counts;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counts)
      : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (sizeof(Word) == 4) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
        "r"(bits), "r"(counts)
        : "memory");
  } else {
    uint64_t bits;
    __builtin_memcpy(&bits, &value, 8);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(there),
        "l"(bits), "r"(counts)
        : "memory");
  }
#endif
}

// The value is used here: the compiler moves nothing that needs it to a place before.
FASTRNN_DEVICE void pin(float& v) { asm volatile("" : "+f"(v)); }
FASTRNN_DEVICE void pin(double& v) { asm volatile("" : "+d"(v)); }
FASTRNN_DEVICE void pin(BFloat16& v) { asm volatile("" : "+h"(v.bits)); }
FASTRNN_DEVICE void pin(Float16& v) { asm volatile("" : "+h"(v.bits)); }

FASTRNN_DEVICE float widen(float v) { return v; }
FASTRNN_DEVICE double widen(double v) { return v; }
FASTRNN_DEVICE float widen(BFloat16 v) { return __uint_as_float(uint32_t{v.bits} << 16); }
FASTRNN_DEVICE float widen(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
FASTRNN_DEVICE void narrow(float v, float& to) { to = v; }
FASTRNN_DEVICE void narrow(double v, double& to) { to = v; }
FASTRNN_DEVICE void narrow(float v, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
FASTRNN_DEVICE void narrow(float v, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(v)); }

FASTRNN_DEVICE float exp_(float x) { return expf(x); }
FASTRNN_DEVICE double exp_(double x) { return exp(x); }
// 2^x within 2 ulp and 1 / x within 1; the smallest numbers are zero to both.
FASTRNN_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTRNN_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTRNN_DEVICE float tanh_(float x) { return tanhf(x); }
FASTRNN_DEVICE double tanh_(double x) { return ::tanh(x); }

// d += a * b on tensor cores. The fragments are PTX's: m16n8k16 of 16-bit elements, two in a
// register, and m16n8k8 of float32 rounded to tf32.
FASTRNN_DEVICE void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
FASTRNN_DEVICE void mma(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
FASTRNN_DEVICE void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
FASTRNN_DEVICE float round_to_tf32(float v) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#else
  return v;
#endif
}

struct Launch {
  Index3 grid;
  int threads;
  int64_t shared;    // bytes
  int cluster;       // blocks along x
  bool cooperative;  // all blocks run at once
  void* stream;
};

// Throws std::runtime_error.
void check(cudaError_t error, const char* what);
// That a kernel is launched on the current device with so much shared memory and such clusters.
void allow(const void* function, int64_t shared, int cluster);

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow(function, how.shared, how.cluster);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid.x, how.grid.y, how.grid.z);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = how.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernelExC(&config, function, arguments), "launch");
}

}  // namespace fastrnn::cuda

#endif
