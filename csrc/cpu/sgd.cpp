#include "cpu_ops.h"
#include "recombine.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void SgdOf(const SgdArgs& args, const Execution& execution) {
  const Recombination& r = args.recombination;
  const SgdOptions& options = args.options;
  const bool streaming = IsStreaming(args.tensors, options.has_momentum ? 5 : 3);
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const float coefficient = Coefficient(r, tensor);
                 T* params = At<T>(args.params, tensor, begin);
                 const T* old_params = At<T>(args.old_params, tensor, begin);
                 T* buffer = options.has_momentum ? At<T>(args.momentum_buffer, tensor, begin) : nullptr;
                 ForEachBlock(n, [&](int64_t offset, int64_t count) {
                   float staging[2][kBlockSize];
                   float u[kBlockSize];
                   float buf[kBlockSize] = {};
                   RecombineBlock<T>(r, coefficient, tensor, begin + offset, count, u);
                   const float* w = LoadBlock(old_params + offset, staging[0], count);
                   if (buffer) {
                     const float* old_buf = buf;
                     if (!options.init_momentum) old_buf = LoadBlock(buffer + offset, staging[1], count);
                     for (int64_t i = 0; i < count; ++i) {
                       buf[i] = old_buf[i];
                       u[i] = SgdUpdated(options, w[i], u[i], buf[i]);
                     }
                     StoreBlock(buffer + offset, buf, count, streaming);
                   } else {
                     for (int64_t i = 0; i < count; ++i) u[i] = SgdUpdated(options, w[i], u[i], buf[i]);
                   }
                   StoreBlock(params + offset, u, count, streaming);
                 });
               });
}

// A skipped step: the weights come back, the momentum stays (or starts at 0).
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
  if (IsSkipped(args.recombination)) return RestoreOnly(args, execution);
  DispatchDType(args.tensors.dtype, [&](auto zero) { SgdOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
