#include "../update_math.h"
#include "cuda_ops.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace samkernels::cuda {

// Lists: g1, g2, w.
template <typename T>
struct CompareFunctor {
  static constexpr int kSums = kCompareSums;
  double* sums_out;
  float* per_tensor;
  float* total;

  template <typename ChunkT>
  __device__ void accumulate(const ChunkT& chunk, double (&sums)[kSums]) const {
    const T* first = chunk.template At<const T>(0);
    const T* second = chunk.template At<const T>(1);
    const T* weights = chunk.template At<const T>(2);
    const unsigned misalignment = Misalignment(first, second, weights);
    int second_larger = 0;
    int signs_agree = 0;
    const auto load = [&](int i, auto width) {
      return Loaded<T, width, 3>{
          {Load<width>(first + i), Load<width>(second + i), Load<width>(weights + i)}};
    };
    // Of half precision a vector has eight lanes: of two, fewer warps would have their registers.
    constexpr int kUnroll = sizeof(T) == 4 ? 2 : 1;
    ForEachVector<T, kUnroll>(chunk.n, misalignment, load,
                              [&](int, const auto& loaded, auto width) {
#pragma unroll
                                for (int j = 0; j < width; ++j) {
                                  const float a = ToFloat(loaded.of[0].lane[j]);
                                  const float b = ToFloat(loaded.of[1].lane[j]);
                                  sums[0] = AddProduct(sums[0], a, a);
                                  sums[1] = AddProduct(sums[1], b, b);
                                  sums[2] = AddProduct(sums[2], a, b);
                                  second_larger += fabsf(b) > fabsf(a);
                                  signs_agree += (a > 0.0f && b > 0.0f) || (a < 0.0f && b < 0.0f);
                                  const float w = ToFloat(loaded.of[2].lane[j]);
                                  sums[5] = AddProduct(sums[5], w, w);
                                }
                              });
    sums[3] += second_larger;
    sums[4] += signs_agree;
  }

  __device__ void finish_tensor(int64_t tensor, const double (&sums)[kSums]) const {
    per_tensor[tensor] = static_cast<float>(sqrt(sums[kSecondSquares]));
  }

  __device__ void finish_total(const double (&sums)[kSums]) const {
    for (int k = 0; k < kSums; ++k) sums_out[k] = sums[k];
    *total = static_cast<float>(sqrt(sums[kSecondSquares]));
  }
};

void Compare(const CompareArgs& args, const Execution& execution) {
  const ReadOnlyList lists[] = {args.first_grads, args.second_grads, args.weights};
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    Reduce(args.tensors, lists,
           CompareFunctor<decltype(zero)>{args.sums, args.per_tensor, args.total}, args.workspace,
           execution.stream);
  });
}

}  // namespace samkernels::cuda
