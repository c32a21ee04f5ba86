// Loads and stores of 16 bytes where all addresses allow it, of single elements elsewhere, several
// of them in flight; and the dtypes.
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

// What a thread loads of kLists lists before it uses any of it.
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

template <typename T>
__device__ __forceinline__ bool IsAligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// std::integral_constant, for device code.
template <int kWidth>
struct Width {
  __host__ __device__ constexpr operator int() const { return kWidth; }
};

// use(i, load(i, Width<w>()), Width<w>()): elements i .. i + w - 1, for all elements of a chunk,
// each one once and by one thread. kUnroll vectors of each list are loaded before the first one is
// used.
template <typename T, int kUnroll, typename LoadLists, typename Use>
__device__ __forceinline__ void ForEachVector(int n, bool aligned, const LoadLists& load,
                                              const Use& use) {
  using Wide = Width<16 / sizeof(T)>;
  using Narrow = Width<1>;
  int single = threadIdx.x;
  if (aligned) {
    const int vectors = n / Wide();
    int i = threadIdx.x;
    for (; i + (kUnroll - 1) * kThreads < vectors; i += kUnroll * kThreads) {
      decltype(load(0, Wide())) loaded[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) loaded[k] = load((i + k * kThreads) * Wide(), Wide());
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) use((i + k * kThreads) * Wide(), loaded[k], Wide());
    }
    for (; i < vectors; i += kThreads) use(i * Wide(), load(i * Wide(), Wide()), Wide());
    single += vectors * Wide();
  }
  for (; single < n; single += kThreads) use(single, load(single, Narrow()), Narrow());
}

// f(T{}) with the C++ type of `dtype`.
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
