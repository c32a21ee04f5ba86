#include "../op_functions.h"
#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T, bool kRoundsAtRandom>
struct PerturbFunctor {
  enum List { kParams, kDirection, kOldParams, kLists };
  // The end of g1, which the norm read last, is still in the cache.
  static constexpr bool kReverse = SAMKERNELS_REVERSE_PERTURB;
  const double* square;
  int64_t square_stride;
  Scalar rho;
  float eps;
  bool scaled;
  float eta;
  bool saves;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    T* old_params = chunk.template At<T>(kOldParams);
    const T* direction = chunk.template At<const T>(kDirection);
    const T* weights = saves ? params : old_params;
    const int64_t tensor = chunk.TensorInWholeList();
    const float norm = NormOf(square[square_stride * tensor]);
    const float scale = PerturbScale(norm, Read(rho, tensor), eps);
    const uint32_t key = RoundingKey(norm, tensor);
    const unsigned misalignment = Misalignment(params, old_params, direction);
    // The second pass reads the perturbed weights next; old_params has time until the restore.
    const auto load = [&](int i, auto width) {
      return Loaded<T, width, 2>{
          {Load<width>(weights + i), Load<width, kStreaming>(direction + i)}};
    };
    ForEachVector<T, 2>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      const auto& w = loaded.of[0];
      const auto& d = loaded.of[1];
      auto perturbed = w;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        float value = Perturbed(ToFloat(w.lane[j]), ToFloat(d.lane[j]), scale, scaled, eta);
        if constexpr (kRoundsAtRandom) value = RoundedAtRandom(value, key, chunk.begin + i + j);
        if (scale != 0.0f) perturbed.lane[j] = FromFloat<T>(value);
      }
      if (saves) Store<width, kStreaming>(old_params + i, w);
      Store<width>(params + i, perturbed);
    });
  }
};

void Perturb(const PerturbArgs& args, const Execution& execution) {
  const ReadOnlyList lists[] = {args.params, args.direction, args.old_params};
  const auto apply = [&](auto zero, auto at_random) {
    const PerturbFunctor<decltype(zero), decltype(at_random)::value> functor = {
        args.square, args.square_stride, args.rho, args.eps, args.scaled, args.eta, args.saves};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  };
  if (args.tensors.dtype == DType::kBFloat16 && args.rounds_at_random) {
    apply(__nv_bfloat16{}, std::true_type());
    return;
  }
  DispatchDType(args.tensors.dtype, [&](auto zero) { apply(zero, std::false_type()); });
}

}  // namespace samkernels::cuda
