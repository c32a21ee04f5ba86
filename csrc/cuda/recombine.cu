#include "cuda_ops.h"
#include "recombine.cuh"

namespace samkernels::cuda {

template <typename T, bool kSigned>
struct RecombineFunctor {
  // Without signs the last list is the magnitude's again, and is not read.
  enum List { kMagnitude, kOut, kSign, kLists };
  Recombination recombination;

  __device__ void operator()(const Chunk<kLists>& chunk) const {
    const T* magnitude = chunk.template At<const T>(kMagnitude);
    const T* sign = chunk.template At<const T>(kSign);
    T* out = chunk.template At<T>(kOut);
    const bool skipped = IsSkipped(recombination);
    const bool is_scaled = recombination.numerator != nullptr;
    const float coefficient = Coefficient(recombination, chunk.TensorInWholeList());
    const bool aligned = IsAligned(magnitude) && IsAligned(sign) && IsAligned(out);
    ForEachVector<T>(chunk.n, aligned, [&](int i, auto width) {
      const auto magnitudes = Load<width>(magnitude + i);
      const auto signs = kSigned ? Load<width>(sign + i) : magnitudes;
      auto u = magnitudes;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float value = Recombined<kSigned>(ToFloat(magnitudes.lane[j]), ToFloat(signs.lane[j]),
                                                coefficient, is_scaled);
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
