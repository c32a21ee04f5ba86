// Launches a kernel over a list of tensors, whose table travels in the kernel's parameters. So a
// launch needs no copy to the device and no memory there.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../ops.h"

namespace samkernels::cuda {

// bench/gpu/prepare.py builds variants of these.
#ifndef SAMKERNELS_THREADS
#define SAMKERNELS_THREADS 256
#endif
#ifndef SAMKERNELS_CHUNK_SIZE
#define SAMKERNELS_CHUNK_SIZE 8192
#endif
#ifndef SAMKERNELS_REVERSE_PERTURB
#define SAMKERNELS_REVERSE_PERTURB 1
#endif
#ifndef SAMKERNELS_STREAMING
#define SAMKERNELS_STREAMING 1
#endif

// Returns cudaSuccess if the build holds code that the current device can run.
cudaError_t KernelImageError();

constexpr int kThreads = SAMKERNELS_THREADS;
constexpr int64_t kChunkSize = SAMKERNELS_CHUNK_SIZE;

// Names what the threads of a block share: `__shared__ Shared<float[8]> sums;`. The emulation puts
// its own in place of it, which finds reads of what nobody wrote.
template <typename T>
using Shared = T;

// A launch carries its parameters to the device, so a short list travels in a small table.
constexpr int kSmallTableBytes = 4096;
#if CUDART_VERSION >= 12010
constexpr int kLargeTableBytes = 32764;
#else
constexpr int kLargeTableBytes = kSmallTableBytes;
#endif
// This is left for what a kernel takes beside the table.
constexpr int kOtherBytes = 256;

// Holds the part of a list of tensors that one launch works on.
template <int kLists, int kBytes>
struct TensorTable {
  static constexpr int kCapacity =
      (kBytes - kOtherBytes) / (kLists * 8 + sizeof(int64_t) + sizeof(int32_t));

  const void* address[kLists][kCapacity];
  int64_t numel[kCapacity];
  int32_t first_chunk[kCapacity + 1];  // counted from 0 in each launch
  int32_t num_tensors;
  int64_t first_tensor;  // index of tensor 0 in the whole list

  __device__ int num_chunks() const { return first_chunk[num_tensors]; }

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

// Names the elements begin .. begin + n - 1 of a tensor in every list.
template <typename Table>
struct Chunk {
  const Table& table;
  int tensor;
  int64_t begin;
  int n;

  __device__ Chunk(const Table& table, int chunk)
      : table(table), tensor(table.TensorOfChunk(chunk)) {
    begin = (chunk - table.first_chunk[tensor]) * kChunkSize;
    const int64_t rest = table.numel[tensor] - begin;
    n = static_cast<int>(rest < kChunkSize ? rest : kChunkSize);
  }

  template <typename T>
  __device__ T* At(int list) const {
    return static_cast<T*>(const_cast<void*>(table.address[list][tensor])) + begin;
  }

  // Returns the number of this tensor, from a list of numbers in place of addresses.
  __device__ int64_t Number(int list) const {
    return reinterpret_cast<intptr_t>(table.address[list][tensor]);
  }

  __device__ int64_t TensorInWholeList() const { return table.first_tensor + tensor; }
};

inline void Check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

// Returns the number of blocks of a kernel that the current device holds at a time.
template <typename... Args>
unsigned ResidentBlocks(void (*kernel)(Args...)) {
  constexpr int kMaxDevices = 64;
  static std::atomic<unsigned> known[kMaxDevices];
  int device = 0;
  Check(cudaGetDevice(&device));
  const bool is_remembered = device < kMaxDevices;
  if (is_remembered && known[device] > 0) return known[device];
  int processors = 0;
  int blocks = 0;
  Check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  Check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  const unsigned resident = processors * (blocks > 0 ? blocks : 1);
  if (is_remembered) known[device] = resident;
  return resident;
}

// Launches go through this function, not through <<<>>>, so that the host can stand in
// (csrc/emulation). It launches as many blocks as there is work for and as the device holds at a
// time.
template <typename... Args>
void Launch(void (*kernel)(Args...), unsigned num_chunks, void* stream, const Args&... args) {
  const unsigned resident = ResidentBlocks(kernel);
  const unsigned blocks = num_chunks < resident ? num_chunks : resident;
#ifdef SAMKERNELS_EMULATED
  (void)stream;
  emulation::Launch(kernel, blocks, kThreads, args...);
#else
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  Check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads),
                         parameters, 0, static_cast<cudaStream_t>(stream)));
#endif
}

// Calls launch(table, num_chunks, first_chunk, is_last) for as many tables as the list needs, at
// least one.
template <typename Table, int kLists, typename LaunchTable>
void ForEachTable(const Tensors& tensors, const void* const* const (&lists)[kLists],
                  const LaunchTable& launch) {
  // Not on the stack: the thread may have a small one.
  const std::unique_ptr<Table> memory(new Table);
  Table& table = *memory;
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

// Kernel parameters above 4 KB came with CUDA 12.1, and need a driver that knows it: an older one
// runs this build too, by minor version compatibility.
inline bool DriverTakesLargeTables() {
  int version = 0;
  Check(cudaDriverGetVersion(&version));
  return version >= 12010;
}

// Does the same with the table that fits the list: `launch` is called with one of two types.
template <int kLists, typename LaunchTable>
void ForEachTable(const Tensors& tensors, const void* const* const (&lists)[kLists],
                  const LaunchTable& launch) {
  using Small = TensorTable<kLists, kSmallTableBytes>;
  using Large = TensorTable<kLists, kLargeTableBytes>;
  if (tensors.num_tensors <= Small::kCapacity || !DriverTakesLargeTables()) {
    ForEachTable<Small>(tensors, lists, launch);
  } else {
    ForEachTable<Large>(tensors, lists, launch);
  }
}

// Asks for this many blocks in a multiprocessor, at least, for functors that take so many registers
// that half of the warps would not have theirs.
template <typename Functor>
constexpr int kMinResidentBlocks = 0;

template <typename Functor, typename Table>
__global__ void __launch_bounds__(kThreads, kMinResidentBlocks<Functor>)
    MultiTensorApplyKernel(const __grid_constant__ Table table,
                           const __grid_constant__ Functor functor) {
  const int num_chunks = table.num_chunks();
  for (int i = blockIdx.x; i < num_chunks; i += gridDim.x) {
    functor(Chunk<Table>(table, Functor::kReverse ? num_chunks - 1 - i : i));
  }
}

// Calls functor(chunk) for every chunk, from the last to the first if Functor::kReverse.
template <typename Functor, int kLists>
void MultiTensorApply(const Tensors& tensors, const void* const* const (&lists)[kLists],
                      const Functor& functor, void* stream) {
  static_assert(sizeof(Functor) + 64 <= kOtherBytes, "the functor does not fit beside the table");
  ForEachTable(tensors, lists, [&](const auto& table, unsigned num_chunks, int64_t, bool) {
    using Table = std::decay_t<decltype(table)>;
    if (num_chunks > 0) {
      Launch(MultiTensorApplyKernel<Functor, Table>, num_chunks, stream, table, functor);
    }
  });
}

}  // namespace samkernels::cuda
