#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>

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

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// What this thread has slept in barriers: time in which nobody took its core.
thread_local int64_t slept = 0;

// Time in which a thread of a region was wanted and did not run, in ns.
class Absence {
 public:
  explicit Absence(int64_t wanted_since) : wanted_since_(wanted_since) {}
  int64_t until_now() const {
    const int64_t wall = nanoseconds(CLOCK_MONOTONIC) - wanted_since_;
    return wall - (nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu_) - (slept - slept_);
  }

 private:
  const int64_t wanted_since_;
  const int64_t cpu_ = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  const int64_t slept_ = slept;
};

// A region was held up if a thread was absent for most of it; less than kLeastAbsence is what
// waking a sleeping thread may take. Then the next regions do without, at first for kShortBreak, up
// to kLongBreak while every trial of all threads fails again.
constexpr int64_t kLeastAbsence = 300'000, kShortBreak = 5'000'000, kLongBreak = 320'000'000;

// Per thread that opens regions.
struct Break {
  int missing = 0;
  int64_t length = 0, until = 0;

  void learn(int absent) {
    if (absent == 0) {
      length = 0;
      return;
    }
    missing = absent;
    length = std::clamp(2 * length, kShortBreak, kLongBreak);
    until = nanoseconds(CLOCK_MONOTONIC) + length;
  }
};
thread_local Break current_break;

// The pool of threads does not come along in a fork, and a region that asks for it would hang.
thread_local bool has_pool = false, lost_pool = false;
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { lost_pool = has_pool; });

}  // namespace

int present_threads(int threads) {
  const Break& b = current_break;
  if (threads <= 1 || b.length == 0 || nanoseconds(CLOCK_MONOTONIC) >= b.until) return threads;
  return std::max(1, threads - b.missing);
}

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
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
  phase_.wait(phase, std::memory_order_acquire);
  slept += nanoseconds(CLOCK_MONOTONIC) - begin;
}

void run_parallel(int threads, void (*work)(void*, int, int), void* context) {
  if (threads <= 1 || lost_pool) {
    work(context, 0, 1);
    return;
  }
  has_pool = true;
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
  std::atomic<int> absent{0};
#pragma omp parallel num_threads(threads)
  {
    const Absence absence(begin);
    work(context, omp_get_thread_num(), omp_get_num_threads());
    const int64_t length = nanoseconds(CLOCK_MONOTONIC) - begin;
    if (absence.until_now() > std::max(kLeastAbsence, length / 3)) ++absent;
  }
  current_break.learn(absent);
}

}  // namespace fastrnn
