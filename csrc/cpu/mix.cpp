#include "mix.h"

#include "../op_functions.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void MixOf(const MixArgs& args, const Execution& execution) {
  const bool skipped = IsSkipped(args.mix);
  if (skipped && args.keeps) return;
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const ChunkMix<T> mix(args.mix, tensor, begin);
                 T* out = At<T>(args.out, tensor, begin);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   float u[kVectorSize] = {};
                   if (!skipped) mix.Block(offset, count, u);
                   StoreBlock(out + offset, u, count, kInPlace);
                 });
               });
}

void MixLists(const MixArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) { MixOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
