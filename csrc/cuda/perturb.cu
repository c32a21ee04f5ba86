#include "../update_math.h"
#include "cuda_ops.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T, bool kRoundsAtRandom>
struct PerturbFunctor {
  enum List { kParams, kGrads, kOldParams, kLists };
  // The end of g1, which the norm read last, is still in the cache.
  static constexpr bool kReverse = SAMKERNELS_REVERSE_PERTURB;
  const float* norm;
  Scalar rho;
  float eps;
  bool adaptive;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    T* old_params = chunk.template At<T>(kOldParams);
    const T* grads = chunk.template At<const T>(kGrads);
    const float scale = PerturbScale(*norm, Read(rho), eps);
    const uint32_t key = RoundingKey(*norm, chunk.TensorInWholeList());
    const unsigned misalignment = Misalignment(params, old_params, grads);
    // The second pass reads the perturbed weights next; old_params has time until the restore.
    const auto load = [&](int i, auto width) {
      return Loaded<T, width, 2>{{Load<width>(params + i), Load<width, kStreaming>(grads + i)}};
    };
    ForEachVector<T, 2>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      const auto& w = loaded.of[0];
      const auto& g = loaded.of[1];
      auto perturbed = w;
      if (scale != 0.0f) {
#pragma unroll
        for (int j = 0; j < width; ++j) {
          float value = Perturbed(ToFloat(w.lane[j]), ToFloat(g.lane[j]), scale, adaptive);
          if constexpr (kRoundsAtRandom) {
            value = RoundedAtRandom(value, key, chunk.begin + i + j);
          }
          perturbed.lane[j] = FromFloat<T>(value);
        }
      }
      Store<width, kStreaming>(old_params + i, w);
      Store<width>(params + i, perturbed);
    });
  }
};

void Perturb(const PerturbArgs& args, const Execution& execution) {
  const ReadOnlyList lists[] = {args.params, args.grads, args.old_params};
  const auto apply = [&](auto zero, auto at_random) {
    const PerturbFunctor<decltype(zero), decltype(at_random)::value> functor = {
        args.norm, args.rho, args.eps, args.adaptive};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  };
  if (args.tensors.dtype == DType::kBFloat16 && args.rounds_at_random) {
    apply(__nv_bfloat16{}, std::true_type());
    return;
  }
  DispatchDType(args.tensors.dtype, [&](auto zero) { apply(zero, std::false_type()); });
}

}  // namespace samkernels::cuda
