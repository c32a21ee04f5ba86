#include "../op_functions.h"
#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T, bool kHasY>
struct MixFunctor {
  // Without y the last list is x again, and is not read.
  enum List { kX, kOut, kY, kLists };
  static constexpr int kRead = 1 + kHasY;
  static constexpr bool kReverse = false;
  Mix mix;
  bool keeps;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    const T* x = chunk.template At<const T>(kX);
    const T* y = chunk.template At<const T>(kY);
    T* out = chunk.template At<T>(kOut);
    const bool skipped = IsSkipped(mix);
    if (skipped && keeps) return;
    const MixScalars scalars = MixScalarsOf(mix, chunk.TensorInWholeList());
    const unsigned misalignment = Misalignment(x, y, out);
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width>(x + i);
      if constexpr (kHasY) loaded.of[1] = Load<width>(y + i);
      return loaded;
    };
    ForEachVector<T, 2>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      const auto& xs = loaded.of[0];
      const auto& ys = loaded.of[kHasY];
      auto u = xs;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float value =
            Mixed<kHasY>(mix.function, scalars, ToFloat(xs.lane[j]), ToFloat(ys.lane[j]));
        u.lane[j] = FromFloat<T>(skipped ? 0.0f : value);
      }
      Store<width>(out + i, u);
    });
  }
};

void MixLists(const MixArgs& args, const Execution& execution) {
  const Mix& mix = args.mix;
  const ReadOnlyList lists[] = {mix.x, args.out, mix.y ? mix.y : mix.x};
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    const auto apply = [&](auto has_y) {
      MultiTensorApply(args.tensors, lists, MixFunctor<decltype(zero), has_y>{mix, args.keeps},
                       execution.stream);
    };
    mix.y ? apply(std::true_type()) : apply(std::false_type());
  });
}

}  // namespace samkernels::cuda
