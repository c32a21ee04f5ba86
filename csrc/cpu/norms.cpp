#include <math.h>

#include "cpu_ops.h"
#include "reduce.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T>
static void NormsOf(const NormsArgs& args, const Execution& execution) {
  const Tensors& tensors = args.tensors;
  double* partials = static_cast<double*>(args.workspace);
  ForEachChunk(tensors, execution.num_threads,
               [&](int64_t chunk, int64_t tensor, int64_t begin, int64_t n) {
                 const T* x = At<T>(args.x, tensor, begin);
                 const T* weights = args.weights ? At<T>(args.weights, tensor, begin) : nullptr;
                 double lanes[kLanes] = {};
                 ForEachBlock(n, [&](int64_t offset, int64_t count) {
                   float staging[2][kBlockSize];
                   const float* xs = LoadBlock(x + offset, staging[0], count);
                   if (weights) {
                     const float* ws = LoadBlock(weights + offset, staging[1], count);
                     AddToLanes(
                         lanes, count,
                         [&](int64_t i) {
                           const double value = fabsf(ws[i]) * xs[i];
                           return value * value;
                         },
                         x + offset, weights + offset);
                   } else {
                     AddToLanes(
                         lanes, count,
                         [&](int64_t i) {
                           const double value = xs[i];
                           return value * value;
                         },
                         x + offset);
                   }
                 });
                 partials[chunk] = SumLanes(lanes);
               });

  double total = 0.0;
  for (int64_t i = 0; i < tensors.num_tensors; ++i) {
    const double sum = SumOfTensor(tensors, partials, i, kNormsSums, 0);
    args.per_tensor[i] = static_cast<float>(sqrt(sum));
    total += sum;
  }
  *args.total = static_cast<float>(sqrt(total));
}

void Norms(const NormsArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) { NormsOf<decltype(zero)>(args, execution); });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
