#include "sgd.h"

#include "../op_functions.h"
#include "mix.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T, typename V>
static void SgdOf(const SgdArgs& args, const Execution& execution) {
  const SgdOptions options = args.options;
  const SgdScalars scalars = SgdScalarsOf(options);
  constexpr bool kHasBuffer = V::kHasBuffer;
  const bool streaming = IsStreaming(args.tensors, kHasBuffer ? 5 : 3);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const ChunkMix<T> mix(args.mix, tensor, begin);
                 T* params = At<T>(args.params, tensor, begin);
                 const T* old_params = At<T>(args.old_params, tensor, begin);
                 T* buffer = kHasBuffer ? At<T>(args.momentum_buffer, tensor, begin) : nullptr;
                 const bool streams = streaming && IsAligned(params);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   Prefetch<kUpdateAheadBytes>(offset, old_params, mix.x);
                   if (kHasBuffer) Prefetch<kUpdateAheadBytes>(offset, buffer);
                   float staging[2][kVectorSize];
                   float u[kVectorSize];
                   float buf[kVectorSize];
                   mix.Block(offset, count, u);
                   const float* w = LoadBlock(old_params + offset, staging[0], count);
                   const float* old_buf = nullptr;
                   if (kHasBuffer) old_buf = LoadBlock(buffer + offset, staging[1], count);
                   SgdBlock<V>(options, scalars, count, w, u, old_buf, buf);
                   StoreBlock(params + offset, u, count, streams);
                   if (kHasBuffer) StoreBlock(buffer + offset, buf, count, kInPlace);
                 });
               });
}

// Makes a skipped step: the weights come back, the momentum stays (or starts at 0).
static void RestoreOnly(const SgdArgs& args, const Execution& execution) {
  Restore({args.tensors, args.params, args.old_params}, execution);
  if (!args.options.has_momentum || !args.options.init_momentum) return;
  const int64_t size = SizeOf(args.tensors.dtype);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 std::memset(At<char>(args.momentum_buffer, tensor, begin * size), 0, n * size);
               });
}

void Sgd(const SgdArgs& args, const Execution& execution) {
  if (IsSkipped(args.mix)) return RestoreOnly(args, execution);
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    DispatchVariant(args.options, [&](auto variant) {
      SgdOf<decltype(zero), decltype(variant)>(args, execution);
    });
  });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
