// How the CPU ops walk their lists: chunks are shared out among threads, and a chunk is worked
// through in blocks that fit into the L1 cache. A block is loaded as fp32, computed on, and stored
// in the tensors' dtype; the ops themselves see only fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "../chunk_plan.h"
#include "../ops.h"
#include "half.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace samkernels::cpu {

constexpr int64_t kChunkSize = 16384;
constexpr int64_t kBlockSize = 512;

// Less work than this is done before a second thread has woken up.
constexpr int64_t kParallelNumel = 32768;

// Above this traffic an op writes past the caches what it has not read: it would not stay there
// until it is read again, and a cached write first reads the line from memory. What is updated in
// place is in the cache already; to push it past the cache was slower.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;
constexpr bool kInPlace = false;

static inline bool IsStreaming(const Tensors& tensors, int num_lists) {
  return tensors.total_numel * num_lists * SizeOf(tensors.dtype) >= kStreamingBytes;
}

#ifdef __SSE2__
// Writes `bytes` from `source` to `target` past the caches, as far as 16-byte alignment allows.
static inline void StreamBytes(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 15);
  if (i > bytes) i = bytes;
  std::memcpy(to, from, i);
  for (; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  std::memcpy(to + i, from + i, bytes - i);
}
// Streaming stores are weakly ordered: a thread that may have made some ends with this.
static inline void FinishStreaming() { _mm_sfence(); }
#else
static inline void StreamBytes(void* target, const void* source, int64_t bytes) {
  std::memcpy(target, source, bytes);
}
static inline void FinishStreaming() {}
#endif

template <typename T>
static inline T* At(const void* const* list, int64_t tensor, int64_t offset) {
  return static_cast<T*>(const_cast<void*>(list[tensor])) + offset;
}

// body(chunk, tensor, begin, n) for every chunk: elements begin .. begin + n - 1 of `tensor`.
template <typename Body>
static inline void ForEachChunk(const Tensors& tensors, int num_threads, const Body& body) {
  const int64_t num_chunks = tensors.first_chunk[tensors.num_tensors];
  auto run = [&](int64_t first, int64_t last) {
    int64_t tensor = TensorOfChunk(tensors.first_chunk, tensors.num_tensors, first);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      while (chunk >= tensors.first_chunk[tensor + 1]) ++tensor;
      const int64_t begin = (chunk - tensors.first_chunk[tensor]) * tensors.chunk_size;
      const int64_t rest = tensors.numel[tensor] - begin;
      body(chunk, tensor, begin, rest < tensors.chunk_size ? rest : tensors.chunk_size);
    }
    FinishStreaming();
  };
#ifdef _OPENMP
  if (num_threads > 1 && tensors.total_numel >= kParallelNumel) {
#pragma omp parallel num_threads(num_threads)
    {
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      run(num_chunks * thread / threads, num_chunks * (thread + 1) / threads);
    }
    return;
  }
#endif
  run(0, num_chunks);
}

// body(offset, n) for every block of a chunk.
template <typename Body>
static inline void ForEachBlock(int64_t n, const Body& body) {
  for (int64_t offset = 0; offset < n; offset += kBlockSize) {
    body(offset, n - offset < kBlockSize ? n - offset : kBlockSize);
  }
}

// The n elements from `source` on as fp32: where they are, or converted into `staging`.
static inline const float* LoadBlock(const float* source, float*, int64_t) { return source; }

template <typename Half>
static inline const float* LoadBlock(const Half* source, float* staging, int64_t n) {
  for (int64_t i = 0; i < n; ++i) staging[i] = ToFloat(source[i]);
  return staging;
}

static inline void StoreBytes(void* target, const void* source, int64_t bytes, bool streaming) {
  if (streaming) {
    StreamBytes(target, source, bytes);
  } else {
    std::memcpy(target, source, bytes);
  }
}

static inline void StoreBlock(float* target, const float* values, int64_t n, bool streaming) {
  StoreBytes(target, values, n * sizeof(float), streaming);
}

template <typename Half>
static inline void StoreBlock(Half* target, const float* values, int64_t n, bool streaming) {
  Half staging[kBlockSize];
  for (int64_t i = 0; i < n; ++i) FromFloat(values[i], &staging[i]);
  StoreBytes(target, staging, n * sizeof(Half), streaming);
}

// f(T{}) with the C++ type of `dtype`.
template <typename F>
static inline void DispatchDType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace samkernels::cpu
