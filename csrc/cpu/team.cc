#include "team.h"

#include <omp.h>
#include <sched.h>

namespace fastrnn {

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 2000;  // about 20 us
constexpr int kYields = 50;

}  // namespace

void Barrier::wait(int size) {
  if (size == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    pause();
  }
  for (int i = 0; i < kYields; ++i) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    sched_yield();
  }
  phase_.wait(phase, std::memory_order_acquire);
}

void run_parallel(int threads, void (*work)(void*, int, int), void* context) {
  if (threads <= 1) {
    work(context, 0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  work(context, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace fastrnn
