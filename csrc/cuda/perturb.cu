#include "../update_math.h"
#include "cuda_ops.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T>
struct PerturbFunctor {
  enum List { kParams, kGrads, kOldParams, kLists };
  const float* norm;
  float rho;
  float eps;
  bool adaptive;

  __device__ void operator()(const Chunk<kLists>& chunk) const {
    T* params = chunk.template At<T>(kParams);
    T* old_params = chunk.template At<T>(kOldParams);
    const T* grads = chunk.template At<const T>(kGrads);
    const float scale = PerturbScale(*norm, rho, eps);
    const bool aligned = IsAligned(params) && IsAligned(old_params) && IsAligned(grads);
    ForEachVector<T>(chunk.n, aligned, [&](int i, auto width) {
      const auto w = Load<width>(params + i);
      const auto g = Load<width>(grads + i);
      auto perturbed = w;
      if (scale != 0.0f) {
#pragma unroll
        for (int j = 0; j < width; ++j) {
          perturbed.lane[j] =
              FromFloat<T>(Perturbed(ToFloat(w.lane[j]), ToFloat(g.lane[j]), scale, adaptive));
        }
      }
      Store<width>(old_params + i, w);
      Store<width>(params + i, perturbed);
    });
  }
};

void Perturb(const PerturbArgs& args, const Execution& execution) {
  const ReadOnlyList lists[] = {args.params, args.grads, args.old_params};
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    const PerturbFunctor<decltype(zero)> functor = {args.norm, args.rho, args.eps, args.adaptive};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  });
}

}  // namespace samkernels::cuda
