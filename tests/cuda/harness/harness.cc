// The fibers behind harness.h.
#include "harness.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../../../csrc/cuda/device.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastrnn::cuda {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

// A stack of execution: switch_to leaves one and goes on in another.
struct Fiber {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;  // the scheduler's own is not ours
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

#if defined(__x86_64__)
extern "C" void fastrnn_harness_switch(void** from, void* to);
asm(R"(
.text
.globl fastrnn_harness_switch
.type fastrnn_harness_switch, @function
fastrnn_harness_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastrnn_harness_switch, .-fastrnn_harness_switch
)");
#endif

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(__x86_64__)
  fastrnn_harness_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

struct Warp {
  Barrier barrier{32};
  alignas(64) char given[2][32 * 64];
  struct Pair {
    Barrier barrier{2};
    uint32_t given[2][2];
  } pairs[16];
};

struct Block {
  Index3 index;
  Barrier barrier;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<Warp> warps;
  int running = 0;  // threads
  bool stalls = false;
  Barrier* cluster;
  Block* first_of_cluster;
};

// In an mbarrier's place.
struct Count {
  int32_t missing;  // bytes; below 0 if some came before they were announced
  uint16_t phase;
  uint8_t begun;  // kBegun, which no other memory is likely to have there
  bool is_announced;
  static constexpr uint8_t kBegun = 0x5a;
};
static_assert(sizeof(Count) == sizeof(uint64_t));

// On its way from block to block.
struct Sent {
  Block* to;
  char *place, *count;
  char bytes[8];
  int size;
};

Fiber scheduler;
std::vector<Sent> sent;
int64_t progress;  // of any kind since the launch
Launch current;
const std::function<void()>* body;

}  // namespace

struct Thread {
  Fiber fiber;
  int index = 0;
  Block* block = nullptr;
  int64_t collectives = 0, swaps = 0, cluster_generation = 0;
  const Barrier* barrier = nullptr;  // that it waits at,
  int64_t generation = 0;            // as which it arrived there
  bool done = false;
  std::vector<std::pair<char*, const char*>> copies;  // that have begun
};

Thread* self;

namespace {

void yield() {
  Thread* own = self;
  switch_to(own->fiber, scheduler);
}

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "harness: %s\n", why);
  std::abort();
}

void main_of_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  scheduler.stack = const_cast<void*>(bottom);
  scheduler.stack_size = size;
#endif
  (*body)();
  if (!self->copies.empty()) {
    die("a thread ends before what it copies");
  }
  self->done = true;
  // The memory of a block ends with it, whoever in its cluster still writes there.
  if (--self->block->running == 0) self->block->shared.reset();
  ++progress;
  switch_to(self->fiber, scheduler, true);
}

// Stacks are kept for the next launch.
std::vector<void*> free_stacks;

void prepare(Fiber& fiber) {
  if (free_stacks.empty()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    free_stacks.push_back(memory);
  }
  fiber.stack = free_stacks.back();
  fiber.stack_size = kStack;
  free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);  // frames that never returned
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack);
  *--top = nullptr;  // as if main_of_fiber had been called
  *--top = reinterpret_cast<void*>(&main_of_fiber);
  fiber.sp = top - 6;
  std::fill(top - 6, top, nullptr);
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, main_of_fiber, 0);
#endif
}

template <class Change>
void change(char* at, Change&& change) {
  Count count;
  std::memcpy(&count, at, sizeof(count));
  if (count.begun != Count::kBegun) die("an mbarrier is used before its beginning");
  change(count);
  if (count.is_announced && count.missing < 0) die("more bytes come than were announced");
  if (count.is_announced && count.missing == 0) {
    ++count.phase;
    count.is_announced = false;
  }
  std::memcpy(at, &count, sizeof(count));
  ++progress;
}

