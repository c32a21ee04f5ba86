// The memory floor of one SAM step with SGD: its three phases as bare loops over flat arrays, with
// no lists, no checks, no options and no Python around them. bench/side_by_side.py compiles it.
//
// 40 bytes per parameter: norm 4, perturb 16, update 20. What is written and was not read goes past
// the caches.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

// n is a multiple of 16, addresses are of 32.
extern "C" double sam_step(int64_t n, int threads, float* w, float* old_w, const float* g1,
                           const float* g2, float* buf) {
  double sum = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
  for (int64_t i = 0; i < n; i += 16) {
    __builtin_prefetch(g1 + i + 512);
    __m256d squares = _mm256_setzero_pd();
    for (int64_t j = i; j < i + 16; j += 4) {
      const __m256d x = _mm256_cvtps_pd(_mm_load_ps(g1 + j));
      squares = _mm256_add_pd(squares, _mm256_mul_pd(x, x));
    }
    sum += squares[0] + squares[1] + squares[2] + squares[3];
  }
  const __m256 scale = _mm256_set1_ps(0.05f / static_cast<float>(std::sqrt(sum)));

#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < n; i += 16) {
      __builtin_prefetch(w + i + 128);
      __builtin_prefetch(g1 + i + 128);
      for (int64_t j = i; j < i + 16; j += 8) {
        const __m256 x = _mm256_load_ps(w + j);
        _mm256_stream_ps(old_w + j, x);
        _mm256_store_ps(w + j, _mm256_add_ps(x, _mm256_mul_ps(scale, _mm256_load_ps(g1 + j))));
      }
    }
    _mm_sfence();
  }

  const __m256 lr = _mm256_set1_ps(0.1f), momentum = _mm256_set1_ps(0.9f);
  const __m256 weight_decay = _mm256_set1_ps(1e-3f);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < n; i += 16) {
      __builtin_prefetch(old_w + i + 128);
      __builtin_prefetch(g2 + i + 128);
      __builtin_prefetch(buf + i + 128);
      for (int64_t j = i; j < i + 16; j += 8) {
        const __m256 x = _mm256_load_ps(old_w + j);
        const __m256 u = _mm256_add_ps(_mm256_load_ps(g2 + j), _mm256_mul_ps(weight_decay, x));
        const __m256 b = _mm256_add_ps(_mm256_mul_ps(momentum, _mm256_load_ps(buf + j)), u);
        _mm256_store_ps(buf + j, b);
        _mm256_stream_ps(w + j, _mm256_sub_ps(x, _mm256_mul_ps(lr, b)));
      }
    }
    _mm_sfence();
  }
  return sum;
}
