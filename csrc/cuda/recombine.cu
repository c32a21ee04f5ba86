#include "cuda_ops.h"
#include "recombine.cuh"

namespace samkernels::cuda {

template <typename T, bool kSigned>
struct RecombineFunctor {
  // Without signs the last list is the magnitude's again, and is not read.
  enum List { kMagnitude, kOut, kSign, kLists };
  static constexpr int kRead = 1 + kSigned;
  static constexpr bool kReverse = false;
  Recombination recombination;

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    const T* magnitude = chunk.template At<const T>(kMagnitude);
    const T* sign = chunk.template At<const T>(kSign);
    T* out = chunk.template At<T>(kOut);
    const bool skipped = IsSkipped(recombination);
    const bool has_coefficient = HasCoefficient(recombination);
    const float coefficient = Coefficient(recombination, chunk.TensorInWholeList());
    const unsigned misalignment = Misalignment(magnitude, sign, out);
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width>(magnitude + i);
      if constexpr (kSigned) loaded.of[1] = Load<width>(sign + i);
      return loaded;
    };
    ForEachVector<T, 2>(chunk.n, misalignment, load, [&](int i, const auto& loaded, auto width) {
      const auto& magnitudes = loaded.of[0];
      const auto& signs = loaded.of[kSigned];
      auto u = magnitudes;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float value = Recombined<kSigned>(ToFloat(magnitudes.lane[j]), ToFloat(signs.lane[j]),
                                                coefficient, has_coefficient);
        u.lane[j] = FromFloat<T>(skipped ? 0.0f : value);
      }
      Store<width>(out + i, u);
    });
  }
};

void Recombine(const RecombineArgs& args, const Execution& execution) {
  const Recombination& r = args.recombination;
  const ReadOnlyList lists[] = {r.magnitude, args.out, r.sign ? r.sign : r.magnitude};
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    DispatchSigned(r, [&](auto is_signed) {
      MultiTensorApply(args.tensors, lists, RecombineFunctor<decltype(zero), is_signed>{r},
                       execution.stream);
    });
  });
}

}  // namespace samkernels::cuda
