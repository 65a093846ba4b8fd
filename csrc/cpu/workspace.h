// Memory for the length of one call. Compiled once, without any instruction set beyond the
// baseline; what is inline here is inlined by force, so that the linker can never pick a copy built
// for a newer CPU.
#pragma once

#include <cstddef>

namespace fastrnn {

// Hands out uninitialised arrays and frees them all at the end. The calling thread keeps one block
// for its next call, so that its pages stay mapped; a call that needs more than kKeptBytes keeps
// nothing more.
class Workspace {
 public:
  static constexpr size_t kKeptBytes = size_t{64} << 20;

  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // `count` elements, aligned to a cache line.
  template <class T>
  [[gnu::always_inline]] T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

 private:
  struct Overflow;
  void* take_bytes(size_t bytes);

  size_t used_ = 0;
  bool owns_kept_ = false;  // false in a call within a call
  Overflow* overflow_ = nullptr;
};

// Asks the system for large pages under a big buffer that is about to be written for the first
// time: the page faults of a fresh buffer take as long as a tenth of a large layer's training step,
// and most of a single step's. Does nothing for null.
void prefer_large_pages(void* memory, size_t bytes);

}  // namespace fastrnn
