#include "team.h"

#if defined(__clang__) && defined(__linux__)
// What clang makes of OpenMP's pragmas needs its own runtime. torch's on Linux is gcc's, whose
// functions are therefore called by name.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_procs();
int omp_get_thread_num();
}
#else
#include <omp.h>
#endif
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn {

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;     // 40 to 100 us
constexpr int kPatience = 1000;  // spins
constexpr int64_t kFirstSleep = 200'000, kLongestSleep = 10'000'000;

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Those of <pthread.h> are in another library on older Linux systems, see csrc/portable.cc.
void set_signal_mask(int how, const sigset_t* set, sigset_t* before) {
#if defined(__linux__)
  sigprocmask(how, set, before);  // of this thread alone
#else
  pthread_sigmask(how, set, before);
#endif
}

void name_thread([[maybe_unused]] const char* name) {
#if defined(__linux__)
  prctl(PR_SET_NAME, name);
#endif
}

// What this thread has slept: time in which nobody took its core.
thread_local int64_t slept = 0;

using Word = std::atomic<uint32_t>;

// Sleeps until somebody wakes those who wait for `word` to change from `value`, or for so long; 0:
// without end.
void sleep_on(Word& word, uint32_t value, int64_t limit) {
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
#if defined(__linux__)
  const timespec timeout{limit / 1000000000, limit % 1000000000};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, limit == 0 ? nullptr : &timeout, nullptr, 0);
#else
  (void)limit;
  word.wait(value);
#endif
  slept += nanoseconds(CLOCK_MONOTONIC) - begin;
}

void wake(Word& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

// Waits for is_over(value of word): some microseconds awake, for this is what it takes among
// threads that run, then asleep, at first for `limit` at once (0: without end). For a core that
// falls idle gets a thread that waits for another core, but only one that has not run for half a
// millisecond (the kernel's idea of what is still in a cache), so one has to fall asleep again.
template <class IsOver>
void wait_until(Word& word, std::atomic<int>& sleepers, IsOver is_over, int64_t limit) {
  for (int i = 0; i < kSpins; ++i) {
    if (is_over(word.load(std::memory_order_acquire))) return;
    pause();
  }
  for (;; limit = std::min(2 * limit, kLongestSleep)) {
    // Either this thread is seen by the one that changes the word, or it sees the change: both
    // sides write one and then read the other in a single order.
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t value = word.load(std::memory_order_seq_cst);
    const bool is_over_now = is_over(value);
    if (!is_over_now) sleep_on(word, value, limit);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    if (is_over_now || is_over(word.load(std::memory_order_acquire))) return;
  }
}

// Time in which a thread of a team was wanted and did not run, in ns.
class Absence {
 public:
  explicit Absence(int64_t wanted_since) : wanted_since_(wanted_since) {}
  // Most of it, and more than waking a sleeping thread may take.
  bool was_long() const {
    const int64_t wall = nanoseconds(CLOCK_MONOTONIC) - wanted_since_;
    const int64_t absent = wall - (nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu_) - (slept - slept_);
    return absent > std::max(kLeast, wall / 3);
  }

 private:
  static constexpr int64_t kLeast = 300'000;
  const int64_t wanted_since_;
  const int64_t cpu_ = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
  const int64_t slept_ = slept;
};

// An OpenMP region begins and ends with all its threads, so it waits for one whose core another
// process holds. Where that has happened, helpers take the place of the pool's threads for a while:
// threads of our own, which nobody waits for while they do nothing. They sleep when there is
// nothing to do, and would have to share cores with the pool's threads, which spin between regions:
// so they are for such times only.
class Helpers {
 public:
  // Runs work on the caller, and on as many helpers as come. Returns whether all came at once and
  // kept their cores. False in `ran`: somebody else has the helpers.
  bool run(int threads, void (*work)(void*, int), void* context, bool* ran) {
    *ran = !in_use_.exchange(true, std::memory_order_acquire);
    if (!*ran) return false;
    start(threads - 1);
    work_ = work;
    context_ = context;
    wanted_ = threads - 1;
    came_.store(0, std::memory_order_relaxed);
    posted_ = nanoseconds(CLOCK_MONOTONIC);
    job_.fetch_add(1, std::memory_order_seq_cst);  // odd: open
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake(job_);
    work(context, 0);
    // Whoever enters after this sees that the job is closed; whoever entered before is seen here.
    job_.fetch_add(1, std::memory_order_seq_cst);
    if (inside_.load(std::memory_order_seq_cst) > 0) {
      wait_until(inside_, waiting_, [](uint32_t inside) { return inside == 0; }, kFirstSleep);
    }
    const bool prompt = came_.load(std::memory_order_relaxed) == wanted_;
    in_use_.store(false, std::memory_order_release);
    return prompt;
  }

 private:
  void start(int count) {
    if (started_ >= count) return;
    sigset_t all, before;
    sigfillset(&all);  // signals are for the threads of the program
    set_signal_mask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < count; ++started_) {
        const int rank = started_ + 1;
        std::thread([this, rank] { serve(rank); }).detach();
      }
    } catch (const std::system_error&) {  // no more threads: those that there are will do
    }
    set_signal_mask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve(int rank) {
    name_thread("fastrnn");
    uint32_t seen = 0;
    for (;;) {
      const auto is_new = [seen](uint32_t job) { return job % 2 == 1 && job != seen; };
      wait_until(job_, sleepers_, is_new, 0);
      inside_.fetch_add(1, std::memory_order_seq_cst);
      seen = job_.load(std::memory_order_seq_cst);
      if (seen % 2 == 1 && rank <= wanted_) {
        const Absence absence(posted_);
        work_(context_, rank);
        if (!absence.was_long()) came_.fetch_add(1, std::memory_order_relaxed);
      }
      if (inside_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
          waiting_.load(std::memory_order_seq_cst) > 0) {
        wake(inside_);
      }
    }
  }

  std::atomic<bool> in_use_{false};
  int started_ = 0;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0;
  int64_t posted_ = 0;
  std::atomic<int> came_{0};
  alignas(64) Word job_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) Word inside_{0};
  std::atomic<int> waiting_{0};
};

