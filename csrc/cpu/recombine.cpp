#include "recombine.h"

#include "cpu_ops.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void RecombineOf(const RecombineArgs& args, const Execution& execution) {
  const bool skipped = IsSkipped(args.recombination);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const ChunkRecombination<T> recombination(args.recombination, tensor, begin);
                 T* out = At<T>(args.out, tensor, begin);
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   float u[kVectorSize] = {};
                   if (!skipped) recombination.Block(offset, count, u);
                   StoreBlock(out + offset, u, count, kInPlace);
                 });
               });
}

void Recombine(const RecombineArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype,
                [&](auto zero) { RecombineOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
