#include "../op_functions.h"
#include "../update_math.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace samkernels::cuda {

// Its lists are x, y, z, as many as there are; the weights take the place of y if kWeighted.
template <typename T, int kLists, bool kWeighted>
struct DotsFunctor {
  static constexpr int kSums = NumDots(kLists, kWeighted);
  static constexpr int kRead = kLists + kWeighted;
  // Of three lists in half precision a vector has eight lanes: of two, fewer warps would have their
  // registers.
  static constexpr int kUnroll = kRead == 1 ? 4 : kRead == 3 && sizeof(T) == 2 ? 1 : 2;
  float eta;

  template <typename ChunkT>
  __device__ void accumulate(const ChunkT& chunk, double (&sums)[kSums]) const {
    const T* x = chunk.template At<const T>(0);
    const T* y = kRead > 1 ? chunk.template At<const T>(1) : x;
    const T* z = kRead > 2 ? chunk.template At<const T>(2) : x;
    int y_larger = 0;
    int signs_agree = 0;
    // Perturb reads the direction and the weights next.
    const auto load = [&](int i, auto width) {
      Loaded<T, width, kRead> loaded;
      loaded.of[0] = Load<width>(x + i);
      if constexpr (kRead > 1) loaded.of[1] = Load<width>(y + i);
      if constexpr (kRead > 2) loaded.of[2] = Load<width>(z + i);
      return loaded;
    };
    ForEachVector<T, kUnroll>(chunk.n, Misalignment(x, y, z), load,
                              [&](int, const auto& loaded, auto width) {
#pragma unroll
                                for (int j = 0; j < width; ++j) {
                                  const float a = ToFloat(loaded.of[0].lane[j]);
                                  const float b = ToFloat(loaded.of[kRead > 1].lane[j]);
                                  if constexpr (kWeighted) {
                                    const float scaled = WeightScale(b, eta) * a;
                                    sums[0] = AddProduct(sums[0], scaled, scaled);
                                  }
                                  sums[kWeighted] = AddProduct(sums[kWeighted], a, a);
                                  if constexpr (kLists > 1) {
                                    sums[1] = AddProduct(sums[1], a, b);
                                    sums[2] = AddProduct(sums[2], b, b);
                                  }
                                  if constexpr (kLists > 2) {
                                    const float c = ToFloat(loaded.of[2].lane[j]);
                                    sums[3] = AddProduct(sums[3], c, c);
                                    y_larger += fabsf(b) > fabsf(a);
                                    signs_agree += (a > 0.0f && b > 0.0f) || (a < 0.0f && b < 0.0f);
                                  }
                                }
                              });
    if constexpr (kLists > 2) {
      sums[4] += y_larger;
      sums[5] += signs_agree;
    }
  }
};

void Dots(const DotsArgs& args, const Execution& execution) {
  const ReadOnlyList x = args.lists[0], y = args.lists[1], z = args.lists[2];
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto reduce = [&](auto functor, const auto&... lists) {
      const ReadOnlyList all[] = {lists...};
      Reduce(args.tensors, all, functor, args, execution.stream);
    };
    if (args.weights) {
      reduce(DotsFunctor<T, 1, true>{args.eta}, x, args.weights);
    } else if (z) {
      reduce(DotsFunctor<T, 3, false>{}, x, y, z);
    } else if (y) {
      reduce(DotsFunctor<T, 2, false>{}, x, y);
    } else {
      reduce(DotsFunctor<T, 1, false>{}, x);
    }
  });
}

}  // namespace samkernels::cuda
