// Holds what compilers and operating systems spell in different ways, and nothing else.
#pragma once

// MSVC has no macros for what x86-64 always has and for what comes with AVX2.
#if defined(_MSC_VER) && defined(_M_X64) && !defined(__clang__)
#define __SSE2__ 1
#ifdef __AVX2__
#define __F16C__ 1
#endif
#endif

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifdef _MSC_VER
#define SAMKERNELS_NOINLINE __declspec(noinline)
#define SAMKERNELS_UNREACHABLE() __assume(0)
#else
#define SAMKERNELS_NOINLINE __attribute__((noinline))
#define SAMKERNELS_UNREACHABLE() __builtin_unreachable()
#endif

// Asks for the cache line of an address, which need not be mapped.
#if defined(__GNUC__)
#define SAMKERNELS_PREFETCH(address) __builtin_prefetch(address)
#elif defined(__SSE2__)
#define SAMKERNELS_PREFETCH(address) \
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)
#else
#define SAMKERNELS_PREFETCH(address) static_cast<void>(address)
#endif

// The threads are OpenMP's or, on macOS, those of the system's own library. A wheel with an OpenMP
// runtime of its own would be the second one in a process with PyTorch, which may end it.
#if defined(_OPENMP)
#include <omp.h>
#elif defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

namespace samkernels::cpu {

// Calls part(thread, threads) for each of at most `num_threads` threads, at once.
template <typename Part>
static inline void InParallel(int num_threads, const Part& part) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads)
  part(omp_get_thread_num(), omp_get_num_threads());
#elif defined(__APPLE__)
  struct Call {
    const Part* part;
    int threads;
  } call = {&part, num_threads};
  dispatch_apply_f(static_cast<size_t>(num_threads), DISPATCH_APPLY_AUTO, &call,
                   [](void* context, size_t thread) {
                     const auto* shared = static_cast<const Call*>(context);
                     (*shared->part)(static_cast<int>(thread), shared->threads);
                   });
#else
  static_cast<void>(num_threads);
  part(0, 1);
#endif
}

}  // namespace samkernels::cpu
