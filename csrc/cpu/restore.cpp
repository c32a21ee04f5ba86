#include "../op_functions.h"
#include "blocks.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

constexpr int64_t kCacheLine = 64;  // bytes

void Restore(const RestoreArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  const bool streaming = IsStreaming(tensors, 2);
  const int64_t size = SizeOf(tensors.dtype);
  ForEachChunk(tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 char* params = At<char>(args.params, tensor, begin * size);
                 const char* old_params = At<char>(args.old_params, tensor, begin * size);
                 const bool streams = streaming && IsAligned(params);
                 ForEachVector<kCacheLine>(n * size, [&](int64_t offset, auto count) {
                   StoreBytes(params + offset, old_params + offset, count, streams);
                 });
               });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
