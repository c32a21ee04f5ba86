#include "../op_functions.h"
#include "../update_math.h"
#include "blocks.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T, bool kRoundsAtRandom>
static void PerturbOf(const PerturbArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  const bool streaming = IsStreaming(tensors, 4);
  const float eta = args.eta;
  ForEachChunk(tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const float norm = NormOf(args.square[args.square_stride * tensor]);
                 const float scale = PerturbScale(norm, Read(args.rho, tensor), args.eps);
                 const uint32_t key = RoundingKey(norm, tensor);
                 T* params = At<T>(args.params, tensor, begin);
                 T* old_params = At<T>(args.old_params, tensor, begin);
                 const T* weights = args.saves ? params : old_params;
                 const T* direction = At<T>(args.direction, tensor, begin);
                 const bool streams = streaming && IsAligned(old_params);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   Prefetch<kUpdateAheadBytes>(offset, weights, direction);
                   float staging[2][kVectorSize];
                   float perturbed[kVectorSize];
                   const float* w = LoadBlock(weights + offset, staging[0], count);
                   const float* d = LoadBlock(direction + offset, staging[1], count);
                   if (args.scaled) {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = Perturbed(w[i], d[i], scale, true, eta);
                   } else {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = Perturbed(w[i], d[i], scale, false, eta);
                   }
                   if (kRoundsAtRandom) {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = RoundedAtRandom(perturbed[i], key, begin + offset + i);
                   }
                   // Only now: the direction may lie in old_params.
                   if (args.saves) {
                     StoreBytes(old_params + offset, params + offset, BytesOf<T>(count), streams);
                   }
                   if (scale != 0.0f) {
                     StoreBlock(params + offset, perturbed, count, kInPlace);
                   } else if (!args.saves) {
                     StoreBytes(params + offset, old_params + offset, BytesOf<T>(count), kInPlace);
                   }
                 });
               });
}

void Perturb(const PerturbArgs& args, const Execution& execution) {
  if (args.tensors.dtype == DType::kBFloat16 && args.rounds_at_random) {
    PerturbOf<BFloat16, true>(args, execution);
    return;
  }
  DispatchDType(args.tensors.dtype,
                [&](auto zero) { PerturbOf<decltype(zero), false>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
