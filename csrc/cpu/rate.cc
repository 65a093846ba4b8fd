#include "rate.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "team.h"
#include "variant.h"

namespace fastrnn {

namespace {

constexpr int kBursts = 20;
constexpr int64_t kRounds = 1 << 20;  // two milliseconds: a team begins and ends in microseconds

struct Burst {
  const CpuVariant& variant;
  std::atomic<int64_t> operations{0};
};

}  // namespace

double multiply_add_rate(int threads) {
  using Clock = std::chrono::steady_clock;
  int variants;
  const CpuVariant& variant = **runnable_variants(&variants);
  double best = 0;
  for (int i = 0; i < kBursts; ++i) {
    Burst burst{variant};
    const auto work = [](void* context, int) {
      Burst& b = *static_cast<Burst*>(context);
      b.operations += b.variant.multiply_add(kRounds);
    };
    const Clock::time_point begin = Clock::now();
    run_team(threads, work, &burst);
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    best = std::max(best, static_cast<double>(burst.operations) / seconds.count());
  }
  return best;
}

}  // namespace fastrnn
