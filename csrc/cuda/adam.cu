#include <vector>

#include "cuda_ops.h"
#include "recombine.cuh"

namespace samkernels::cuda {

// Lists: the step counts, and whether each is a double, as numbers.
template <typename Table>
__global__ void __launch_bounds__(kThreads)
    CountStepsKernel(const __grid_constant__ Table table,
                     const __grid_constant__ Recombination recombination,
                     const __grid_constant__ AdamOptions options,
                     BiasCorrections* bias_corrections) {
  const bool skipped = IsSkipped(recombination);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < table.num_tensors;
       i += gridDim.x * kThreads) {
    void* count = const_cast<void*>(table.address[0][i]);
    const double t = Counted(count, table.address[1][i] != nullptr, skipped);
    bias_corrections[table.first_tensor + i] = BiasCorrectionsOf(options, t);
  }
}

// A launch of its own: of the chunks of a tensor, none may count while another still reads.
static void CountSteps(const AdamArgs& args, const Execution& execution) {
  std::vector<const void*> kinds;
  for (int64_t i = 0; i < args.tensors.num_tensors; ++i) {
    kinds.push_back(reinterpret_cast<const void*>(intptr_t{args.steps.is_double[i]}));
  }
  const ReadOnlyList lists[] = {args.steps.address, kinds.data()};
  ForEachTable(args.tensors, lists, [&](const auto& table, unsigned, int64_t, bool) {
    using Table = std::decay_t<decltype(table)>;
    const unsigned blocks = (table.num_tensors + kThreads - 1) / kThreads;
    Launch(CountStepsKernel<Table>, blocks, execution.stream, table, args.recombination,
           args.options, args.bias_corrections);
  });
}

template <typename T, bool kSigned>
struct AdamFunctor {
  // Without signs the last list is left out of the table.
  enum List { kParams, kOldParams, kMagnitude, kExpAvg, kExpAvgSq, kSign };
  static constexpr int kRead = 4 + kSigned;
  static constexpr bool kReverse = false;
  Recombination recombination;
  AdamOptions options;
  const BiasCorrections* bias_corrections;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    const T* old_params = chunk.template At<const T>(kOldParams);
    const T* magnitude = chunk.template At<const T>(kMagnitude);
    T* exp_avg = chunk.template At<T>(kExpAvg);
    T* exp_avg_sq = chunk.template At<T>(kExpAvgSq);
    const T* sign = kSigned ? chunk.template At<const T>(kSign) : magnitude;
    const int64_t tensor = chunk.TensorInWholeList();
    const AdamScalars scalars = AdamScalarsOf(options, bias_corrections[tensor]);
    const bool decays_gradient = DecaysGradient(options);
    const bool has_coefficient = HasCoefficient(recombination);
    const float coefficient = Coefficient(recombination, tensor);
    const unsigned misalignment =
        Misalignment(params, old_params, magnitude, exp_avg, exp_avg_sq, sign);
    // The next forward pass reads the weights; all else has time.
    if (IsSkipped(recombination)) {
      const auto load_old = [&](int i, auto width) {
        return Load<width, kStreaming>(old_params + i);
      };
      ForEachVector<T, 2>(chunk.n, misalignment, load_old,
                          [&](int i, const auto& w, auto width) { Store<width>(params + i, w); });
      return;
    }
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width, kStreaming>(old_params + i);
      loaded.of[1] = Load<width, kStreaming>(magnitude + i);
      loaded.of[2] = Load<width, kStreaming>(exp_avg + i);
      loaded.of[3] = Load<width, kStreaming>(exp_avg_sq + i);
      if constexpr (kSigned) loaded.of[4] = Load<width, kStreaming>(sign + i);
      return loaded;
    };
    ForEachVector<T, 1>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      auto w = loaded.of[0];
      const auto& magnitudes = loaded.of[1];
      auto m = loaded.of[2];
      auto v = loaded.of[3];
      const auto& signs = loaded.of[kSigned ? 4 : 1];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float u = Recombined<kSigned>(ToFloat(magnitudes.lane[j]), ToFloat(signs.lane[j]),
                                            coefficient, has_coefficient);
        float new_m = ToFloat(m.lane[j]);
        float new_v = ToFloat(v.lane[j]);
        w.lane[j] = FromFloat<T>(
            AdamUpdated(options, scalars, decays_gradient, ToFloat(w.lane[j]), u, new_m, new_v));
        m.lane[j] = FromFloat<T>(new_m);
        v.lane[j] = FromFloat<T>(new_v);
      }
      Store<width>(params + i, w);
      Store<width, kStreaming>(exp_avg + i, m);
      Store<width, kStreaming>(exp_avg_sq + i, v);
    });
  }
};

template <typename T, bool kSigned>
static void AdamOf(const AdamArgs& args, const Execution& execution) {
  const Recombination& r = args.recombination;
  const AdamFunctor<T, kSigned> functor = {r, args.options, args.bias_corrections};
  if constexpr (kSigned) {
    const ReadOnlyList lists[] = {args.params,  args.old_params, r.magnitude,
                                  args.exp_avg, args.exp_avg_sq, r.sign};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  } else {
    const ReadOnlyList lists[] = {args.params, args.old_params, r.magnitude, args.exp_avg,
                                  args.exp_avg_sq};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  }
}

void Adam(const AdamArgs& args, const Execution& execution) {
  CountSteps(args, execution);
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    DispatchSigned(args.recombination,
                   [&](auto is_signed) { AdamOf<decltype(zero), is_signed>(args, execution); });
  });
}

}  // namespace samkernels::cuda
