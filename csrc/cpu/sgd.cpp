#include "cpu_ops.h"
#include "recombine.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

// u becomes the new weight, buf the new buffer. By value and __restrict: otherwise the compiler
// must expect that a store changes the options, or what is read next, and does not vectorise.
template <Momentum kMomentum>
static void SgdBlock(const SgdOptions options, int64_t n, const float* __restrict w,
                     float* __restrict u, const float* __restrict old_buf, float* __restrict buf) {
  for (int64_t i = 0; i < n; ++i) {
    float b = kMomentum == Momentum::kRunning ? old_buf[i] : 0.0f;
    u[i] = SgdUpdated<kMomentum>(options, w[i], u[i], b);
    if (kMomentum != Momentum::kNone) buf[i] = b;
  }
}

template <typename T>
static void SgdOf(const SgdArgs& args, const Execution& execution) {
  const Recombination& r = args.recombination;
  const SgdOptions& options = args.options;
  const Momentum momentum = MomentumOf(options);
  const bool streaming = IsStreaming(args.tensors, options.has_momentum ? 5 : 3);
  ForEachChunk(
      args.tensors, execution.num_threads, [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
        const float coefficient = Coefficient(r, tensor);
        T* params = At<T>(args.params, tensor, begin);
        const T* old_params = At<T>(args.old_params, tensor, begin);
        T* buffer = options.has_momentum ? At<T>(args.momentum_buffer, tensor, begin) : nullptr;
        ForEachBlock(n, [&](int64_t offset, int64_t count) {
          float staging[2][kBlockSize];
          float u[kBlockSize];
          float buf[kBlockSize];
          RecombineBlock<T>(r, coefficient, tensor, begin + offset, count, u);
          const float* w = LoadBlock(old_params + offset, staging[0], count);
          switch (momentum) {
            case Momentum::kNone:
              SgdBlock<Momentum::kNone>(options, count, w, u, nullptr, nullptr);
              break;
            case Momentum::kInit:
              SgdBlock<Momentum::kInit>(options, count, w, u, nullptr, buf);
              break;
            case Momentum::kRunning:
              SgdBlock<Momentum::kRunning>(options, count, w, u,
                                           LoadBlock(buffer + offset, staging[1], count), buf);
              break;
          }
          StoreBlock(params + offset, u, count, streaming);
          if (buffer) StoreBlock(buffer + offset, buf, count, kInPlace);
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
