#include <math.h>

#include "cpu_ops.h"
#include "reduce.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void NormsOf(const NormsArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  double* partials = static_cast<double*>(args.workspace);
  const int num_sums = args.weights ? 2 : 1;
  ForEachChunk(tensors, execution.num_threads,
               [&](int64_t chunk, int64_t tensor, int64_t begin, int64_t n) {
                 const T* x = At<T>(args.x, tensor, begin);
                 const T* weights = args.weights ? At<T>(args.weights, tensor, begin) : nullptr;
                 double lanes[kLanes] = {}, weighted[kLanes] = {};
                 ForEachBlock(n, [&](int64_t offset, int64_t count) {
                   float staging[2][kBlockSize];
                   const float* xs = LoadBlock(x + offset, staging[0], count);
                   if (weights) {
                     const float* ws = LoadBlock(weights + offset, staging[1], count);
                     AddToLanes(
                         weighted, count,
                         [&](int64_t i) {
                           const double value = ws[i] * xs[i];
                           return value * value;
                         },
                         x + offset, weights + offset);
                   }
                   AddToLanes(
                       lanes, count,
                       [&](int64_t i) {
                         const double value = xs[i];
                         return value * value;
                       },
                       x + offset);
                 });
                 double* of_chunk = partials + chunk * num_sums;
                 if (weights) *of_chunk++ = SumLanes(weighted);
                 *of_chunk = SumLanes(lanes);
               });

  for (int k = 0; k < num_sums; ++k) {
    double total = 0.0;
    for (int64_t i = 0; i < tensors.num_tensors; ++i) {
      const double sum = SumOfTensor(tensors, partials, i, num_sums, k);
      args.per_tensor[k * tensors.num_tensors + i] = static_cast<float>(sqrt(sum));
      total += sum;
    }
    args.total[k] = static_cast<float>(sqrt(total));
  }
}

void Norms(const NormsArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) { NormsOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
