#include "../update_math.h"
#include "cuda_ops.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace samkernels::cuda {

// Lists: x, and the weights if kWeighted.
template <typename T, bool kWeighted>
struct NormsFunctor {
  static constexpr int kSums = kNormsSums;
  float* per_tensor;
  float* total;

  template <typename ChunkT>
  __device__ void accumulate(const ChunkT& chunk, double (&sums)[kSums]) const {
    const T* x = chunk.template At<const T>(0);
    const T* weights = kWeighted ? chunk.template At<const T>(1) : x;
    double sum = 0.0;
    ForEachVector<T>(chunk.n, IsAligned(x) && IsAligned(weights), [&](int i, auto width) {
      const auto xs = Load<width>(x + i);
      const auto ws = kWeighted ? Load<width>(weights + i) : xs;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        float value = ToFloat(xs.lane[j]);
        if (kWeighted) value = fabsf(ToFloat(ws.lane[j])) * value;
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
