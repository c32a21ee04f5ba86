#include <vector>

#include "../op_functions.h"
#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

// A block holds the means of this many elements at a time.
constexpr int kPart = kChunkSize < 8192 ? kChunkSize : 8192;

__device__ __forceinline__ int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kInit: the buffer holds nothing yet. Known to the compiler, since registers are scarce.
template <typename T, bool kHasBuffer, bool kInit>
struct SgdHessFunctor {
  // kCounts and kStrides are numbers. The buffer comes last: it may not be there, and is left out
  // of the table then.
  enum List { kParams, kGrads, kProducts, kCounts, kStrides, kBuffer };
  static constexpr bool kIsRunning = kHasBuffer && !kInit;
  static constexpr int kRead = 3 + kIsRunning;
  static constexpr bool kReverse = false;
  // Of half precision a vector has eight lanes: of two, fewer warps would have their registers.
  static constexpr int kUnroll = sizeof(T) == 4 ? 2 : 1;
  SgdOptions options;
  Scalar rho;

  // Holds where a part of a tensor begins in each list.
  struct Addresses {
    T* params;
    const T* grads;
    const T* products;
    T* buffer;  // params if there is none

    __device__ Addresses operator+(int64_t i) const {
      return {params + i, grads + i, products + i, buffer + i};
    }
    __device__ unsigned Misalignment() const {
      return cuda::Misalignment(params, grads, products, buffer);
    }
  };

  // w, g, the buffer, and Hv if kWithProduct. The next forward pass reads the weights; all else has
  // time.
  template <int kWidth, bool kWithProduct>
  __device__ __forceinline__ Loaded<T, kWidth, kRead> LoadAll(const Addresses& at) const {
    Loaded<T, kWidth, kRead> loaded;
    loaded.of[0] = Load<kWidth>(at.params);
    loaded.of[1] = Load<kWidth, kStreaming>(at.grads);
    if constexpr (kWithProduct) loaded.of[2] = Load<kWidth, kStreaming>(at.products);
    if constexpr (kIsRunning) loaded.of[kRead - 1] = Load<kWidth, kStreaming>(at.buffer);
    return loaded;
  }

