#include "../op_functions.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T>
struct RestoreFunctor {
  enum List { kParams, kOldParams, kLists };
  static constexpr bool kReverse = false;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    const T* old_params = chunk.template At<const T>(kOldParams);
    ForEachVector<T, 4>(
        chunk.n, Misalignment(params, old_params),
        [&](int i, auto width) { return Load<width, kStreaming>(old_params + i); },
        [&](int i, const auto& w, auto width) { Store<width>(params + i, w); });
  }
};

void Restore(const RestoreArgs& args, const Execution& execution) {
  const ReadOnlyList lists[] = {args.params, args.old_params};
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    MultiTensorApply(args.tensors, lists, RestoreFunctor<decltype(zero)>{}, execution.stream);
  });
}

cudaError_t KernelImageError() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(
      &attributes, MultiTensorApplyKernel<RestoreFunctor<float>, TensorTable<2, kSmallTableBytes>>);
}

}  // namespace samkernels::cuda
