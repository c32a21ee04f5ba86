#include <math.h>

#include "../op_functions.h"
#include "../update_math.h"
#include "reduce.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

template <typename T, int kLists, bool kWeighted>
static void DotsOf(const DotsArgs& args, const Execution& execution) {
  constexpr int kSums = NumDots(kLists, kWeighted);
  const Tensors& tensors = args.tensors;
  const float eta = args.eta;
  double* partials = static_cast<double*>(args.workspace);
  ForEachChunk(
      tensors, execution.num_threads, [&](int64_t chunk, int64_t tensor, int64_t begin, int64_t n) {
        const T* lists[3] = {};
        for (int k = 0; k < kLists; ++k) lists[k] = At<const T>(args.lists[k], tensor, begin);
        const T* weights = kWeighted ? At<const T>(args.weights, tensor, begin) : nullptr;
        double lanes[kSums][kLanes] = {};
        ForEachBlock(n, [&](int64_t offset, int64_t count) {
          float staging[3][kBlockSize];
          const float* of_lists[3] = {};
          for (int k = 0; k < kLists; ++k) {
            of_lists[k] = LoadBlock(lists[k] + offset, staging[k], count);
          }
          const float *x = of_lists[0], *y = of_lists[1], *z = of_lists[2];
          int sum = 0;
          const auto add = [&](const auto& term, const auto*... to_come) {
            AddToLanes(lanes[sum++], count, term, to_come...);
          };
          const auto product = [](const float* a, const float* b) {
            return [=](int64_t i) { return static_cast<double>(a[i]) * b[i]; };
          };
          if constexpr (kWeighted) {
            const float* w = LoadBlock(weights + offset, staging[1], count);
            const auto scaled_square = [&](int64_t i) {
              const double value = WeightScale(w[i], eta) * x[i];
              return value * value;
            };
            add(scaled_square, lists[0] + offset, weights + offset);
          }
          add(product(x, x), lists[0] + offset);
          if constexpr (kLists > 1) {
            add(product(x, y), lists[1] + offset);
            add(product(y, y));
          }
          if constexpr (kLists > 2) {
            add(product(z, z), lists[2] + offset);
            add([&](int64_t i) { return fabsf(y[i]) > fabsf(x[i]) ? 1.0 : 0.0; });
            add([&](int64_t i) { return static_cast<double>(x[i]) * y[i] > 0.0 ? 1.0 : 0.0; });
          }
        });
        for (int k = 0; k < kSums; ++k) partials[chunk * kSums + k] = SumLanes(lanes[k]);
      });

  for (int k = 0; k < kSums; ++k) {
    args.total[k] = 0.0;
    for (int64_t i = 0; i < tensors.num_tensors; ++i) {
      const double sum = SumOfTensor(tensors, partials, i, kSums, k);
      args.per_tensor[i * kSums + k] = sum;
      args.total[k] += sum;
    }
  }
}

void Dots(const DotsArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.weights) return DotsOf<T, 1, true>(args, execution);
    if (args.lists[2]) return DotsOf<T, 3, false>(args, execution);
    if (args.lists[1]) return DotsOf<T, 2, false>(args, execution);
    DotsOf<T, 1, false>(args, execution);
  });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
