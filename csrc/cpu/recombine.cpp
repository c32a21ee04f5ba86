#include "recombine.h"

#include "cpu_ops.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void RecombineOf(const RecombineArgs& args, const Execution& execution) {
  const Recombination& r = args.recombination;
  const bool skipped = IsSkipped(r);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const float coefficient = Coefficient(r, tensor);
                 T* out = At<T>(args.out, tensor, begin);
                 ForEachBlock(n, [&](int64_t offset, int64_t count) {
                   float u[kBlockSize] = {};
                   if (!skipped)
                     RecombineBlock<T>(r, coefficient, tensor, begin + offset, count, u);
                   StoreBlock(out + offset, u, count, kInPlace);
                 });
               });
}

void Recombine(const RecombineArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype,
                [&](auto zero) { RecombineOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
