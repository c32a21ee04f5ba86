// Adds up over lists of tensors in one launch per table. Blocks write the sums of each chunk; the
// block that finishes the last chunk of a tensor adds them up, and the one that finishes the last
// tensor adds up the tensors. The order of every addition is fixed, and only integers are counted
// atomically, so the same inputs give the same bits.
#pragma once

#include "multi_tensor_apply.cuh"

namespace samkernels::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
// Asks for this many threads in a multiprocessor, at least, which says how many registers each may
// have. Otherwise the compiler saves them, and loads a vector when the one before was used.
template <int kSums>
constexpr int kResidentThreads = kSums == 1 ? 1280 : 1024;
static_assert(kThreads % kWarpSize == 0, "shuffles need whole warps");

template <int kSums>
struct ReduceBuffers {
  double* of_chunks;           // [num_chunks of this launch][kSums]
  double* of_tensors;          // [num_tensors][kSums], 0 before the first launch
  unsigned* finished_tensors;  // [1], 0 before the first launch
  unsigned* finished_chunks;   // [num_tensors], 0 before the first launch
  double* per_tensor;          // [num_tensors][kSums], the results
  double* total;               // [kSums]
  int num_tensors;             // of the whole list
  int num_with_elements;       // of these
};

// Returns sum + a * b. The product of two floats is exact in double, so that the fused operation
// rounds as two would: the same bits for half of the double-precision work, which bounds these
// kernels where there is little of it.
__device__ __forceinline__ double AddProduct(double sum, float a, float b) {
  return fma(static_cast<double>(a), static_cast<double>(b), sum);
}

__device__ __forceinline__ double WarpSum(double x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// Adds up over all threads of a block, into thread 0.
template <int kSums>
__device__ __forceinline__ void BlockSum(double (&sums)[kSums]) {
  __shared__ Shared<double[kWarps][kSums]> of_warps;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  for (int k = 0; k < kSums; ++k) {
    sums[k] = WarpSum(sums[k]);
    if (lane == 0) of_warps[warp][k] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 0; k < kSums; ++k) {
      sums[k] = 0.0;
      for (int i = 0; i < kWarps; ++i) sums[k] += of_warps[i][k];
    }
  }
}

template <int kSums>
__device__ __forceinline__ void StoreSums(double* to, int64_t i, const double (&sums)[kSums]) {
  for (int k = 0; k < kSums; ++k) to[i * kSums + k] = sums[k];
}

// Returns true in all threads of the block that is the last of `count` to come here. That block
// sees what thread 0 of the others wrote before.
__device__ __forceinline__ bool IsLast(unsigned* arrived, unsigned count) {
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(arrived, 1u) == count - 1;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

// The functor has kSums, and accumulate(chunk, sums), which adds a thread's share of a chunk.
template <typename Functor, typename Table>
__global__ void __launch_bounds__(kThreads, kResidentThreads<Functor::kSums> / kThreads)
    ReduceKernel(const __grid_constant__ Table table, const __grid_constant__ Functor functor,
                 const __grid_constant__ ReduceBuffers<Functor::kSums> buffers) {
  constexpr int kSums = Functor::kSums;
  const int num_chunks = table.num_chunks();
  bool is_last = buffers.num_with_elements == 0;

  for (int i = blockIdx.x; i < num_chunks; i += gridDim.x) {
    const Chunk<Table> chunk(table, i);
    const int64_t tensor = chunk.TensorInWholeList();
    double sums[kSums] = {};
    functor.accumulate(chunk, sums);
    BlockSum<kSums>(sums);

    const int first = table.first_chunk[chunk.tensor];
    const int count = table.first_chunk[chunk.tensor + 1] - first;
    if (count > 1) {
      const double* of_chunks = buffers.of_chunks + int64_t{first} * kSums;
      if (threadIdx.x == 0) StoreSums<kSums>(buffers.of_chunks, i, sums);
      if (!IsLast(&buffers.finished_chunks[tensor], count)) continue;
      for (int k = 0; k < kSums; ++k) sums[k] = 0.0;
      // Of a long tensor these are many, and little else is left to hide how long each takes.
      constexpr int kUnroll = kSums < 4 ? 4 / kSums : 1;
#pragma unroll kUnroll
      for (int j = threadIdx.x; j < count; j += kThreads) {
        for (int k = 0; k < kSums; ++k) sums[k] += __ldcg(&of_chunks[int64_t{j} * kSums + k]);
      }
      BlockSum<kSums>(sums);
    }
    if (threadIdx.x == 0) StoreSums<kSums>(buffers.of_tensors, tensor, sums);
    is_last = IsLast(buffers.finished_tensors, buffers.num_with_elements);
  }
  if (!is_last) return;

  double sums[kSums] = {};
#pragma unroll 1  // few tensors, and registers are scarce
  for (int tensor = threadIdx.x; tensor < buffers.num_tensors; tensor += kThreads) {
    for (int k = 0; k < kSums; ++k) {
      const int64_t i = int64_t{tensor} * kSums + k;
      const double of_tensor = __ldcg(&buffers.of_tensors[i]);
      buffers.per_tensor[i] = of_tensor;
      sums[k] += of_tensor;
    }
  }
  BlockSum<kSums>(sums);
  if (threadIdx.x == 0) StoreSums<kSums>(buffers.total, 0, sums);
}

template <typename Functor, int kLists>
void Reduce(const Tensors& tensors, const void* const* const (&lists)[kLists],
            const Functor& functor, const DotsArgs& args, void* stream) {
  constexpr int kSums = Functor::kSums;
  using Buffers = ReduceBuffers<kSums>;
  static_assert(sizeof(Functor) + sizeof(Buffers) + 64 <= kOtherBytes,
                "functor and buffers do not fit beside the table");
  if (tensors.num_tensors > INT32_MAX) throw std::length_error("more than 2^31 - 1 tensors");
  int num_with_elements = 0;
  for (int64_t i = 0; i < tensors.num_tensors; ++i) num_with_elements += tensors.numel[i] > 0;
  double* of_tensors = static_cast<double*>(args.workspace);
  unsigned* finished_tensors =
      reinterpret_cast<unsigned*>(of_tensors + kSums * tensors.num_tensors);
  unsigned* finished_chunks = finished_tensors + 1;
  double* of_chunks = of_tensors + (kSums + 1) * tensors.num_tensors + 1;
  Check(cudaMemsetAsync(of_tensors, 0,
                        reinterpret_cast<char*>(of_chunks) - reinterpret_cast<char*>(of_tensors),
                        static_cast<cudaStream_t>(stream)));
  ForEachTable(tensors, lists,
               [&](const auto& table, unsigned num_chunks, int64_t first_chunk, bool is_last) {
                 using Table = std::decay_t<decltype(table)>;
                 // Without an element in the whole list the last launch has the results to write.
                 if (num_chunks == 0 && !(is_last && num_with_elements == 0)) return;
                 const Buffers buffers = {of_chunks + first_chunk * kSums,
                                          of_tensors,
                                          finished_tensors,
                                          finished_chunks,
                                          args.per_tensor,
                                          args.total,
                                          static_cast<int>(tensors.num_tensors),
                                          num_with_elements};
                 Launch(ReduceKernel<Functor, Table>, num_chunks > 0 ? num_chunks : 1, stream,
                        table, functor, buffers);
               });
}

}  // namespace samkernels::cuda
