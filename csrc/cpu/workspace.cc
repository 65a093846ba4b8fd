#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn {

namespace {

constexpr size_t kLine = 64;

size_t round_up(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

char* allocate(size_t bytes) {
  void* p = std::aligned_alloc(kLine, round_up(bytes));
  if (p == nullptr) throw std::bad_alloc();
  prefer_large_pages(p, bytes);
  return static_cast<char*>(p);
}

// The block that a thread keeps for its next call.
struct KeptBlock {
  char* memory = nullptr;
  size_t bytes = 0;
  bool in_use = false;
  ~KeptBlock() { std::free(memory); }
};
thread_local KeptBlock kept;

}  // namespace

// Memory that did not fit into the kept block follows this header, which takes one cache line.
struct Workspace::Overflow {
  Overflow* next;
};

Workspace::Workspace() : owns_kept_(!kept.in_use) { kept.in_use = true; }

void* Workspace::take_bytes(size_t bytes) {
  bytes = round_up(bytes);
  const size_t begin = used_;
  used_ += bytes;
  if (owns_kept_ && used_ <= kept.bytes) return kept.memory + begin;
  char* memory = allocate(kLine + bytes);
  overflow_ = new (memory) Overflow{overflow_};
  return memory + kLine;
}

Workspace::~Workspace() {
  while (overflow_ != nullptr) {
    Overflow* next = overflow_->next;
    std::free(overflow_);
    overflow_ = next;
  }
  if (!owns_kept_) return;
  if (used_ > kept.bytes && used_ <= kKeptBytes) {
    std::free(kept.memory);
    kept.memory = static_cast<char*>(std::aligned_alloc(kLine, used_));
    kept.bytes = kept.memory == nullptr ? 0 : used_;
  }
  kept.in_use = false;
}

void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kMinBytes = size_t{4} << 20;
  constexpr uintptr_t kPage = 4096;
  if (memory == nullptr || bytes < kMinBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failing is fine
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace fastrnn
