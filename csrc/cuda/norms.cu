#include "../update_math.h"
#include "cuda_ops.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace samkernels::cuda {

// Lists: x, and the weights if kWeighted; then the weighted sum comes first.
template <typename T, bool kWeighted>
struct NormsFunctor {
  static constexpr int kSums = 1 + kWeighted;
  static constexpr int kRead = 1 + kWeighted;
  int64_t num_tensors;
  float* per_tensor;
  float* total;

  template <typename ChunkT>
  __device__ void accumulate(const ChunkT& chunk, double (&sums)[kSums]) const {
    const T* x = chunk.template At<const T>(0);
    const T* weights = kWeighted ? chunk.template At<const T>(1) : x;
    double weighted = 0.0;
    double sum = 0.0;
    // Perturb reads x and the weights next.
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width>(x + i);
      if constexpr (kWeighted) loaded.of[1] = Load<width>(weights + i);
      return loaded;
    };
    ForEachVector<T, 4 / kRead>(chunk.n, Misalignment(x, weights), load,
                                [&](int, const auto& loaded, auto width) {
#pragma unroll
                                  for (int j = 0; j < width; ++j) {
                                    const float value = ToFloat(loaded.of[0].lane[j]);
                                    sum = AddProduct(sum, value, value);
                                    if constexpr (kWeighted) {
                                      const float scaled = ToFloat(loaded.of[1].lane[j]) * value;
                                      weighted = AddProduct(weighted, scaled, scaled);
                                    }
                                  }
                                });
    if constexpr (kWeighted) sums[0] += weighted;
    sums[kSums - 1] += sum;
  }

  __device__ void finish_tensor(int64_t tensor, const double (&sums)[kSums]) const {
    for (int k = 0; k < kSums; ++k) {
      per_tensor[k * num_tensors + tensor] = static_cast<float>(sqrt(sums[k]));
    }
  }

  __device__ void finish_total(const double (&sums)[kSums]) const {
    for (int k = 0; k < kSums; ++k) total[k] = static_cast<float>(sqrt(sums[k]));
  }
};

void Norms(const NormsArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t num_tensors = args.tensors.num_tensors;
    if (args.weights) {
      const ReadOnlyList lists[] = {args.x, args.weights};
      Reduce(args.tensors, lists, NormsFunctor<T, true>{num_tensors, args.per_tensor, args.total},
             args.workspace, execution.stream);
    } else {
      const ReadOnlyList lists[] = {args.x};
      Reduce(args.tensors, lists, NormsFunctor<T, false>{num_tensors, args.per_tensor, args.total},
             args.workspace, execution.stream);
    }
  });
}

}  // namespace samkernels::cuda
