#include <vector>

#include "../op_functions.h"
#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

// Its lists are the step counts, and whether each is a double, as numbers.
template <typename Table>
__global__ void __launch_bounds__(kThreads)
    CountStepsKernel(const __grid_constant__ Table table, const __grid_constant__ Mix mix,
                     const __grid_constant__ AdamOptions options,
                     BiasCorrections* bias_corrections) {
  const bool skipped = IsSkipped(mix);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < table.num_tensors;
       i += gridDim.x * kThreads) {
    void* count = const_cast<void*>(table.address[0][i]);
    const double t = Counted(count, table.address[1][i] != nullptr, skipped);
    bias_corrections[table.first_tensor + i] = BiasCorrectionsOf(options, t);
  }
}

// Counts in a launch of its own: of the chunks of a tensor, none may count while another still
// reads.
static void CountSteps(const AdamArgs& args, const Execution& execution) {
  std::vector<const void*> kinds;
  for (int64_t i = 0; i < args.tensors.num_tensors; ++i) {
    kinds.push_back(reinterpret_cast<const void*>(intptr_t{args.steps.is_double[i]}));
  }
  const ReadOnlyList lists[] = {args.steps.address, kinds.data()};
  ForEachTable(args.tensors, lists, [&](const auto& table, unsigned, int64_t, bool) {
    using Table = std::decay_t<decltype(table)>;
    const unsigned blocks = (table.num_tensors + kThreads - 1) / kThreads;
    Launch(CountStepsKernel<Table>, blocks, execution.stream, table, args.mix, args.options,
           args.bias_corrections);
  });
}

template <typename T, bool kHasY>
struct AdamFunctor {
  // Without y the last list is left out of the table.
  enum List { kParams, kOldParams, kX, kExpAvg, kExpAvgSq, kY };
  static constexpr int kRead = 4 + kHasY;
  static constexpr bool kReverse = false;
  Mix mix;
  AdamOptions options;
  const BiasCorrections* bias_corrections;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    const T* old_params = chunk.template At<const T>(kOldParams);
    const T* x = chunk.template At<const T>(kX);
    T* exp_avg = chunk.template At<T>(kExpAvg);
    T* exp_avg_sq = chunk.template At<T>(kExpAvgSq);
    const T* y = kHasY ? chunk.template At<const T>(kY) : x;
    const int64_t tensor = chunk.TensorInWholeList();
    const AdamScalars scalars = AdamScalarsOf(options, bias_corrections[tensor]);
    const bool decays_gradient = DecaysGradient(options);
    const MixScalars of_mix = MixScalarsOf(mix, tensor);
    const unsigned misalignment = Misalignment(params, old_params, x, exp_avg, exp_avg_sq, y);
    // The next forward pass reads the weights; all else has time.
    if (IsSkipped(mix)) {
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
      loaded.of[1] = Load<width, kStreaming>(x + i);
      loaded.of[2] = Load<width, kStreaming>(exp_avg + i);
      loaded.of[3] = Load<width, kStreaming>(exp_avg_sq + i);
      if constexpr (kHasY) loaded.of[4] = Load<width, kStreaming>(y + i);
      return loaded;
    };
    ForEachVector<T, 1>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      auto w = loaded.of[0];
      const auto& xs = loaded.of[1];
      auto m = loaded.of[2];
      auto v = loaded.of[3];
      const auto& ys = loaded.of[kHasY ? 4 : 1];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float u =
            Mixed<kHasY>(mix.function, of_mix, ToFloat(xs.lane[j]), ToFloat(ys.lane[j]));
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

template <typename T>
constexpr int kMinResidentBlocks<AdamFunctor<T, true>> = sizeof(T) == 2 ? 1024 / kThreads : 0;

void Adam(const AdamArgs& args, const Execution& execution) {
  CountSteps(args, execution);
  const Mix& mix = args.mix;
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    const auto apply = [&](auto has_y, const auto&... y) {
      const ReadOnlyList lists[] = {args.params,  args.old_params, mix.x,
                                    args.exp_avg, args.exp_avg_sq, y...};
      const AdamFunctor<decltype(zero), has_y> functor = {mix, args.options, args.bias_corrections};
      MultiTensorApply(args.tensors, lists, functor, execution.stream);
    };
    mix.y ? apply(std::true_type(), mix.y) : apply(std::false_type());
  });
}

}  // namespace samkernels::cuda
