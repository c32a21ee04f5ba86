// Sums over lists of tensors in one launch per table. Blocks write the sums of each chunk; the last
// one to finish adds them up per tensor, and the last one of the last launch over all tensors.
// The order of every addition is fixed, and only integers are counted atomically, so the same
// inputs give the same bits.
#pragma once

#include "multi_tensor_apply.cuh"

namespace samkernels::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

template <int kSums>
struct ReduceBuffers {
  double* of_chunks;    // [num_chunks of this launch][kSums]
  double* of_tensors;   // [num_tensors of the whole list][kSums]
  unsigned* finished;   // blocks of this launch that are done; 0 before it
  int64_t num_tensors;  // of the whole list
  bool is_last;         // launch
};

__device__ __forceinline__ double WarpSum(double x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// The sums over all threads of a block, in thread 0.
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

// True in all threads of the one block that finishes last; it sees what the others wrote.
__device__ __forceinline__ bool IsLastBlock(unsigned* finished) {
  __shared__ Shared<bool> is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return is_last;
}

// Functor: kSums; accumulate(chunk, sums) adds a thread's share of a chunk;
// finish_tensor(tensor, sums) and finish_total(sums) take the results, in one thread each.
template <typename Functor, typename Table>
__global__ void __launch_bounds__(kThreads)
    ReduceKernel(const __grid_constant__ Table table, const __grid_constant__ Functor functor,
                 const __grid_constant__ ReduceBuffers<Functor::kSums> buffers) {
  constexpr int kSums = Functor::kSums;
  const int num_chunks = table.num_chunks();

  for (int chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    double sums[kSums] = {};
    functor.accumulate(Chunk<Table>(table, chunk), sums);
    BlockSum<kSums>(sums);
    if (threadIdx.x == 0) {
      for (int k = 0; k < kSums; ++k) buffers.of_chunks[int64_t{chunk} * kSums + k] = sums[k];
    }
  }
  if (!IsLastBlock(buffers.finished)) return;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  for (int tensor = warp; tensor < table.num_tensors; tensor += kWarps) {
    double sums[kSums] = {};
    // Of a long tensor these are many, and nothing else is left to hide how long each takes.
    constexpr int kUnroll = kSums == 1 ? 4 : 2;
    const int end = table.first_chunk[tensor + 1];
    for (int chunk = table.first_chunk[tensor] + lane; chunk < end; chunk += kUnroll * kWarpSize) {
      double of_chunk[kUnroll][kSums];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = chunk + i * kWarpSize;
        for (int k = 0; k < kSums; ++k) {
          of_chunk[i][k] = at < end ? __ldcg(&buffers.of_chunks[at * kSums + k]) : 0.0;
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        for (int k = 0; k < kSums; ++k) sums[k] += of_chunk[i][k];
      }
    }
    for (int k = 0; k < kSums; ++k) sums[k] = WarpSum(sums[k]);
    if (lane == 0) {
      const int64_t index = table.first_tensor + tensor;
      for (int k = 0; k < kSums; ++k) buffers.of_tensors[index * kSums + k] = sums[k];
      functor.finish_tensor(index, sums);
    }
  }
  if (!buffers.is_last) return;

  __threadfence();
  __syncthreads();
  double sums[kSums] = {};
  for (int64_t tensor = threadIdx.x; tensor < buffers.num_tensors; tensor += kThreads) {
    for (int k = 0; k < kSums; ++k) sums[k] += __ldcg(&buffers.of_tensors[tensor * kSums + k]);
  }
  BlockSum<kSums>(sums);
  if (threadIdx.x == 0) functor.finish_total(sums);
}

template <typename Functor, int kLists>
void Reduce(const Tensors& tensors, const void* const* const (&lists)[kLists],
            const Functor& functor, void* workspace, void* stream) {
  constexpr int kSums = Functor::kSums;
  const int64_t num_chunks = tensors.first_chunk[tensors.num_tensors];
  double* of_chunks = static_cast<double*>(workspace);
  double* of_tensors = of_chunks + num_chunks * kSums;
  unsigned* finished = reinterpret_cast<unsigned*>(of_tensors + tensors.num_tensors * kSums);
  const int64_t max_launches = tensors.num_tensors + 1;
  Check(cudaMemsetAsync(finished, 0, max_launches * sizeof(unsigned),
                        static_cast<cudaStream_t>(stream)));
  ForEachTable(tensors, lists,
               [&](const auto& table, unsigned num_chunks, int64_t first_chunk, bool is_last) {
                 using Table = std::decay_t<decltype(table)>;
                 const ReduceBuffers<kSums> buffers = {of_chunks + first_chunk * kSums, of_tensors,
                                                       finished++, tensors.num_tensors, is_last};
                 // A list of empty tensors has no chunk, but sums all the same.
                 Launch(ReduceKernel<Functor, Table>, num_chunks > 0 ? num_chunks : 1, stream,
                        table, functor, buffers);
               });
}

}  // namespace samkernels::cuda
