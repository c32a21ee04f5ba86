// Computes u (ops.h: Mix) of one chunk, for mix and for the fused updates.
#pragma once

#include "../update_math.h"
#include "blocks.h"

// In the variant's namespace: its member functions must not be shared between instruction sets.
namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
struct ChunkMix {
  const T* x;
  const T* y;  // or null
  Function function;
  MixScalars scalars;

  ChunkMix(const Mix& mix, int64_t tensor, int64_t begin)
      : x(At<const T>(mix.x, tensor, begin)),
        y(mix.y ? At<const T>(mix.y, tensor, begin) : nullptr),
        function(mix.function),
        scalars(MixScalarsOf(mix, tensor)) {}

  // Makes u[0 .. n - 1] from the elements `offset` and on. N is int64_t or a Count.
  template <typename N>
  void Block(int64_t offset, N n, float* __restrict u) const {
    float staging[2][kVectorSize];
    const float* xs = LoadBlock(x + offset, staging[0], n);
    const float* ys = y ? LoadBlock(y + offset, staging[1], n) : xs;
    const MixScalars s = scalars;
    // Each function has a loop of its own, which is vectorised better.
    const auto fill = [&](Function known) {
      for (int64_t i = 0; i < n; ++i) u[i] = Mixed<true>(known, s, xs[i], ys[i]);
    };
    if (!y) {
      for (int64_t i = 0; i < n; ++i) u[i] = Mixed<false>(function, s, xs[i], xs[i]);
    } else if (function == Function::kLinear) {
      fill(Function::kLinear);
    } else if (function == Function::kSign) {
      fill(Function::kSign);
    } else if (function == Function::kDamp) {
      fill(Function::kDamp);
    } else {
      fill(Function::kProduct);
    }
  }
};

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
