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

// The best of several: run() returns the number of operations.
template <class Run>
double best_rate(const Run& run) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int i = 0; i < kBursts; ++i) {
    const Clock::time_point begin = Clock::now();
    const int64_t operations = run();
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    best = std::max(best, static_cast<double>(operations) / seconds.count());
  }
  return best;
}

}  // namespace

double multiply_add_rate(int threads) {
  return best_rate([threads] {
    Burst burst{active_variant()};
    const auto work = [](void* context, int) {
      Burst& b = *static_cast<Burst*>(context);
      b.operations += b.variant.multiply_add(kRounds);
    };
    run_team(threads, work, &burst);
    return burst.operations.load();
  });
}

double tile_rate(int vectors, int64_t depth, bool transposed) {
  const int64_t rounds = std::max<int64_t>(1, kRounds / depth);
  return best_rate([&] { return active_variant().run_tile(vectors, depth, transposed, rounds); });
}

}  // namespace fastrnn
