// csrc/cuda/intrinsics.h for a CPU: a launch runs every thread of the kernel as a fiber, so that
// the kernels' own source is executed, barriers, shuffles, tensor cores and all, where there is no
// GPU.
//
// Threads run one after another, each until it must wait. FASTRNN_HARNESS_SEED=n in the environment
// runs them in another order; a missing barrier then shows as another result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// What the macros of intrinsics.h are on a CPU.
#define FASTRNN_DEVICE inline
#define FASTRNN_KERNEL(threads) void
#define FASTRNN_ARGUMENT const

// The 16-bit types and their conversions, as the CPU kernels have them.
#define FASTRNN_VARIANT harness
#include "../../../csrc/cpu/element.h"
#undef FASTRNN_VARIANT

namespace fastrnn::cuda {

using harness::BFloat16;
using harness::Float16;

template <class E>
harness::Compute<E> widen(E value) {
  harness::Compute<E> widened;
  harness::convert(value, widened);
  return widened;
}

struct alignas(16) Vector16 {
  uint32_t x, y, z, w;
};

struct Index3 {
  int x, y, z;
};

constexpr bool kHasTensorCores = true;
constexpr bool kHasNarrowFma = true;

// A barrier of `size` threads.
struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
  int64_t arrive();
  void wait(int64_t generation_of_arrival) const;
};

struct Thread;
// The thread that runs.
extern Thread* self;
int thread_index();
Index3 block_index();
Index3 grid_size();
char* dynamic_shared();
void sync_block();
void release(int64_t* flag, int64_t value);
void wait_for(const int64_t* flag, int64_t value);
void arrive_cluster(bool releases);
void wait_cluster();
// Where `own`, in this block's shared memory, lies in that of another block of the cluster.
void* shared_of(void* own, int rank);

// An mbarrier, which fits its 8 bytes. Bytes that were sent arrive some time later, and not in the
// order in which they were sent.
void begin_mbarrier(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, int bytes);
void wait_for_bytes(const uint64_t* barrier, int parity);
void send_bytes(void* own, int rank, const void* value, int bytes, const uint64_t* barrier);
template <class Word>
void send(Word* own, int rank, Word value, const uint64_t* barrier) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8);
  send_bytes(own, rank, &value, sizeof(Word), barrier);
}
uint32_t swap_with_neighbour(uint32_t value);

// Every lane of a warp gives `bytes`; returns what each gave, one in every 64 bytes.
const char* exchange_in_warp(const void* own, int bytes);

template <class T>
T shuffle_xor(T value, int mask) {
  const char* all = exchange_in_warp(&value, sizeof(T));
  std::memcpy(&value, all + 64 * (thread_index() % 32 ^ mask), sizeof(T));
  return value;
}

inline Vector16 load(const void* p) { return *static_cast<const Vector16*>(p); }
inline void store(void* p, Vector16 v) { *static_cast<Vector16*>(p) = v; }
inline Vector16 load_if(bool condition, const void* p) {
  return condition ? load(p) : Vector16{0, 0, 0, 0};
}
inline Vector16 load_shared_if(bool condition, const void* p) { return load_if(condition, p); }
inline Vector16 load_shared_cache_if(bool condition, const void* p) {
  return load_if(condition, p);
}

// The copy is made when it is waited for; until then the place has NaN.
void begin_copy(char* to, const char* from);
void wait_for_copies();

template <class S>
void store_in_cluster(S* own, int rank, S value) {
  *static_cast<S*>(shared_of(own, rank)) = value;
}

template <class S>
void pin(S&) {}

inline void narrow(float v, float& to) { to = v; }
inline void narrow(double v, double& to) { to = v; }
template <class S>
void narrow(float v, S& to) {
  to.bits = static_cast<uint16_t>(harness::narrow_bits<float, uint32_t>(S{}, v));
}

inline float exp_(float x) { return std::exp(x); }
inline double exp_(double x) { return std::exp(x); }
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1 / x; }
inline float tanh_(float x) { return std::tanh(x); }
inline double tanh_(double x) { return std::tanh(x); }

// As PTX has it: the 10 highest bits of the mantissa, nearest, ties away from zero.
inline float round_to_tf32(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(v));
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
  bits &= ~uint32_t{0x1fff};
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// Element (row, k) of a [16 x K] and (k, column) of b [K x 8] in the fragments that PTX documents.
template <class S>
void mma(S, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int in_register = 4 / sizeof(S), depth = 8 * in_register;
  struct {
    uint32_t a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  const char* all = exchange_in_warp(&own, sizeof(own));
  const auto element = [&](int group, int k, int high_row, bool of_a) {
    const int half = k / (depth / 2), within = k % (depth / 2);
    const int lane = 4 * group + within / in_register;
    const int index = of_a ? 2 * half + high_row : 4 + half;
    S value;
    std::memcpy(&value, all + 64 * lane + 4 * index + within % in_register * sizeof(S), sizeof(S));
    if constexpr (sizeof(S) == 4) {  // the hardware reads no more
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= ~uint32_t{0x1fff};
      std::memcpy(&value, &bits, 4);
    }
    return widen(value);
  };
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < depth; ++k) {
      sum += element(lane / 4, k, i / 2, true) * element(lane % 4 * 2 + i % 2, k, 0, false);
    }
    d[i] += sum;
  }
}

struct Launch {
  Index3 grid;
  int threads;
  int64_t shared;
  int cluster;
  bool cooperative;
  void* stream;
};

void run(const Launch& how, const std::function<void()>& thread);

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  run(how, [&] { kernel(args); });
}

}  // namespace fastrnn::cuda
