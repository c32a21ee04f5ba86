#include <math.h>

#include "cpu_ops.h"
#include "reduce.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void CompareOf(const CompareArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  double* partials = static_cast<double*>(args.workspace);
  ForEachChunk(
      tensors, execution.num_threads, [&](int64_t chunk, int64_t tensor, int64_t begin, int64_t n) {
        const T* first = At<T>(args.first_grads, tensor, begin);
        const T* second = At<T>(args.second_grads, tensor, begin);
        const T* weights = At<T>(args.weights, tensor, begin);
        double lanes[kCompareSums][kLanes] = {};
        ForEachBlock(n, [&](int64_t offset, int64_t count) {
          float staging[3][kBlockSize];
          const float* a = LoadBlock(first + offset, staging[0], count);
          const float* b = LoadBlock(second + offset, staging[1], count);
          const float* w = LoadBlock(weights + offset, staging[2], count);
          AddToLanes(lanes[0], count, [&](int64_t i) { return static_cast<double>(a[i]) * a[i]; });
          AddToLanes(lanes[1], count, [&](int64_t i) { return static_cast<double>(b[i]) * b[i]; });
          AddToLanes(lanes[2], count, [&](int64_t i) { return static_cast<double>(a[i]) * b[i]; });
          AddToLanes(lanes[3], count,
                     [&](int64_t i) { return fabsf(b[i]) > fabsf(a[i]) ? 1.0 : 0.0; });
          AddToLanes(lanes[4], count,
                     [&](int64_t i) { return static_cast<double>(a[i]) * b[i] > 0.0 ? 1.0 : 0.0; });
          AddToLanes(lanes[5], count, [&](int64_t i) { return static_cast<double>(w[i]) * w[i]; });
        });
        for (int k = 0; k < kCompareSums; ++k)
          partials[chunk * kCompareSums + k] = SumLanes(lanes[k]);
      });

  for (int k = 0; k < kCompareSums; ++k) {
    args.sums[k] = 0.0;
    for (int64_t i = 0; i < tensors.num_tensors; ++i) {
      args.sums[k] += SumOfTensor(tensors, partials, i, kCompareSums, k);
    }
  }
  for (int64_t i = 0; i < tensors.num_tensors; ++i) {
    args.per_tensor[i] =
        static_cast<float>(sqrt(SumOfTensor(tensors, partials, i, kCompareSums, kSecondSquares)));
  }
  *args.total = static_cast<float>(sqrt(args.sums[kSecondSquares]));
}

void Compare(const CompareArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) { CompareOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