// Whether other processes compete for the cores, as all threads that open regions have found.
class Contention {
 public:
  bool is_expected() const {
    return length_.load(std::memory_order_relaxed) > 0 &&
           nanoseconds(CLOCK_MONOTONIC) < until_.load(std::memory_order_relaxed);
  }
  void learn_from_region(bool was_held_up) {
    if (!was_held_up) {
      if (length_.load(std::memory_order_relaxed) > 0) length_.store(0, std::memory_order_relaxed);
      return;
    }
    const int64_t length = std::clamp(2 * length_.load(std::memory_order_relaxed), kShort, kLong);
    until_.store(nanoseconds(CLOCK_MONOTONIC) + length, std::memory_order_relaxed);
    length_.store(length, std::memory_order_relaxed);
    prompt_.store(0, std::memory_order_relaxed);
  }
  void learn_from_helpers(bool were_prompt) {
    if (!were_prompt) {
      prompt_.store(0, std::memory_order_relaxed);
    } else if (prompt_.fetch_add(1, std::memory_order_relaxed) + 1 == kPromptJobs) {
      until_.store(0, std::memory_order_relaxed);
    }
  }

 private:
  static constexpr int64_t kShort = 40'000'000, kLong = 640'000'000;
  static constexpr int kPromptJobs = 20;
  std::atomic<int64_t> until_{0}, length_{0};
  std::atomic<int> prompt_{0};
};

Contention contention;
// Never freed: helpers may still sleep in it when the process ends.
std::atomic<Helpers*> helpers{nullptr};

// The pool of threads does not come along in a fork, and a region that asks for it would hang.
// Neither do the helpers, but new ones can be had.
thread_local bool has_pool = false, lost_pool = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  lost_pool = has_pool;
  helpers.store(nullptr, std::memory_order_relaxed);
});

Helpers& get_helpers() {
  Helpers* all = helpers.load(std::memory_order_acquire);
  if (all == nullptr) {
    auto* own = new Helpers;
    if (helpers.compare_exchange_strong(all, own, std::memory_order_acq_rel)) return *own;
    delete own;
  }
  return *all;
}

}  // namespace

struct Phases::State {
  alignas(64) std::atomic<uint32_t> done;  // parts of all phases
  std::atomic<int> sleepers;
};

struct Phases::PartState {
  // The phase after the latest one in which somebody began this part.
  alignas(64) std::atomic<uint32_t> next_phase;
  // Parts of a group that are done in this phase, in the state of the group's first part.
  alignas(64) std::atomic<int> done;
};