  // d(j): D of lane j; called once for each, in their order.
  template <int kWidth, typename D>
  __device__ __forceinline__ void Update(const Addresses& at, const SgdScalars& scalars, float rho_,
                                         const Loaded<T, kWidth, kRead>& loaded, D&& d) const {
    auto w = loaded.of[0];
    SgdOptions known = options;
    known.init_momentum = kInit;
    auto buf = loaded.of[kRead - 1];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float u = ScaledByCurvature(ToFloat(loaded.of[1].lane[j]), rho_, d(j));
      float b = kIsRunning ? ToFloat(buf.lane[j]) : 0.0f;
      w.lane[j] = FromFloat<T>(SgdUpdated<kHasBuffer>(known, scalars, ToFloat(w.lane[j]), u, b));
      buf.lane[j] = FromFloat<T>(b);
    }
    Store<kWidth>(at.params, w);
    if constexpr (kHasBuffer) Store<kWidth, kStreaming>(at.buffer, buf);
  }

  template <typename ChunkT>
  __device__ void operator()(const ChunkT& chunk) const {
    const Positions positions = {chunk.Number(kCounts), chunk.Number(kStrides)};
    T* params = chunk.template At<T>(kParams);
    const Addresses at = {params, chunk.template At<const T>(kGrads),
                          chunk.template At<const T>(kProducts),
                          kHasBuffer ? chunk.template At<T>(kBuffer) : params};
    constexpr int kWide = 16 / sizeof(T);
    if (positions.count == 1) {
      OneByOne(at, chunk.n);
    } else if (positions.stride == 1 && positions.count <= kPart) {
      SideBySide(chunk, at, static_cast<int>(positions.count));
    } else if (at.Misalignment() == 0 && positions.stride % kWide == 0) {
      ByColumns<kWide>(chunk, at, positions);
    } else {
      ByColumns<1>(chunk, at, positions);
    }
  }

  __device__ __forceinline__ void OneByOne(const Addresses& at, int n) const {
    const SgdScalars scalars = SgdScalarsOf(options);
    const float rho_ = Read(rho);
    const auto load = [&](int i, auto width) { return LoadAll<width, true>(at + i); };
    ForEachVector<T, kUnroll>(
        n, at.Misalignment(), load, [&](int i, const auto& loaded, auto width) {
          const auto d = [&](int j) { return fabsf(ToFloat(loaded.of[2].lane[j])); };
          Update<width>(at + i, scalars, rho_, loaded, d);
        });
  }

  // The positions of a kernel side by side in memory. Means are made first, by one thread each;
  // those at the ends of a chunk are made by its neighbours too.
  template <typename ChunkT>
  __device__ __forceinline__ void SideBySide(const ChunkT& chunk, const Addresses& of_chunk,
                                             int count) const {
    __shared__ Shared<float[kPart / 2 + 2]> means;
    const SgdScalars scalars = SgdScalarsOf(options);
    const float rho_ = Read(rho);
    for (int part = 0; part < chunk.n; part += kPart) {
      const Addresses at = of_chunk + part;
      const int n = chunk.n - part < kPart ? chunk.n - part : kPart;
      // How many elements of the first kernel lie before this part.
      const int before = static_cast<int>((chunk.begin + part) % count);
      const T* first = at.products - before;
      for (int i = threadIdx.x; i * count < before + n; i += kThreads) {
        float sum = 0.0f;
        for (int p = 0; p < count; ++p) {
          sum += fabsf(ToFloat(Load<1>(first + i * count + p).lane[0]));
        }
        means[i] = sum / static_cast<float>(count);
      }
      __syncthreads();
      const auto load = [&](int i, auto width) { return LoadAll<width, false>(at + i); };
      ForEachVector<T, kUnroll>(n, at.Misalignment(), load,
                                [&](int i, const auto& loaded, auto width) {
                                  int mean = (before + i) / count;
                                  int position = (before + i) % count;
                                  const auto d = [&](int) {
                                    const float d_of_lane = means[mean];
                                    if (++position == count) {
                                      position = 0;
                                      ++mean;
                                    }
                                    return d_of_lane;
                                  };
                                  Update<width>(at + i, scalars, rho_, loaded, d);
                                });
      __syncthreads();  // before the next means
    }
  }

  // Positions apart from each other, as in channels_last: a thread has kWidth neighbouring columns,
  // which it sums, then updates. A chunk has the columns whose number times their length lies in
  // it.
  template <int kWidth, typename ChunkT>
  __device__ __forceinline__ void ByColumns(const ChunkT& chunk, const Addresses& of_chunk,
                                            Positions positions) const {
    const SgdScalars scalars = SgdScalarsOf(options);
    const float rho_ = Read(rho);
    const int64_t length = kWidth * positions.count;
    const int64_t first = CeilDiv(chunk.begin, length);
    const int vectors = static_cast<int>(CeilDiv(chunk.begin + chunk.n, length) - first);
    const int64_t slice = first * kWidth / positions.stride;
    const unsigned stride = static_cast<unsigned>(positions.stride);
    const unsigned before = static_cast<unsigned>(first * kWidth - slice * positions.stride);
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      const unsigned column = before + i * kWidth;
      const int64_t start = (slice + column / stride) * positions.count * stride + column % stride;
      const Addresses at = of_chunk + (start - chunk.begin);
      float d[kWidth] = {};
      LoadsFirst<kWidth == 1 ? 8 : 2>(
          int64_t{0}, positions.count, 1,
          [&](int64_t p) { return Load<kWidth, kStreaming>(at.products + p * positions.stride); },
          [&](int64_t, const auto& products) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) d[j] += fabsf(ToFloat(products.lane[j]));
          });
#pragma unroll
      for (int j = 0; j < kWidth; ++j) d[j] /= static_cast<float>(positions.count);
      LoadsFirst<kWidth == 1 ? 4 : 1>(
          int64_t{0}, positions.count, 1,
          [&](int64_t p) { return LoadAll<kWidth, false>(at + p * positions.stride); },
          [&](int64_t p, const auto& loaded) {
            Update<kWidth>(at + p * positions.stride, scalars, rho_, loaded,
                           [&](int j) { return d[j]; });
          });
    }
  }
};

template <typename T, bool kHasBuffer, bool kInit>
static void SgdHessOf(const SgdHessArgs& args, const Execution& execution) {
  const SgdHessFunctor<T, kHasBuffer, kInit> functor = {args.options, args.rho};
  // The table of addresses takes numbers along.
  static_assert(sizeof(void*) == sizeof(int64_t), "an address has room for a number");
  std::vector<const void*> counts, strides;
  for (int64_t i = 0; i < args.tensors.num_tensors; ++i) {
    counts.push_back(reinterpret_cast<const void*>(args.positions[i].count));
    strides.push_back(reinterpret_cast<const void*>(args.positions[i].stride));
  }
  if constexpr (kHasBuffer) {
    const ReadOnlyList lists[] = {args.params,   args.grads,     args.hessian_products,
                                  counts.data(), strides.data(), args.momentum_buffer};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  } else {
    const ReadOnlyList lists[] = {args.params, args.grads, args.hessian_products, counts.data(),
                                  strides.data()};
    MultiTensorApply(args.tensors, lists, functor, execution.stream);
  }
}

void SgdHess(const SgdHessArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!args.options.has_momentum) return SgdHessOf<T, false, false>(args, execution);
    if (args.options.init_momentum) return SgdHessOf<T, true, true>(args, execution);
    SgdHessOf<T, true, false>(args, execution);
  });
}

}  // namespace samkernels::cuda