// The latest first, some of them later still.
void deliver(std::mt19937* random) {
  std::vector<Sent> all, later;
  all.swap(sent);
  for (auto s = all.rbegin(); s != all.rend(); ++s) {
    if (s->to->shared == nullptr) die("bytes come to a block that has ended");
    if (random != nullptr && (*random)() % 4 == 0) {
      later.push_back(*s);
      continue;
    }
    std::memcpy(s->place, s->bytes, s->size);
    change(s->count, [&](Count& count) { count.missing -= s->size; });
  }
  sent.insert(sent.begin(), later.begin(), later.end());
}

// Blocks [begin, end) of the grid, all at once.
void run_blocks(int64_t begin, int64_t end, std::mt19937* random) {
  std::vector<Block> blocks(end - begin);
  std::vector<Barrier> clusters((blocks.size() + current.cluster - 1) / current.cluster);
  std::vector<Thread> threads(blocks.size() * current.threads);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t index = begin + static_cast<int64_t>(b);
    Block& block = blocks[b];
    block.index = {static_cast<int>(index % current.grid.x),
                   static_cast<int>(index / current.grid.x % current.grid.y),
                   static_cast<int>(index / current.grid.x / current.grid.y)};
    block.barrier.size = current.threads;
    // Of its own, so that a sanitizer sees its ends.
    block.shared.reset(
        static_cast<char*>(std::aligned_alloc(128, (current.shared + 127) / 128 * 128)));
    std::memset(block.shared.get(), 0xff, current.shared);  // NaN in every type
    block.warps.resize(current.threads / 32);
    block.running = current.threads;
    block.cluster = &clusters[b / current.cluster];
    block.cluster->size = current.cluster * current.threads;
    block.first_of_cluster = &blocks[b / current.cluster * current.cluster];
    for (int t = 0; t < current.threads; ++t) {
      Thread& thread = threads[b * current.threads + t];
      thread.index = t;
      thread.block = &block;
      prepare(thread.fiber);
    }
  }
  std::vector<Thread*> order(threads.size());
  std::transform(threads.begin(), threads.end(), order.begin(), [](Thread& t) { return &t; });
  int idle_rounds = 0;
  while (!order.empty() && idle_rounds < 100) {
    if (random != nullptr) {
      std::shuffle(order.begin(), order.end(), *random);
      for (Block& block : blocks) block.stalls = (*random)() % 2 == 0;  // others run ahead
    }
    const int64_t before = progress;
    deliver(random);
    for (Thread* thread : order) {
      if (thread->block->stalls) continue;
      const Barrier* barrier = thread->barrier;
      if (barrier != nullptr && barrier->generation == thread->generation) continue;
      self = thread;
      switch_to(scheduler, thread->fiber);
    }
    std::erase_if(order, [](Thread* thread) { return thread->done; });
    idle_rounds = progress == before ? idle_rounds + 1 : 0;
  }
  const bool stuck = !order.empty();
  if (!stuck && !sent.empty()) die("bytes come to a block that has ended");
  sent.clear();
  self = nullptr;
  for (Thread& thread : threads) free_stacks.push_back(thread.fiber.stack);
  if (stuck) throw std::runtime_error("harness: every thread waits for another");
}

}  // namespace

int64_t Barrier::arrive() {
  ++progress;
  const int64_t now = generation;
  if (++arrived == size) {
    arrived = 0;
    ++generation;
  }
  return now;
}

void Barrier::wait(int64_t generation_of_arrival) const {
  if (generation != generation_of_arrival) return;
  self->barrier = this;
  self->generation = generation_of_arrival;
  yield();
  self->barrier = nullptr;
}

int thread_index() { return self->index; }
Index3 block_index() { return self->block->index; }
Index3 grid_size() { return current.grid; }
char* dynamic_shared() { return self->block->shared.get(); }

void sync_block() {
  Barrier& barrier = self->block->barrier;
  barrier.wait(barrier.arrive());
}

void release(int64_t* flag, int64_t value) {
  ++progress;
  *flag = value;
}

