#include <math.h>

#include "../op_functions.h"
#include "blocks.h"
#include "sgd.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

// Makes D of neighbouring columns: the mean of |product| over their positions, added up in their
// order.
template <typename T>
static void Means(const T* products, Positions positions, int64_t columns,
                  float* __restrict means) {
  const float count = static_cast<float>(positions.count);
  if (columns == 1) {
    float sum = 0.0f;
    for (int64_t p = 0; p < positions.count; ++p) {
      sum += fabsf(ToFloat(products[p * positions.stride]));
    }
    means[0] = sum / count;
    return;
  }
  float staging[kBlockSize];
  for (int64_t i = 0; i < columns; ++i) means[i] = 0.0f;
  for (int64_t p = 0; p < positions.count; ++p) {
    const float* row = LoadBlock(products + p * positions.stride, staging, columns);
    for (int64_t i = 0; i < columns; ++i) means[i] += fabsf(row[i]);
  }
  for (int64_t i = 0; i < columns; ++i) means[i] /= count;
}

// Makes `rows` copies of a row.
static inline void Repeat(const float* __restrict row, int64_t n, int64_t rows,
                          float* __restrict out) {
  if (n == 1) {
    for (int64_t r = 0; r < rows; ++r) out[r] = row[0];
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) out[r * n + i] = row[i];
  }
}

// Calls update(begin, n, d), with D of each element, for all positions of the columns first .. last
// - 1: for at most kBlockSize elements at a time, side by side in memory.
template <typename T, typename Update>
static void ForEachTile(const T* products, Positions positions, int64_t first, int64_t last,
                        const Update& update) {
  const int64_t count = positions.count;
  const int64_t stride = positions.stride;
  const int64_t slice = count * stride;
  float means[kBlockSize];
  float d[kBlockSize];
  for (int64_t i = first; i < last;) {
    const int64_t column = i % stride;
    const int64_t begin = i / stride * slice + column;
    if (slice <= kBlockSize && column == 0 && stride <= last - i) {
      int64_t n = 0;
      for (; n + slice <= kBlockSize && stride <= last - i; n += slice, i += stride) {
        Prefetch<kUpdateAheadBytes>(begin + n, products);
        Means(products + begin + n, positions, stride, means);
        Repeat(means, stride, count, d + n);
      }
      update(begin, n, d);
      continue;
    }
    int64_t columns = stride - column < last - i ? stride - column : last - i;
    if (columns > kBlockSize) columns = kBlockSize;
    Means(products + begin, positions, columns, means);
    // Whole rows lie side by side.
    const int64_t rows = columns == stride ? kBlockSize / stride : 1;
    Repeat(means, columns, rows, d);
    for (int64_t p = 0; p < count; p += rows) {
      const int64_t n = (rows < count - p ? rows : count - p) * columns;
      update(begin + p * stride, n, d);
    }
    i += columns;
  }
}

static inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename V>
static void SgdHessOf(const SgdHessArgs& args, const Execution& execution) {
  const SgdOptions options = args.options;
  const SgdScalars scalars = SgdScalarsOf(options);
  const float rho = Read(args.rho);
  constexpr bool kHasBuffer = V::kHasBuffer;
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 const T* all_products = At<T>(args.hessian_products, tensor, 0);
                 // d: D of the elements; null if it is |product|.
                 const auto update = [&](int64_t from, int64_t numel, const float* d) {
                   T* params = At<T>(args.params, tensor, from);
                   const T* grads = At<T>(args.grads, tensor, from);
                   const T* products = all_products + from;
                   T* buffer = kHasBuffer ? At<T>(args.momentum_buffer, tensor, from) : nullptr;
                   ForEachVector(numel, [&](int64_t offset, auto count) {
                     Prefetch<kUpdateAheadBytes>(offset, params, grads);
                     if (d == nullptr) Prefetch<kUpdateAheadBytes>(offset, products);
                     if (kHasBuffer) Prefetch<kUpdateAheadBytes>(offset, buffer);
                     float staging[4][kVectorSize];
                     float u[kVectorSize];
                     float buf[kVectorSize];
                     const float* g = LoadBlock(grads + offset, staging[1], count);
                     if (d != nullptr) {
                       for (int64_t i = 0; i < count; ++i) {
                         u[i] = ScaledByCurvature(g[i], rho, d[offset + i]);
                       }
                     } else {
                       const float* product = LoadBlock(products + offset, staging[0], count);
                       for (int64_t i = 0; i < count; ++i) {
                         u[i] = ScaledByCurvature(g[i], rho, fabsf(product[i]));
                       }
                     }
                     const float* w = LoadBlock(params + offset, staging[2], count);
                     const float* old_buf = nullptr;
                     if (kHasBuffer) old_buf = LoadBlock(buffer + offset, staging[3], count);
                     SgdBlock<V>(options, scalars, count, w, u, old_buf, buf);
                     StoreBlock(params + offset, u, count, kInPlace);
                     if (kHasBuffer) StoreBlock(buffer + offset, buf, count, kInPlace);
                   });
                 };
                 const Positions positions = args.positions[tensor];
                 if (positions.count == 1) {
                   update(begin, n, nullptr);
                 } else {
                   // A chunk has the columns whose number times their length lies in it: so each is
                   // summed once, by one thread, over however many chunks its positions spread.
                   ForEachTile(all_products, positions, CeilDiv(begin, positions.count),
                               CeilDiv(begin + n, positions.count), update);
                 }
               });
}

void SgdHess(const SgdHessArgs& args, const Execution& execution) {
  DispatchDType(args.tensors.dtype, [&](auto zero) {
    DispatchVariant(args.options, [&](auto variant) {
      SgdHessOf<decltype(zero), decltype(variant)>(args, execution);
    });
  });
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
