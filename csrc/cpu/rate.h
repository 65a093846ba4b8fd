// The rate of multiply-adds, the limit that benchmarks measure against.
#pragma once

namespace fastrnn {

// Floating-point operations per second in float32 of `threads` threads that do nothing but
// independent multiply-adds on registers: the best of several bursts of about a millisecond, by the
// best variant that this CPU can run.
double multiply_add_rate(int threads);

}  // namespace fastrnn
