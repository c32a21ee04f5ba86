#include "../op_functions.h"
#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

template <typename T, bool kHasY, bool kHasBuffer>
struct SgdFunctor {
  // The lists that are not there (y, a buffer) come last and are left out of the table.
  enum List { kParams, kOldParams, kX, kOptional };
  static constexpr int kY = kOptional;
  static constexpr int kBuffer = kOptional + kHasY;
  static constexpr int kRead = 2 + kHasY + kHasBuffer;
  static constexpr bool kReverse = false;
  Mix mix;
  SgdOptions options;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    const T* old_params = chunk.template At<const T>(kOldParams);
    const T* x = chunk.template At<const T>(kX);
    const T* y = kHasY ? chunk.template At<const T>(kY) : x;
    T* buffer = kHasBuffer ? chunk.template At<T>(kBuffer) : params;
    const SgdScalars scalars = SgdScalarsOf(options);
    const bool skipped = IsSkipped(mix);
    const MixScalars of_mix = MixScalarsOf(mix, chunk.TensorInWholeList());
    const unsigned misalignment = Misalignment(params, old_params, x, y, buffer);
    // The next forward pass reads the weights; all else has time.
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width, kStreaming>(old_params + i);
      loaded.of[1] = Load<width, kStreaming>(x + i);
      if constexpr (kHasY) loaded.of[2] = Load<width, kStreaming>(y + i);
      if constexpr (kHasBuffer) loaded.of[kRead - 1] = Load<width, kStreaming>(buffer + i);
      return loaded;
    };
    // Of half precision a vector has eight lanes: of two, fewer warps would have their registers.
    constexpr int kUnroll = kRead == 4 && sizeof(T) == 2 ? 1 : 2;
    ForEachVector<T, kUnroll>(
        chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
          auto w = loaded.of[0];
          const auto& xs = loaded.of[1];
          const auto& ys = loaded.of[1 + kHasY];
          auto buf = loaded.of[kRead - 1];
#pragma unroll
          for (int j = 0; j < width; ++j) {
            const float u =
                Mixed<kHasY>(mix.function, of_mix, ToFloat(xs.lane[j]), ToFloat(ys.lane[j]));
            float b = ToFloat(buf.lane[j]);
            const float updated =
                SgdUpdated<kHasBuffer>(options, scalars, ToFloat(w.lane[j]), u, b);
            if (!skipped) w.lane[j] = FromFloat<T>(updated);
            if (!skipped || options.init_momentum) buf.lane[j] = FromFloat<T>(skipped ? 0.0f : b);
          }
          Store<width>(params + i, w);
          if constexpr (kHasBuffer) Store<width, kStreaming>(buffer + i, buf);
        });
  }
};

void Sgd(const SgdArgs& args, const Execution& execution) {
  const Mix& mix = args.mix;
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto apply = [&](auto has_y, auto has_buffer, const auto&... optional) {
      const ReadOnlyList lists[] = {args.params, args.old_params, mix.x, optional...};
      const SgdFunctor<T, has_y, has_buffer> functor = {mix, args.options};
      MultiTensorApply(args.tensors, lists, functor, execution.stream);
    };
    const auto with = [&](auto has_y, const auto&... y) {
      args.options.has_momentum ? apply(has_y, std::true_type(), y..., args.momentum_buffer)
                                : apply(has_y, std::false_type(), y...);
    };
    mix.y ? with(std::true_type(), mix.y) : with(std::false_type());
  });
}

}  // namespace samkernels::cuda
