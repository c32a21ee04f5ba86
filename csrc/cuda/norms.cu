#include "../update_math.h"
#include "cuda_ops.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace samkernels::cuda {

// Lists: x, and the weights if kWeighted.
template <typename T, bool kWeighted>
struct NormsFunctor {
  static constexpr int kSums = kNormsSums;
  static constexpr int kRead = 1 + kWeighted;
  float* per_tensor;
  float* total;

  template <typename ChunkT>
  __device__ void accumulate(const ChunkT& chunk, double (&sums)[kSums]) const {
    const T* x = chunk.template At<const T>(0);
    const T* weights = kWeighted ? chunk.template At<const T>(1) : x;
    double sum = 0.0;
    // Perturb reads x and the weights next.
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width>(x + i);
      if constexpr (kWeighted) loaded.of[1] = Load<width>(weights + i);
      return loaded;
    };
    ForEachVector<T, 4>(chunk.n, IsAligned(x) && IsAligned(weights), load,
                        [&](int, const auto& loaded, auto width) {
#pragma unroll
                          for (int j = 0; j < width; ++j) {
                            float value = ToFloat(loaded.of[0].lane[j]);
                            if constexpr (kWeighted) {
                              value = fabsf(ToFloat(loaded.of[1].lane[j])) * value;
                            }
                            sum += static_cast<double>(value) * value;
                          }
                        });
    sums[0] += sum;
  }

  __device__ void finish_tensor(int64_t tensor, const double (&sums)[kSums]) const {
    per_tensor[tensor] = static_cast<float>(sqrt(sums[0]));
  }

  __device__ void finish_total(const double (&sums)[kSums]) const {
    *total = static_cast<float>(sqrt(sums[0]));
  }
};

void Norms(const NormsArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.weights) {
      const ReadOnlyList lists[] = {args.x, args.weights};
      Reduce(args.tensors, lists, NormsFunctor<T, true>{args.per_tensor, args.total},
             args.workspace, execution.stream);
    } else {
      const ReadOnlyList lists[] = {args.x};
      Reduce(args.tensors, lists, NormsFunctor<T, false>{args.per_tensor, args.total},
             args.workspace, execution.stream);
    }
  });
}

}  // namespace samkernels::cuda
