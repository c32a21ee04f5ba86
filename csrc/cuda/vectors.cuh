// Loads and stores 16 bytes at a time where all addresses allow it, 4 or single elements elsewhere,
// with several accesses in flight; and names the dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../ops.h"
#include "multi_tensor_apply.cuh"

namespace samkernels::cuda {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T lane[kWidth];
};

// Holds what a thread loads of kLists lists before it uses any of it.
template <typename T, int kWidth, int kLists>
struct Loaded {
  Vector<T, kWidth> of[kLists];
};

// kStreaming: not read again before it would have left the cache anyway; what is may stay there.
enum Cache { kKeep, kStreaming };

template <int kWidth, Cache kCache = kKeep, typename T>
__device__ __forceinline__ Vector<T, kWidth> Load(const T* from) {
  using V = Vector<T, kWidth>;
#ifdef SAMKERNELS_EMULATED
  emulation::traffic.read += sizeof(V);
#endif
  if constexpr (SAMKERNELS_STREAMING && kCache == kStreaming && sizeof(V) == sizeof(int4)) {
    const int4 bits = __ldcs(reinterpret_cast<const int4*>(from));
    V vector;
    memcpy(&vector, &bits, sizeof(V));
    return vector;
  }
  return *reinterpret_cast<const V*>(from);
}

template <int kWidth, Cache kCache = kKeep, typename T>
__device__ __forceinline__ void Store(T* to, const Vector<T, kWidth>& vector) {
  using V = Vector<T, kWidth>;
#ifdef SAMKERNELS_EMULATED
  emulation::traffic.written += sizeof(V);
#endif
  if constexpr (SAMKERNELS_STREAMING && kCache == kStreaming && sizeof(V) == sizeof(int4)) {
    int4 bits;
    memcpy(&bits, &vector, sizeof(V));
    __stcs(reinterpret_cast<int4*>(to), bits);
    return;
  }
  *reinterpret_cast<V*>(to) = vector;
}

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T FromFloat(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Returns how far addresses are behind multiples of 16, together: 0 if none is; a multiple of 4 if
// all are.
template <typename... T>
__device__ __forceinline__ unsigned Misalignment(const T*... addresses) {
  return (static_cast<unsigned>(reinterpret_cast<uintptr_t>(addresses) % 16) | ...);
}

// Stands for std::integral_constant in device code.
template <int kWidth>
struct Width {
  __host__ __device__ constexpr operator int() const { return kWidth; }
};

// Calls use(i, load(i)) for i = first, first + step, .., below end. kUnroll loads are made before
// the first one is used.
template <int kUnroll, typename Index, typename LoadAt, typename Use>
__device__ __forceinline__ void LoadsFirst(Index first, Index end, int step, const LoadAt& load,
                                           const Use& use) {
  Index i = first;
#pragma unroll 1
  for (; i + (kUnroll - 1) * step < end; i += kUnroll * step) {
    decltype(load(i)) loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) loaded[k] = load(i + k * step);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) use(i + k * step, loaded[k]);
  }
#pragma unroll 1
  for (; i < end; i += step) use(i, load(i));
}

// Calls use(i, load(i, Width<w>()), Width<w>()) for elements i .. i + w - 1, for all elements of a
// chunk, each one once and by one thread. kUnroll vectors of each list are in flight; where a list
// is misaligned they are of 4 bytes, or of the 2 of one element, but as many as fit in the
// registers.
template <typename T, int kUnroll, typename LoadLists, typename Use>
__device__ __forceinline__ void ForEachVector(int n, unsigned misalignment, const LoadLists& load,
                                              const Use& use) {
  constexpr int kLists = sizeof(decltype(load(0, Width<1>()))) / sizeof(T);
  constexpr int kNarrowUnroll = kUnroll == 1 || kLists > 3 ? 4 : 8;
  int done = 0;
  const auto in_vectors_of = [&](auto width, auto unroll) {
    LoadsFirst<unroll>(
        done + static_cast<int>(threadIdx.x) * width, n - (width - 1), kThreads * width,
        [&](int i) { return load(i, width); },
        [&](int i, const auto& loaded) { use(i, loaded, width); });
    done = n / width * width;
  };
  if (misalignment == 0) {
    in_vectors_of(Width<16 / sizeof(T)>(), Width<kUnroll>());
  } else if constexpr (sizeof(T) < 4) {
    if (misalignment % 4 == 0) in_vectors_of(Width<4 / sizeof(T)>(), Width<kNarrowUnroll>());
  }
  in_vectors_of(Width<1>(), Width<kNarrowUnroll>());
}

// Calls f(T{}) with the C++ type of `dtype`.
template <typename F>
void DispatchDType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat16:
      return f(__half{});
  }
}

}  // namespace samkernels::cuda