size_t Phases::bytes(int parts) { return sizeof(State) + parts * sizeof(PartState); }

void Phases::set_memory(void* memory, int parts) {
  state_ = new (memory) State{0, 0};
  parts_ = reinterpret_cast<PartState*>(state_ + 1);
  for (int i = 0; i < parts; ++i) new (&parts_[i]) PartState{0, 0};
}

bool Phases::begin_part(int part, uint32_t phase) {
  std::atomic<uint32_t>& next = parts_[part].next_phase;
  uint32_t seen = next.load(std::memory_order_relaxed);
  // Nobody begins a part of a later phase before all parts of this one are done.
  return seen <= phase && next.compare_exchange_strong(seen, phase + 1, std::memory_order_relaxed);
}

int Phases::begin_own(const Member& member, int count) {
  const bool is_one = count == member.size;  // spares the divisions
  const int first = is_one ? member.rank : count * member.rank / member.size;
  const int last = is_one ? first + 1 : count * (member.rank + 1) / member.size;
  for (int part = first; part < last; ++part) {
    if (begin_part(part, member.phase)) return part;
  }
  return -1;
}

int Phases::begin_any(const Member& member, int count) {
  // Those that the others would begin last.
  for (int i = 1; i <= count; ++i) {
    const int part = (count * member.rank / member.size + count - i) % count;
    if (begin_part(part, member.phase)) return part;
  }
  return -1;
}

int Phases::next_part_of_last(const Member& member, int count) {
  const int own = begin_own(member, count);
  return own >= 0 ? own : begin_any(member, count);
}

int Phases::next_part(Member& member, int count) {
  const int own = begin_own(member, count);
  if (own >= 0) return own;
  const uint32_t end = member.done_before + count;
  const auto is_over = [end](uint32_t done) { return static_cast<int32_t>(done - end) >= 0; };
  const bool is_patient = member.is_patient && !member.took_over && !member.took_over_before;
  const auto wait_some = [&] {
    for (int i = is_patient ? kPatience : 0; i > 0; --i) {
      if (is_over(state_->done.load(std::memory_order_acquire))) return true;
      pause();
    }
    return is_over(state_->done.load(std::memory_order_acquire));
  };
  if (!wait_some()) {
    const int part = begin_any(member, count);
    if (part >= 0) {
      member.took_over = true;
      return part;
    }
    wait_until(state_->done, state_->sleepers, is_over, kFirstSleep);  // all have begun
  }
  member.took_over_before = member.took_over;
  member.took_over = false;
  member.done_before = end;
  ++member.phase;
  return -1;
}

void Phases::done(const Member& member, int part, int count) {
  int size = 1;
  if (count > kGroup) {
    const int first = part / kGroup * kGroup;
    size = std::min(kGroup, count - first);
    std::atomic<int>& in_group = parts_[first].done;
    if (in_group.fetch_add(1, std::memory_order_acq_rel) + 1 < size) return;
    in_group.store(0, std::memory_order_relaxed);  // the next phase begins after what follows
  }
  const uint32_t before = state_->done.fetch_add(size, std::memory_order_seq_cst);
  if (before + size == member.done_before + count &&
      state_->sleepers.load(std::memory_order_seq_cst) > 0) {
    wake(state_->done);
  }
}

void run_team(int threads, void (*work)(void*, int), void* context) {
  if (threads <= 1 || lost_pool) {
    work(context, 0);
    return;
  }
  if (contention.is_expected()) {
    bool ran;
    const bool prompt =
        get_helpers().run(std::min(threads, omp_get_num_procs()), work, context, &ran);
    if (!ran) work(context, 0);
    contention.learn_from_helpers(prompt);
    return;
  }
  has_pool = true;
  const int64_t begin = nanoseconds(CLOCK_MONOTONIC);
  std::atomic<bool> was_held_up{false};
  auto body = [&] {
    const Absence absence(begin);
    work(context, omp_get_thread_num());
    if (absence.was_long()) was_held_up.store(true, std::memory_order_relaxed);
  };
#if defined(__clang__) && defined(__linux__)
  GOMP_parallel([](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body,
                static_cast<unsigned>(threads), 0);
#else
#pragma omp parallel num_threads(threads)
  body();
#endif
  contention.learn_from_region(was_held_up.load(std::memory_order_relaxed));
}

}  // namespace fastrnn