void wait_for(const int64_t* flag, int64_t value) {
  while (*flag < value) yield();
}

void arrive_cluster(bool) { self->cluster_generation = self->block->cluster->arrive(); }
void wait_cluster() { self->block->cluster->wait(self->cluster_generation); }

void* shared_of(void* own, int rank) {
  char* there = self->block->first_of_cluster[rank].shared.get();
  if (there == nullptr) {
    die("a block writes to one of its cluster that has ended");
  }
  return there + (static_cast<char*>(own) - dynamic_shared());
}

void begin_mbarrier(uint64_t* barrier) {
  const Count count{0, 0, Count::kBegun, false};
  std::memcpy(barrier, &count, sizeof(count));
}

void expect_bytes(uint64_t* barrier, int bytes) {
  change(reinterpret_cast<char*>(barrier), [&](Count& count) {
    if (count.is_announced) die("bytes are announced twice");
    count.is_announced = true;
    count.missing += bytes;
  });
}

void wait_for_bytes(const uint64_t* barrier, int parity) {
  for (;; yield()) {
    Count count;
    std::memcpy(&count, barrier, sizeof(count));
    if (count.begun != Count::kBegun) die("an mbarrier is used before its beginning");
    if (count.phase % 2 != parity) return;
  }
}

void send_bytes(void* own, int rank, const void* value, int bytes, const uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(own) % bytes != 0) die("bytes are sent to an odd place");
  Sent one{&self->block->first_of_cluster[rank],
           static_cast<char*>(shared_of(own, rank)),
           static_cast<char*>(shared_of(const_cast<uint64_t*>(barrier), rank)),
           {},
           bytes};
  std::memcpy(one.bytes, value, bytes);
  sent.push_back(one);
  ++progress;
}

uint32_t swap_with_neighbour(uint32_t value) {
  const int lane = self->index % 32;
  Warp::Pair& pair = self->block->warps[self->index / 32].pairs[lane / 2];
  uint32_t* const given = pair.given[self->swaps++ % 2];
  given[lane % 2] = value;
  pair.barrier.wait(pair.barrier.arrive());
  return given[1 - lane % 2];
}

void begin_copy(char* to, const char* from) {
  std::memset(to, 0xff, 16);
  self->copies.emplace_back(to, from);
}

void wait_for_copies() {
  for (const auto& [to, from] : self->copies) std::memcpy(to, from, 16);
  self->copies.clear();
}

const char* exchange_in_warp(const void* own, int bytes) {
  const int index = self->index;
  Warp& warp = self->block->warps[index / 32];
  char* given = warp.given[self->collectives++ % 2];
  std::memcpy(given + 64 * (index % 32), own, bytes);
  warp.barrier.wait(warp.barrier.arrive());
  return given;
}

void run(const Launch& how, const std::function<void()>& thread) {
  if (how.threads % 32 != 0 || how.grid.x % how.cluster != 0) {
    throw std::runtime_error("harness: no such launch");
  }
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  current = how;
  body = &thread;
  const char* seed = std::getenv("FASTRNN_HARNESS_SEED");
  std::mt19937 random(seed == nullptr ? 0 : std::atoi(seed));
  const int64_t blocks = int64_t{how.grid.x} * how.grid.y * how.grid.z;
  const int64_t at_once = how.cooperative ? blocks : how.cluster;
  for (int64_t b = 0; b < blocks; b += at_once) {
    run_blocks(b, b + at_once, seed == nullptr ? nullptr : &random);
  }
}

}  // namespace fastrnn::cuda

// The device that the harness stands for: any plan goes.
namespace fastrnn::cuda {
DeviceInfo device_info(int device) {
  const int clusters = device < 90 ? 0 : 1 << 10;
  return {1 << 20, int64_t{1} << 30, device, {clusters, clusters, clusters, clusters}};
}
void set_device(int) {}
int built_for() { return 0; }
}  // namespace fastrnn::cuda
