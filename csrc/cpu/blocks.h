// Walks the lists of the CPU ops: chunks are shared out among threads; within a chunk, updates go
// from vector to vector and sums from block to block. What is loaded becomes fp32, and is stored in
// the tensors' dtype again; the ops themselves see only fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "../chunk_plan.h"
#include "../ops.h"
#include "compiler.h"
#include "half.h"

namespace samkernels::cpu {

constexpr int64_t kChunkSize = 16384;
constexpr int64_t kBlockSize = 512;
constexpr int64_t kVectorSize = 16;

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

// The loops ask for memory this far ahead, where they only read and where they also write: the
// processor's own prefetching stops at page boundaries.
constexpr int64_t kReadAheadBytes = 2048;
constexpr int64_t kUpdateAheadBytes = 512;

// Asks for what lies kAheadBytes behind the i-th element of each list.
template <int64_t kAheadBytes, typename... T>
static inline void Prefetch(int64_t i, const T*... lists) {
  (SAMKERNELS_PREFETCH(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(lists) +
                                                     i * sizeof(T) + kAheadBytes)),
   ...);
}

// Names a number of elements that the compiler knows.
template <int64_t kCount>
struct Count {
  constexpr operator int64_t() const { return kCount; }
};

static inline void StoreBytes(void* target, const void* source, int64_t bytes, bool) {
  std::memcpy(target, source, bytes);
}

// A streaming store writes this at once, and its target is aligned to that.
#if defined(__AVX__)
using Stream = __m256i;
static inline void StoreStream(Stream* target, const Stream* source) {
  _mm256_stream_si256(target, _mm256_loadu_si256(source));
}
#elif defined(__SSE2__)
using Stream = __m128i;
static inline void StoreStream(Stream* target, const Stream* source) {
  _mm_stream_si128(target, _mm_loadu_si128(source));
}
#else
using Stream = char;
static inline void StoreStream(Stream* target, const Stream* source) { *target = *source; }
#endif

// Stores past the caches if `streaming`.
template <int64_t kBytes>
static inline void StoreBytes(void* target, const void* source, Count<kBytes>, bool streaming) {
  static_assert(kBytes % sizeof(Stream) == 0, "the last store would go beyond, and be unaligned");
  if (streaming) {
    for (int64_t i = 0; i < kBytes; i += sizeof(Stream)) {
      StoreStream(reinterpret_cast<Stream*>(static_cast<char*>(target) + i),
                  reinterpret_cast<const Stream*>(static_cast<const char*>(source) + i));
    }
  } else {
    std::memcpy(target, source, kBytes);
  }
}

static inline bool IsAligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Stream) == 0;
}

// Streaming stores are weakly ordered: a thread that may have made some ends with this.
static inline void FinishStreaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <typename T>
static inline T* At(const void* const* list, int64_t tensor, int64_t offset) {
  return static_cast<T*>(const_cast<void*>(list[tensor])) + offset;
}

// Calls body(chunk, tensor, begin, n) for the chunks first .. last - 1: elements begin ..
// begin + n - 1 of `tensor`. It is not inlined, so that both calls below share one copy.
template <typename Body>
static SAMKERNELS_NOINLINE void RunChunks(const Tensors& tensors, int64_t first, int64_t last,
                                          const Body& body) {
  int64_t tensor = TensorOfChunk(tensors.first_chunk, tensors.num_tensors, first);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    while (chunk >= tensors.first_chunk[tensor + 1]) ++tensor;
    const int64_t begin = (chunk - tensors.first_chunk[tensor]) * tensors.chunk_size;
    const int64_t rest = tensors.numel[tensor] - begin;
    body(chunk, tensor, begin, rest < tensors.chunk_size ? rest : tensors.chunk_size);
  }
  FinishStreaming();
}

// Does the same for every chunk, shared out among threads.
template <typename Body>
static inline void ForEachChunk(const Tensors& tensors, int num_threads, const Body& body) {
  const int64_t num_chunks = tensors.first_chunk[tensors.num_tensors];
  if (num_threads > 1 && tensors.total_numel >= kParallelNumel) {
    InParallel(num_threads, [&](int64_t thread, int64_t threads) {
      RunChunks(tensors, num_chunks * thread / threads, num_chunks * (thread + 1) / threads, body);
    });
  } else {
    RunChunks(tensors, 0, num_chunks, body);
  }
}

// Calls body(offset, count) for every vector of a chunk, and for what is left. With a count that
// the compiler knows, what the body stages stays in registers, and loads, arithmetic and stores of
// neighbouring vectors overlap.
template <int64_t kSize = kVectorSize, typename Body>
static inline void ForEachVector(int64_t n, const Body& body) {
  int64_t offset = 0;
  for (; offset + kSize <= n; offset += kSize) body(offset, Count<kSize>());
  if (offset < n) body(offset, n - offset);
}

// Calls body(offset, n) for every block of a chunk.
template <typename Body>
static inline void ForEachBlock(int64_t n, const Body& body) {
  for (int64_t offset = 0; offset < n; offset += kBlockSize) {
    body(offset, n - offset < kBlockSize ? n - offset : kBlockSize);
  }
}

// Returns the n elements from `source` on as fp32: where they are, or converted into `staging`. N
// is int64_t or a Count.
template <typename N>
static inline const float* LoadBlock(const float* source, float*, N) {
  return source;
}

template <typename Half, typename N>
static inline const float* LoadBlock(const Half* source, float* staging, N n) {
  for (int64_t i = 0; i < n; ++i) staging[i] = ToFloat(source[i]);
  return staging;
}

template <typename T>
static inline int64_t BytesOf(int64_t n) {
  return n * static_cast<int64_t>(sizeof(T));
}

template <typename T, int64_t kCount>
static inline Count<kCount * sizeof(T)> BytesOf(Count<kCount>) {
  return {};
}

template <typename N>
static inline void StoreBlock(float* target, const float* values, N n, bool streaming) {
  StoreBytes(target, values, BytesOf<float>(n), streaming);
}

template <typename Half, typename N>
static inline void StoreBlock(Half* target, const float* values, N n, bool streaming) {
  Half staging[kVectorSize];
  for (int64_t i = 0; i < n; ++i) FromFloat(values[i], &staging[i]);
  StoreBytes(target, staging, BytesOf<Half>(n), streaming);
}

#ifdef __F16C__
// The compiler does not make vectors of the single conversions in half.h.
template <typename N>
static inline const float* LoadBlock(const Float16* source, float* staging, N n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(staging + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) staging[i] = ToFloat(source[i]);
  return staging;
}

template <typename N>
static inline void StoreBlock(Float16* target, const float* values, N n, bool streaming) {
  Float16 staging[kVectorSize];
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 eight = _mm256_loadu_ps(values + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(staging + i),
                     _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) FromFloat(values[i], &staging[i]);
  StoreBytes(target, staging, BytesOf<Float16>(n), streaming);
}
#endif

// Calls f(T{}) with the C++ type of `dtype`.
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
