// Where the rows of each step lie, and where resets stand; see ../scan.h for the layout.
#pragma once

#include "scan.h"
#include "schedule.h"
#include "workspace.h"

namespace fastrnn::FASTRNN_VARIANT {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// An element of a buffer of S; null if there is no buffer.
template <class S>
const S* at(const void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const S*>(base) + offset;
}
template <class S>
S* at(S* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

// Steps [first, last] in time, which are `rows` rows of features from row `begin` on.
struct Chunk {
  int64_t first, last, begin, rows;
};

class Steps {
 public:
  Steps(const LayerArgs& args, Workspace& workspace)
      : steps_(args.steps),
        batch_(args.batch),
        directions_(args.directions),
        batch_sizes_(args.batch_sizes),
        resets_(args.resets),
        reverse_(args.reverse) {
    if (batch_sizes_ == nullptr) return;
    offsets_ = workspace.take<int64_t>(steps_);
    int64_t sum = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      offsets_[t] = sum;
      sum += batch_sizes_[t];
    }
  }

  int64_t count() const { return steps_; }

  // N
  int64_t total() const { return steps_ == 0 ? 0 : offset(steps_ - 1) + rows(steps_ - 1); }

  int64_t mean_rows() const {
    if (batch_sizes_ == nullptr || steps_ == 0) return batch_;
    return (total() + steps_ - 1) / steps_;
  }

  // Rows alive at step t; none before the first step and after the last.
  int64_t rows(int64_t t) const {
    if (t < 0 || t >= steps_) return 0;
    return batch_sizes_ == nullptr ? batch_ : batch_sizes_[t];
  }

  // The buffer row at which step t begins.
  int64_t offset(int64_t t) const { return batch_sizes_ == nullptr ? t * batch_ : offsets_[t]; }

  // Where a row begins in [D, B, columns], and at step t in [N, D*columns].
  int64_t state_offset(int direction, int64_t row, int64_t columns) const {
    return (direction * batch_ + row) * columns;
  }
  int64_t feature_offset(int direction, int64_t t, int64_t row, int64_t columns) const {
    return ((offset(t) + row) * directions_ + direction) * columns;
  }

  Chunk chunk(int64_t first, int64_t last) const {
    const int64_t begin = offset(first);
    return {first, last, begin, offset(last) + rows(last) - begin};
  }

  // Whether a direction goes from each row's last step to its first.
  bool runs_back(int direction) const { return direction == 1 || reverse_; }

  // From a step to the next one in the order of the direction, and the first one of all.
  int64_t stride(int direction) const { return runs_back(direction) ? -1 : 1; }
  int64_t first(int direction) const { return runs_back(direction) ? steps_ - 1 : 0; }

  // Whether a reset keeps what comes before step t, in the order of the direction, from going into
  // it: the initial state or that of another step.
  bool resets_before(int direction, int64_t t, int64_t row) const {
    return resets_at(runs_back(direction) ? t + 1 : t, row);
  }
  // The same of the state after step t; never of the final state.
  bool resets_after(int direction, int64_t t, int64_t row) const {
    return runs_back(direction) ? t > 0 && resets_at(t, row) : resets_at(t + 1, row);
  }

 private:
  bool resets_at(int64_t t, int64_t row) const {
    return resets_ != nullptr && row < rows(t) && resets_[offset(t) + row];
  }

  int64_t steps_, batch_;
  int directions_;
  const int64_t* batch_sizes_;
  const bool* resets_;
  bool reverse_;
  int64_t* offsets_ = nullptr;
};

}  // namespace fastrnn::FASTRNN_VARIANT
