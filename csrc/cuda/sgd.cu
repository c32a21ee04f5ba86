#include "cuda_ops.h"
#include "recombine.cuh"

namespace samkernels::cuda {

template <typename T, bool kSigned, Momentum kMomentum>
struct SgdFunctor {
  // The lists that are not there (a sign, a buffer) come last and are left out of the table.
  enum List { kParams, kOldParams, kMagnitude, kOptional };
  static constexpr bool kHasBuffer = kMomentum != Momentum::kNone;
  static constexpr bool kIsRunning = kMomentum == Momentum::kRunning;
  static constexpr int kSign = kOptional;
  static constexpr int kBuffer = kOptional + kSigned;
  static constexpr int kLists = kOptional + kSigned + kHasBuffer;
  static constexpr int kRead = 2 + kSigned + kIsRunning;
  static constexpr bool kReverse = false;
  Recombination recombination;
  SgdOptions options;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    T* params = chunk.template At<T>(kParams);
    const T* old_params = chunk.template At<const T>(kOldParams);
    const T* magnitude = chunk.template At<const T>(kMagnitude);
    const T* sign = kSigned ? chunk.template At<const T>(kSign) : magnitude;
    T* buffer = kHasBuffer ? chunk.template At<T>(kBuffer) : params;
    const float lr = Read(options.lr);
    const bool skipped = IsSkipped(recombination);
    const bool has_coefficient = HasCoefficient(recombination);
    const float coefficient = Coefficient(recombination, chunk.TensorInWholeList());
    const unsigned misalignment = Misalignment(params, old_params, magnitude, sign, buffer);
    // The next forward pass reads the weights; all else has time.
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width, kStreaming>(old_params + i);
      loaded.of[1] = Load<width, kStreaming>(magnitude + i);
      if constexpr (kSigned) loaded.of[2] = Load<width, kStreaming>(sign + i);
      if constexpr (kIsRunning) loaded.of[kRead - 1] = Load<width, kStreaming>(buffer + i);
      return loaded;
    };
    ForEachVector<T, 2>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      auto w = loaded.of[0];
      const auto& magnitudes = loaded.of[1];
      const auto& signs = loaded.of[1 + kSigned];
      auto buf = loaded.of[kIsRunning ? kRead - 1 : 1];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float u = Recombined<kSigned>(ToFloat(magnitudes.lane[j]), ToFloat(signs.lane[j]),
                                            coefficient, has_coefficient);
        float b = ToFloat(buf.lane[j]);
        const float updated = SgdUpdated<kMomentum>(options, lr, ToFloat(w.lane[j]), u, b);
        if (!skipped) {
          w.lane[j] = FromFloat<T>(updated);
          buf.lane[j] = FromFloat<T>(b);
        } else if (kMomentum == Momentum::kInit) {
          buf.lane[j] = FromFloat<T>(0.0f);
        }
      }
      Store<width>(params + i, w);
      if constexpr (kHasBuffer) Store<width, kStreaming>(buffer + i, buf);
    });
  }
};

template <typename T, bool kSigned, Momentum kMomentum>
static void SgdOf(const SgdArgs& args, const Execution& execution) {
  using Functor = SgdFunctor<T, kSigned, kMomentum>;
  const Recombination& r = args.recombination;
  const Functor functor = {r, args.options};
  if constexpr (kSigned && Functor::kHasBuffer) {
    const ReadOnlyList lists[] = {args.params, args.old_params, r.magnitude, r.sign,
                                  args.momentum_buffer};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  } else if constexpr (kSigned) {
    const ReadOnlyList lists[] = {args.params, args.old_params, r.magnitude, r.sign};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  } else if constexpr (Functor::kHasBuffer) {
    const ReadOnlyList lists[] = {args.params, args.old_params, r.magnitude, args.momentum_buffer};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  } else {
    const ReadOnlyList lists[] = {args.params, args.old_params, r.magnitude};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  }
}

void Sgd(const SgdArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchSigned(args.recombination, [&](auto is_signed) {
      switch (MomentumOf(args.options)) {
        case Momentum::kNone:
          return SgdOf<T, is_signed, Momentum::kNone>(args, execution);
        case Momentum::kInit:
          return SgdOf<T, is_signed, Momentum::kInit>(args, execution);
        case Momentum::kRunning:
          return SgdOf<T, is_signed, Momentum::kRunning>(args, execution);
      }
    });
  });
}

}  // namespace samkernels::cuda
