// The states that a step of the forward scan hands to the next.
#pragma once

#include <cstring>

#include "columns.h"

namespace fastrnn::FASTRNN_VARIANT {

// [D, B, stride], zeros beyond the columns; zero where a reset stands between the two steps.
template <class S>
class States {
  using T = Compute<S>;
  using F = Factor<S>;

 public:
  States(const LayerArgs& args, Workspace& workspace)
      : stride(odd_lines<T>(max_of(args.hidden, args.proj))),
        batch_(args.batch),
        hidden_(args.hidden),
        proj_(args.proj),
        count_(args.traits->states),
        h_mask_(static_cast<const S*>(args.h_mask)) {
    const int64_t size = args.directions * args.batch * stride;
    for (F*& h : h_) h = workspace.take<F>(size);
    // Where h is rounded to be a factor, the direct path has an h of its own, unrounded. So have
    // cells of which units keep their states, or whose factor is a masked h.
    const bool is_rounded = !std::is_same_v<F, T>;
    if ((is_rounded && args.traits->has_direct_path) || args.zoneout_h > 0 ||
        args.h_mask != nullptr) {
      direct_ = workspace.take<T>(size);
    }
    cell_ = workspace.take<T>(count_ * size);
    unprojected_ = workspace.take<F>(args.weight_hr[0] != nullptr ? size : 0);
  }

  const int64_t stride;  // between rows

  // Where row `row` begins in each of these.
  int64_t offset(int direction, int64_t row) const { return (direction * batch_ + row) * stride; }

  F* h(int64_t i) const { return h_[i % 2]; }  // the i-th step reads h(i) and writes h(i + 1)
  T* direct() const { return direct_; }        // h itself, where that is not enough; else null
  const S* h_mask(int direction, int64_t row) const {
    return at(h_mask_, (direction * batch_ + row) * proj_);
  }
  // The C states of a row beside h, `stride` apart.
  T* cell(int direction, int64_t row) const { return cell_ + count_ * offset(direction, row); }
  F* unprojected() const { return unprojected_; }  // of the current step: h before its projection

  // Copies some columns of a row, as the i-th step reads them, to those of h [P] and c [C*H].
  void get(int direction, int64_t row, int64_t i, Range features, T* h, Range units, T* c) const {
    const int64_t begin = offset(direction, row);
    const auto copy = [begin](const auto* from, Range own, T* to) {
      convert(from + begin + own.begin, to + own.begin, own.end - own.begin);
    };
    if (direct_ != nullptr) {
      copy(direct_, features, h);
    } else {
      copy(this->h(i), features, h);
    }
    for (int k = 0; k < count_; ++k) {
      convert(cell(direction, row) + k * stride + units.begin, c + k * hidden_ + units.begin,
              units.end - units.begin);
    }
  }

  // Sets some columns of a row to those of h [P] and c [C*H]; null for zeros. Both buffers of h are
  // set: in one direction rows begin at different steps.
  template <class Element>
  void set(int direction, int64_t row, Range features, const Element* h, Range units,
           const Element* c) const {
    const int64_t begin = offset(direction, row);
    for (F* buffer : h_) {
      fill(buffer + begin, features, proj_, h);
      if (h_mask_ != nullptr) multiply(buffer + begin, features, h_mask(direction, row));
    }
    if (direct_ != nullptr) fill(direct_ + begin, features, proj_, h);
    for (int k = 0; k < count_; ++k) {
      fill(cell(direction, row) + k * stride, units, hidden_,
           c == nullptr ? nullptr : c + k * hidden_);
    }
  }

 private:
  const int64_t batch_, hidden_, proj_;
  const int count_;  // C
  const S* const h_mask_;
  F* h_[2];
  T* direct_ = nullptr;
  T* cell_;  // [D, B, C, stride]
  F* unprojected_;

  static void multiply(F* row, Range own, const S* mask) {
    using V = Vec<T>;
    for (int64_t i = own.begin; i < own.end; i += V::lanes) {
      const int64_t left = min_of(own.end - i, V::lanes);
      (V::load(row + i, left) * V::load(mask + i, left)).store(row + i, left);
    }
  }

  // The part with the last column sets what lies beyond it, too.
  template <class From, class To>
  void fill(To* row, Range own, int64_t columns, const From* from) const {
    const bool is_last = own.begin < own.end && own.end == columns;
    const int64_t end = is_last ? stride : own.end;
    std::memset(row + own.begin, 0, (end - own.begin) * sizeof(To));
    if (from != nullptr) convert(from + own.begin, row + own.begin, own.end - own.begin);
  }
};

}  // namespace fastrnn::FASTRNN_VARIANT
