// Adds up in double, in an order that depends on the tensors only: not on the number of threads,
// nor on the instruction set. Elements go round kLanes accumulators, lanes are added in order, then
// chunks, then tensors.
#pragma once

#include "blocks.h"

namespace samkernels::cpu {

constexpr int kLanes = 16;

// Adds f(i), i = 0 .. n - 1, to the lanes, round robin. n is a multiple of kLanes except in a
// chunk's last block.
template <typename F, typename... T>
static inline void AddToLanes(double* lanes, int64_t n, const F& f, const T*... lists) {
  double sums[kLanes];
  for (int j = 0; j < kLanes; ++j) sums[j] = lanes[j];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Prefetch<kReadAheadBytes>(i, lists...);
#ifdef __GNUC__
#pragma GCC unroll 16
#endif
    for (int j = 0; j < kLanes; ++j) sums[j] += f(i + j);
  }
  for (int j = 0; i + j < n; ++j) sums[j] += f(i + j);
  for (int j = 0; j < kLanes; ++j) lanes[j] = sums[j];
}

static inline double SumLanes(const double* lanes) {
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// Returns the sum of one tensor's chunks: partials[chunk * stride + k].
static inline double SumOfTensor(const Tensors& tensors, const double* partials, int64_t tensor,
                                 int stride, int k) {
  double sum = 0.0;
  for (int64_t chunk = tensors.first_chunk[tensor]; chunk < tensors.first_chunk[tensor + 1];
       ++chunk) {
    sum += partials[chunk * stride + k];
  }
  return sum;
}

}  // namespace samkernels::cpu
