#include <math.h>

#include "blocks.h"
#include "cpu_ops.h"
#include "sgd.h"

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

// means[i] is D of element begin + i, for i < n: the mean of |product| over its positions.
template <typename T>
static void SpatialMeans(const T* products, Positions positions, int64_t begin, int64_t n,
                         float* __restrict means) {
  const int64_t stride = positions.stride;
  const int64_t slice = positions.count * stride;
  const int64_t end = begin + n;
  for (int64_t start = begin / slice * slice; start < end; start += slice) {
    for (int64_t column = 0; column < stride; column += kBlockSize) {
      const int64_t columns = stride - column < kBlockSize ? stride - column : kBlockSize;
      float sums[kBlockSize];
      float staging[kBlockSize];
      for (int64_t i = 0; i < columns; ++i) sums[i] = 0.0f;
      for (int64_t p = 0; p < positions.count; ++p) {
        const float* row = LoadBlock(products + start + p * stride + column, staging, columns);
        for (int64_t i = 0; i < columns; ++i) sums[i] += fabsf(row[i]);
      }
      for (int64_t i = 0; i < columns; ++i) sums[i] /= static_cast<float>(positions.count);
      for (int64_t p = 0; p < positions.count; ++p) {
        const int64_t row = start + p * stride + column;
        const int64_t from = row > begin ? row : begin;
        const int64_t to = row + columns < end ? row + columns : end;
        for (int64_t i = from; i < to; ++i) means[i - begin] = sums[i - row];
      }
    }
  }
}

template <typename T, typename V>
static void SgdHessOf(const SgdHessArgs& args, const Execution& execution) {
  const SgdOptions options = args.options;
  const float lr = Read(options.lr);
  const float rho = Read(args.rho);
  constexpr bool kHasBuffer = V::kMomentum != Momentum::kNone;
  ForEachChunk(args.tensors, execution.num_threads,
               [&](int64_t, int64_t tensor, int64_t begin, int64_t n) {
                 T* params = At<T>(args.params, tensor, begin);
                 const T* grads = At<T>(args.grads, tensor, begin);
                 const T* products = At<T>(args.hessian_products, tensor, begin);
                 T* buffer = kHasBuffer ? At<T>(args.momentum_buffer, tensor, begin) : nullptr;
                 const bool is_spatial = args.positions[tensor].count > 1;
                 float means[kChunkSize];
                 if (is_spatial) {
                   SpatialMeans(products - begin, args.positions[tensor], begin, n, means);
                 }
                 ForEachVector(n, [&](int64_t offset, auto count) {
                   Prefetch<kUpdateAheadBytes>(offset, params, grads);
                   if (!is_spatial) Prefetch<kUpdateAheadBytes>(offset, products);
                   if (kHasBuffer) Prefetch<kUpdateAheadBytes>(offset, buffer);
                   float staging[4][kVectorSize];
                   float d[kVectorSize];
                   float u[kVectorSize];
                   float buf[kVectorSize];
                   if (is_spatial) {
                     for (int64_t i = 0; i < count; ++i) d[i] = means[offset + i];
                   } else {
                     const float* product = LoadBlock(products + offset, staging[0], count);
                     for (int64_t i = 0; i < count; ++i) d[i] = fabsf(product[i]);
                   }
                   const float* g = LoadBlock(grads + offset, staging[1], count);
                   for (int64_t i = 0; i < count; ++i) u[i] = ScaledByCurvature(g[i], rho, d[i]);
                   const float* w = LoadBlock(params + offset, staging[2], count);
                   const float* old_buf = nullptr;
                   if (V::kMomentum == Momentum::kRunning) {
                     old_buf = LoadBlock(buffer + offset, staging[3], count);
                   }
                   SgdBlock<V>(options, lr, count, w, u, old_buf, buf);
                   StoreBlock(params + offset, u, count, kInPlace);
                   if (kHasBuffer) StoreBlock(buffer + offset, buf, count, kInPlace);
                 });
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
