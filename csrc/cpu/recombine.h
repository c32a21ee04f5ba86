// A block of u (ops.h: Recombination), shared by recombine and the fused updates.
#pragma once

#include "../update_math.h"
#include "blocks.h"

namespace samkernels::cpu {

template <typename T>
static inline void RecombineBlock(const Recombination& r, float coefficient, int64_t tensor,
                                  int64_t begin, int64_t n, float* u) {
  float staging[2][kBlockSize];
  const float* magnitude = LoadBlock(At<const T>(r.magnitude, tensor, begin), staging[0], n);
  if (r.sign) {
    const float* sign = LoadBlock(At<const T>(r.sign, tensor, begin), staging[1], n);
    for (int64_t i = 0; i < n; ++i) u[i] = WithSign(magnitude[i], sign[i]);
  } else if (r.numerator) {
    for (int64_t i = 0; i < n; ++i) u[i] = coefficient * magnitude[i];
  } else {
    std::memcpy(u, magnitude, n * sizeof(float));
  }
}

}  // namespace samkernels::cpu
