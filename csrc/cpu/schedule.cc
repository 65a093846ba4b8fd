#include "schedule.h"

#include <unistd.h>

#include <algorithm>
#include <bit>

namespace fastrnn {

namespace {

constexpr double kBarrierCycles = 1500;  // of two threads; half of it more for each doubling
// What a parallel region has to save, some 10 us: starting one costs less, but a core that another
// process holds may cost milliseconds.
constexpr double kRegionCycles = 40000;
constexpr int kVectorBytes = 64;
// Of layers side by side: the least steps of a chunk, even, since states are kept in two buffers in
// turn; about how many chunks; and what part of the time of one layer after the other it may take.
constexpr int64_t kLeastChunk = 8, kChunks = 24;
constexpr double kStackMargin = 0.8, kStackCycles = 2.5 * kRegionCycles;

double l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return static_cast<double>(size);
#endif
  return 1 << 20;
}

// Cycles of one thread for one step: two multiply-adds a cycle, but a tile of few rows waits for
// its weights, and weights that do not fit into L2 come from farther away.
double step_cycles(const Work& w, int64_t rows, int64_t blocks) {
  if (rows == 0 || blocks == 0) return 0;
  const double tiles = static_cast<double>((rows + w.max_rows - 1) / w.max_rows);
  const double height = static_cast<double>(rows) / tiles;
  const double products = tiles * w.depth * blocks * w.vectors * std::max(height / 2, 1.5);
  const double bytes = static_cast<double>(blocks) * w.depth * w.vectors * kVectorBytes;
  return bytes > 0.75 * l2_bytes() ? std::max(products, bytes / 16) : products;
}

// Of a barrier.
double barrier_cycles(int threads) {
  if (threads < 2) return 0;
  return kBarrierCycles * (1 + std::bit_width(static_cast<unsigned>(threads - 1))) / 2;
}

struct Choice {
  ThreadPlan plan;
  double step_cycles;
};

Choice choose(const Work& work, int threads) {
  const double region = kRegionCycles / static_cast<double>(std::max<int64_t>(work.steps, 1));
  const int groups = work.directions == 2 && threads >= 2 && threads % 2 == 0 ? 2 : 1;
  const double passes = static_cast<double>(work.directions) / groups;
  const int team = threads / groups;

  ThreadPlan best{1, 1, Split::kRows};
  double best_cycles = step_cycles(work, work.rows, work.blocks) * work.directions;
  const auto consider = [&](int size, Split split) {
    if (size < 1 || size * groups == 1) return;
    const double cycles =
        split == Split::kRows
            ? step_cycles(work, (work.rows + size - 1) / size, work.blocks)
            : step_cycles(work, work.rows, (work.blocks + size - 1) / size) + barrier_cycles(size);
    if (cycles * passes + region < best_cycles) {
      best = {size * groups, groups, split};
      best_cycles = cycles * passes + region;
    }
  };
  const int most_rows = static_cast<int>(std::min<int64_t>(team, work.rows));
  const int most_blocks = static_cast<int>(std::min<int64_t>(team, work.blocks));
  // More threads than feed each other cost more than they do: a smaller team may be the faster one.
  if (!work.uneven || work.blocks < team) {
    for (int size = most_rows; size >= 1; size /= 2) consider(size, Split::kRows);
  }
  for (int size = most_blocks; size >= 1; size /= 2) consider(size, Split::kUnits);
  return {best, best_cycles};
}

}  // namespace

ThreadPlan plan_threads(const Work& work, int threads) { return choose(work, threads).plan; }

StackPlan plan_stack(const Work& work, int layers, int threads, Pass pass) {
  StackPlan best;
  if (threads < 2 || layers < 2 || work.directions > 1 || work.steps < kLeastStackSteps) {
    return best;
  }
  const int64_t chunk = std::max(kLeastChunk, work.steps / kChunks / 2 * 2);
  const double chunks = static_cast<double>(work.steps) / chunk;
  const Choice alone = choose(work, threads);
  const bool divides_rows = alone.plan.threads > 1 && alone.plan.split == Split::kRows;
  if (pass == Pass::kBackward && divides_rows) return best;
  double best_cycles = kStackMargin * layers * work.steps * alone.step_cycles;
  for (int64_t row_parts = 1; row_parts <= work.rows; row_parts *= 2) {
    const int64_t parts = layers * row_parts;
    const int team = static_cast<int>(std::min<int64_t>(threads, parts));
    const double step = step_cycles(work, (work.rows + row_parts - 1) / row_parts, work.blocks);
    // The first and the last chunks do not keep all threads busy.
    const double rounds = static_cast<double>((parts + team - 1) / team);
    const double idle = parts > team ? rounds : layers - 1;
    const double cycles = (chunks * rounds + idle) * chunk * step +
                          (chunks + layers) * barrier_cycles(team) + kStackCycles;
    if (cycles < best_cycles) {
      best = {team, static_cast<int>(row_parts), chunk};
      best_cycles = cycles;
    }
    if (parts >= threads || pass == Pass::kBackward) break;
  }
  return best;
}

Range share(int64_t count, int rank, int size) {
  return {count * rank / size, count * (rank + 1) / size};
}

Range share_rows(const int64_t* batch_sizes, int64_t steps, int64_t batch, int rank, int size) {
  if (batch_sizes == nullptr) return share(batch, rank, size);
  int64_t total = 0;
  for (int64_t t = 0; t < steps; ++t) total += batch_sizes[t];
  // The row at which the first `rank` shares end: rows are sorted, row b lives while batch_sizes[t]
  // > b.
  const auto boundary = [&](int r) {
    if (r == size) return batch;
    int64_t row = 0, sum = 0, length = steps;
    while (row < batch) {
      while (length > 0 && batch_sizes[length - 1] <= row) --length;
      if ((sum + length) * size > total * r) break;
      sum += length;
      ++row;
    }
    return row;
  };
  return {rank == 0 ? 0 : boundary(rank), boundary(rank + 1)};
}

}  // namespace fastrnn
