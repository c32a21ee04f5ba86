// u (ops.h: Recombination) of one chunk, shared by recombine and the fused updates.
#pragma once

#include "../update_math.h"
#include "blocks.h"

// In the variant's namespace: its member functions must not be shared between instruction sets.
namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
struct ChunkRecombination {
  const T* magnitude;
  const T* sign;  // or null
  bool has_coefficient;
  float coefficient;

  ChunkRecombination(const Recombination& r, int64_t tensor, int64_t begin)
      : magnitude(At<const T>(r.magnitude, tensor, begin)),
        sign(r.sign ? At<const T>(r.sign, tensor, begin) : nullptr),
        has_coefficient(HasCoefficient(r)),
        coefficient(Coefficient(r, tensor)) {}

  // u[0 .. n - 1] from the elements `offset` and on. N: int64_t or a Count.
  template <typename N>
  void Block(int64_t offset, N n, float* __restrict u) const {
    float staging[2][kVectorSize];
    const float* magnitudes = LoadBlock(magnitude + offset, staging[0], n);
    if (sign) {
      const float* signs = LoadBlock(sign + offset, staging[1], n);
      if (has_coefficient) {
        for (int64_t i = 0; i < n; ++i) u[i] = coefficient * WithSign(magnitudes[i], signs[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) u[i] = WithSign(magnitudes[i], signs[i]);
      }
    } else if (has_coefficient) {
      for (int64_t i = 0; i < n; ++i) u[i] = coefficient * magnitudes[i];
    } else {
      for (int64_t i = 0; i < n; ++i) u[i] = magnitudes[i];
    }
  }
};

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
