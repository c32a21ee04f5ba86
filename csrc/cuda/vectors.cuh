// Loads and stores of 16 bytes where all addresses allow it, of single elements elsewhere; and the
// dtypes.
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

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void Store(T* to, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
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

// body(i, Width<w>): elements i .. i + w - 1, for all elements of a chunk, each one once and by one
// thread.
template <typename T, typename Body>
__device__ __forceinline__ void ForEachVector(int n, bool aligned, const Body& body) {
  constexpr int kWidth = 16 / sizeof(T);
  const int thread = threadIdx.x;
  if (aligned) {
    const int vectors = n / kWidth;
    for (int i = thread; i < vectors; i += kThreads) body(i * kWidth, Width<kWidth>());
    const int done = vectors * kWidth;
    if (thread < n - done) body(done + thread, Width<1>());
  } else {
    for (int i = thread; i < n; i += kThreads) body(i, Width<1>());
  }
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
