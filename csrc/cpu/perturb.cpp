#include "../update_math.h"
#include "blocks.h"
#include "cpu_ops.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T, bool kRoundsAtRandom>
static void PerturbOf(const PerturbArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  const bool streaming = IsStreaming(tensors, 4);
  const bool adaptive = args.adaptive;
  const float scale = PerturbScale(*args.norm, Read(args.rho), args.eps);
  ForEachChunk(tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const uint32_t key = RoundingKey(*args.norm, tensor);
                 T* params = At<T>(args.params, tensor, begin);
                 T* old_params = At<T>(args.old_params, tensor, begin);
                 const T* grads = At<T>(args.grads, tensor, begin);
                 const bool streams = streaming && IsAligned(old_params);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   Prefetch<kUpdateAheadBytes>(offset, params, grads);
                   float staging[2][kVectorSize];
                   float perturbed[kVectorSize];
                   const float* w = LoadBlock(params + offset, staging[0], count);
                   const float* g = LoadBlock(grads + offset, staging[1], count);
                   if (adaptive) {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = Perturbed(w[i], g[i], scale, true);
                   } else {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = Perturbed(w[i], g[i], scale, false);
                   }
                   if (kRoundsAtRandom) {
                     for (int64_t i = 0; i < count; ++i)
                       perturbed[i] = RoundedAtRandom(perturbed[i], key, begin + offset + i);
                   }
                   StoreBytes(old_params + offset, params + offset, BytesOf<T>(count), streams);
                   if (scale != 0.0f) StoreBlock(params + offset, perturbed, count, kInPlace);
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
