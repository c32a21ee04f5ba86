#include "../op_functions.h"
#include "mix.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

// Turns u into the new weight. The arguments come by value and __restrict: otherwise the compiler
// must expect that a store changes the options, or what is read next.
template <bool kDecaysGradient, typename N>
static inline void AdamBlock(const AdamOptions options, const AdamScalars scalars, N n,
                             const float* __restrict w, float* __restrict u,
                             const float* __restrict old_m, const float* __restrict old_v,
                             float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    float new_m = old_m[i];
    float new_v = old_v[i];
    u[i] = AdamUpdated(options, scalars, kDecaysGradient, w[i], u[i], new_m, new_v);
    m[i] = new_m;
    v[i] = new_v;
  }
}

template <typename T, bool kDecaysGradient>
static void AdamOf(const AdamArgs& args, const Execution& execution) {
  const AdamOptions options = args.options;
  const bool streaming = IsStreaming(args.tensors, 7);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const ChunkMix<T> mix(args.mix, tensor, begin);
                 const AdamScalars scalars = AdamScalarsOf(options, args.bias_corrections[tensor]);
                 T* params = At<T>(args.params, tensor, begin);
                 const T* old_params = At<T>(args.old_params, tensor, begin);
                 T* exp_avg = At<T>(args.exp_avg, tensor, begin);
                 T* exp_avg_sq = At<T>(args.exp_avg_sq, tensor, begin);
                 const bool streams = streaming && IsAligned(params);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   Prefetch<kUpdateAheadBytes>(offset, old_params, mix.x, exp_avg, exp_avg_sq);
                   float staging[3][kVectorSize];
                   float u[kVectorSize];
                   float m[kVectorSize];
                   float v[kVectorSize];
                   mix.Block(offset, count, u);
                   const float* w = LoadBlock(old_params + offset, staging[0], count);
                   const float* old_m = LoadBlock(exp_avg + offset, staging[1], count);
                   const float* old_v = LoadBlock(exp_avg_sq + offset, staging[2], count);
                   AdamBlock<kDecaysGradient>(options, scalars, count, w, u, old_m, old_v, m, v);
                   StoreBlock(params + offset, u, count, streams);
                   StoreBlock(exp_avg + offset, m, count, kInPlace);
                   StoreBlock(exp_avg_sq + offset, v, count, kInPlace);
                 });
               });
}

// Of tensors that had equally many steps, as nearly all have, the corrections are made once.
static void CountSteps(const AdamArgs& args) {
  double of_last = 0.0;
  BiasCorrections corrections = {};
  for (int64_t i = 0; i < args.tensors.num_tensors; ++i) {
    const double t = Counted(args.steps.address[i], args.steps.is_double[i], false);
    if (i == 0 || t != of_last) corrections = BiasCorrectionsOf(args.options, t);
    args.bias_corrections[i] = corrections;
    of_last = t;
  }
}

void Adam(const AdamArgs& args, const Execution& execution) {
  if (IsSkipped(args.mix)) {
    return Restore({args.tensors, args.params, args.old_params}, execution);
  }
  CountSteps(args);
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    if (DecaysGradient(args.options)) {
      AdamOf<decltype(zero), true>(args, execution);
    } else {
      AdamOf<decltype(zero), false>(args, execution);
    }
  });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
