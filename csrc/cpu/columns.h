// How the columns of a product are divided into register tiles, and how rows lie in memory.
#pragma once

#include "multiply.h"
#include "steps.h"

namespace fastrnn::FASTRNN_VARIANT {

// Vectors of hidden units in a block: as many as fill the register tile, no more than there are.
template <class T>
int units_per_block(int64_t hidden, int gates) {
  const int64_t needed = (hidden + Vec<T>::lanes - 1) / Vec<T>::lanes;
  int units = kBlockVectors / gates;
  while (units > 1 && units / 2 >= needed) units /= 2;
  return units < 1 ? 1 : units;
}

// The columns of a product, in blocks as wide as a register tile: the same vectors of columns for
// each of the gates.
template <class T>
struct Columns {
  // `widest`: the number of gates by which units are grouped, if another product has more of them.
  explicit Columns(int64_t columns, int gate_count = 1, int widest = 0)
      : count(columns),
        gates(gate_count),
        units(units_per_block<T>(columns, widest > 0 ? widest : gate_count)),
        vectors(units * gate_count),
        width(vectors * Vec<T>::lanes),
        blocks((columns + units * Vec<T>::lanes - 1) / (units * Vec<T>::lanes)) {}

  int64_t count;  // of one gate
  int gates;
  int units;      // vectors of columns in a block, of one gate
  int vectors;    // of all gates
  int64_t width;  // columns of a block, of all gates
  int64_t blocks;

  // The first column of a block's u-th vector, of one gate.
  int64_t column(int64_t block, int u) const { return (block * units + u) * Vec<T>::lanes; }

  // A row [gates * columns] in the order of the block's vectors; zero beyond the columns, and for
  // null.
  template <class S>
  void load(const S* row, int64_t block, Vec<T>* values) const {
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = column(block, v / gates);
      const int64_t left = max_of(0, min_of(count - first, Vec<T>::lanes));
      const S* from = row + v % gates * count + first;
      values[v] = row == nullptr ? Vec<T>(T(0)) : Vec<T>::load(from, left);
    }
  }

  // The columns of some blocks, of one gate.
  Range range(Range some) const {
    return {min_of(column(some.begin, 0), count), min_of(column(some.end, 0), count)};
  }
};

// Calls body(first, last, next) for groups of `size` blocks that cover all of them; `next` is the
// first block of the group that follows, or this group's own. Steps go through the blocks of a
// weight forwards and backwards in turn: then each begins with what the one before it read last,
// and so much of a weight that does not fit into a cache as does fit is found there.
template <class Body>
inline void sweep(Range blocks, int64_t size, bool is_backwards, Body body) {
  const int64_t groups = (blocks.end - blocks.begin + size - 1) / size;
  const auto first = [&](int64_t i) {
    return blocks.begin + (is_backwards ? groups - 1 - i : i) * size;
  };
  for (int64_t i = 0; i < groups; ++i) {
    body(first(i), min_of(first(i) + size, blocks.end), first(min_of(i + 1, groups - 1)));
  }
}

// The length of rows of T so that they are whole vectors and an odd number of cache lines, which
// makes them fall into all sets of the cache.
template <class T>
int64_t odd_lines(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((columns + line - 1) / line | 1) * line;
}

// Prefetches the cache lines of [p, p + bytes).
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i <= bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

}  // namespace fastrnn::FASTRNN_VARIANT
