// u (ops.h: Recombination) from lanes, shared by recombine and the fused updates.
#pragma once

#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

// kSigned: u = coefficient * |magnitude| * sign(sign), else u = coefficient * magnitude (ops.h).
// `sign` may be anything then.
template <bool kSigned>
__device__ __forceinline__ float Recombined(float magnitude, float sign, float coefficient,
                                            bool has_coefficient) {
  const float u = kSigned ? WithSign(magnitude, sign) : magnitude;
  return Scaled(u, coefficient, has_coefficient);
}

// f(std::true_type()) if u takes its sign from a list of its own, else f(std::false_type()).
template <typename F>
void DispatchSigned(const Recombination& recombination, const F& f) {
  if (recombination.sign) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

}  // namespace samkernels::cuda
