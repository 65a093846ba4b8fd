// Threads: a parallel region on torch's OpenMP pool and a barrier inside it. Compiled once, without
// any instruction set beyond the baseline.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastrnn {

// Lets `size` threads meet, the same number at every meeting. A waiter spins for some microseconds,
// then gives its core away for some, then sleeps in the kernel: a thread whose core was taken by
// another process holds nobody's core.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// How many of `threads` the next region should ask for: fewer, for a while, after a region that had
// to wait for a thread whose core another process held. The results do not depend on it.
int present_threads(int threads);

// Runs work(context, rank, size) on up to `threads` threads, of which the caller is rank 0; size is
// how many really came.
void run_parallel(int threads, void (*work)(void* context, int rank, int size), void* context);

}  // namespace fastrnn
