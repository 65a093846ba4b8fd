// How a scan is divided among threads: a pure function of its shape.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn {

// Rows: each thread runs its own batch rows through all steps and needs no other thread. Units:
// each thread owns some blocks of hidden units, whose weights stay in its cache, and all threads
// wait for each other at a barrier once a step.
enum class Split { kRows, kUnits };

// What the plan of a scan depends on.
struct Work {
  int64_t steps;
  int64_t rows;    // batch rows alive at a step, on average
  int64_t depth;   // length of the sums of a step
  int64_t blocks;  // blocks of hidden units
  int vectors;     // vectors of columns in a block
  int max_rows;    // rows of the tallest register tile
  int directions;
  bool uneven = false;  // rows end at different steps; threads that split them wait often
};

struct ThreadPlan {
  int threads;
  int groups;  // 2: each half of the threads runs one direction; 1: all threads run one after the
               // other
  Split split;
};

// The division that should take the least time.
ThreadPlan plan_threads(const Work& work, int threads);

// How layers on top of each other run side by side, see forward_stack.h.
struct StackPlan {
  int threads = 1;    // 1: they do not
  int row_parts = 1;  // into which each layer's rows are divided
  int64_t chunk = 0;  // steps that a layer takes at once
};

// For layers of `work` each, where that should take less time than one after the other. Backward
// divides no rows, and leaves layers alone that do: theirs is the better way, as its largest
// products take whole chunks of rows.
enum class Pass { kForward, kBackward };
constexpr int64_t kLeastStackSteps = 32;  // below, the answer is no
StackPlan plan_stack(const Work& work, int layers, int threads, Pass pass);

// The half-open range of `rank`'s share of `count` items.
struct Range {
  int64_t begin, end;
};
Range share(int64_t count, int rank, int size);

// The same for batch rows of different lengths: shares of about equally many steps.
Range share_rows(const int64_t* batch_sizes, int64_t steps, int64_t batch, int rank, int size);

}  // namespace fastrnn
