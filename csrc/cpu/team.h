// Threads: a parallel region on torch's OpenMP pool and a barrier inside it. Compiled once, without any
// instruction set beyond the baseline; what is inline here is inlined by force, so that no copy of it
// built for a newer CPU can be picked by the linker.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastrnn {

// Lets `size` threads meet, the same number at every meeting. A waiter spins for some microseconds, then gives its core away for some, then
// sleeps in the kernel: a thread whose core was taken by another process holds nobody's core.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Runs work(context, rank, size) on up to `threads` threads, of which the caller is rank 0; size is how
// many really came.
void run_parallel(int threads, void (*work)(void* context, int rank, int size), void* context);

// Memory for the length of one call, kept by the calling thread for the next one so that its pages stay
// mapped. Larger than kKeptBytes is given back at once.
class Workspace {
 public:
  static constexpr size_t kKeptBytes = size_t{64} << 20;
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` elements, aligned to a cache line.
  template <class T>
  [[gnu::always_inline]] T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += size_of<T>(count);
    return p;
  }

  template <class T>
  [[gnu::always_inline]] static size_t size_of(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
  bool owned_ = false;
};

}  // namespace fastrnn
