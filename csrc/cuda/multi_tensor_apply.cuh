// The one launcher: a kernel over a list of tensors, whose table travels in the kernel's
// parameters. So a launch needs no copy to the device and no memory there.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

namespace samkernels::cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunkSize = 8192;

#if CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif
// Room for what a kernel takes beside the table.
constexpr int kOtherBytes = 256;

// The part of a list of tensors that one launch works on. Block b works on chunk b.
template <int kLists>
struct TensorTable {
  static constexpr int kCapacity =
      (kParameterBytes - kOtherBytes) / (kLists * 8 + sizeof(int64_t) + sizeof(int32_t));

  const void* address[kLists][kCapacity];
  int64_t numel[kCapacity];
  int32_t first_chunk[kCapacity + 1];  // counted from 0 in each launch
  int32_t num_tensors;
  int64_t first_tensor;  // index of tensor 0 in the whole list

  __device__ int TensorOfChunk(int chunk) const {
    int low = 0;
    int high = num_tensors;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Elements begin .. begin + n - 1 of a tensor in every list.
template <int kLists>
struct Chunk {
  const TensorTable<kLists>& table;
  int tensor;
  int64_t begin;
  int n;

  __device__ Chunk(const TensorTable<kLists>& table, int chunk)
      : table(table), tensor(table.TensorOfChunk(chunk)) {
    begin = (chunk - table.first_chunk[tensor]) * kChunkSize;
    const int64_t rest = table.numel[tensor] - begin;
    n = static_cast<int>(rest < kChunkSize ? rest : kChunkSize);
  }

  template <typename T>
  __device__ T* At(int list) const {
    return static_cast<T*>(const_cast<void*>(table.address[list][tensor])) + begin;
  }

  __device__ int64_t TensorInWholeList() const { return table.first_tensor + tensor; }
};

inline void Check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

// Launches go through this function, not through <<<>>>, so that the host can stand in
// (csrc/emulation).
template <typename... Args>
void Launch(void (*kernel)(Args...), unsigned blocks, void* stream, const Args&... args) {
#ifdef SAMKERNELS_EMULATED
  (void)stream;
  emulation::Launch(kernel, blocks, kThreads, args...);
#else
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  Check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads),
                         parameters, 0, static_cast<cudaStream_t>(stream)));
#endif
}

// launch(table, num_chunks, first_chunk, is_last) for as many tables as the list needs; at least
// one.
template <int kLists, typename LaunchTable>
void ForEachTable(const Tensors& tensors, const void* const* const (&lists)[kLists],
                  const LaunchTable& launch) {
  TensorTable<kLists> table;
  int64_t first = 0;
  do {
    const int64_t left = tensors.num_tensors - first;
    const int count = static_cast<int>(left < table.kCapacity ? left : table.kCapacity);
    table.num_tensors = count;
    table.first_tensor = first;
    for (int i = 0; i < count; ++i) {
      for (int list = 0; list < kLists; ++list) table.address[list][i] = lists[list][first + i];
      table.numel[i] = tensors.numel[first + i];
      table.first_chunk[i] =
          static_cast<int32_t>(tensors.first_chunk[first + i] - tensors.first_chunk[first]);
    }
    const int64_t num_chunks = tensors.first_chunk[first + count] - tensors.first_chunk[first];
    if (num_chunks > INT32_MAX) throw std::length_error("more than 2^44 elements in one launch");
    table.first_chunk[count] = static_cast<int32_t>(num_chunks);
    launch(table, static_cast<unsigned>(num_chunks), tensors.first_chunk[first],
           first + count == tensors.num_tensors);
    first += count;
  } while (first < tensors.num_tensors);
}

template <typename Functor, int kLists>
__global__ void __launch_bounds__(kThreads)
    MultiTensorApplyKernel(const __grid_constant__ TensorTable<kLists> table,
                           const __grid_constant__ Functor functor) {
  functor(Chunk<kLists>(table, blockIdx.x));
}

// functor(chunk) on one block per chunk.
template <typename Functor, int kLists>
void MultiTensorApply(const Tensors& tensors, const void* const* const (&lists)[kLists],
                      const Functor& functor, void* stream) {
  static_assert(sizeof(Functor) + 64 <= kOtherBytes, "the functor does not fit beside the table");
  ForEachTable<kLists>(
      tensors, lists, [&](const TensorTable<kLists>& table, unsigned num_chunks, int64_t, bool) {
        if (num_chunks > 0)
          Launch(MultiTensorApplyKernel<Functor, kLists>, num_chunks, stream, table, functor);
      });
}

}  // namespace samkernels::cuda
