// The rate of multiply-adds, the limit that benchmarks measure against, and how near to it the
// register tiles come.
#pragma once

#include <cstdint>

namespace fastrnn {

// Floating-point operations per second in float32 of `threads` threads that do nothing but
// independent multiply-adds on registers: the best of several bursts of about a millisecond, by the
// active variant.
double multiply_add_rate(int threads);

// The same of one thread that does nothing but the tallest register tile of 1 to 4 vectors.
// Transposed: that of weight gradients.
double tile_rate(int vectors, int64_t depth, bool transposed);

}  // namespace fastrnn
