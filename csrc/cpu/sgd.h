// Updates one vector by SGD (ops.h: SgdOptions), for all ops that end in that.
#pragma once

#include "../update_math.h"
#include "compiler.h"

// In the variant's namespace: what is in here must not be shared between instruction sets.
namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

// Tells the compiler what decides the shape of the inner loop: with branches in it the loop is not
// vectorised well.
template <bool kHasBuffer_, bool kNesterov_, bool kDecay_>
struct Variant {
  static constexpr bool kHasBuffer = kHasBuffer_;
  static constexpr bool kNesterov = kNesterov_;
  static constexpr bool kDecay = kDecay_;
};

// Turns u into the new weight and buf into the new buffer. The arguments come by value and
// __restrict: otherwise the compiler must expect that a store changes the options, or what is read
// next.
template <typename V, typename N>
static inline void SgdBlock(SgdOptions options, SgdScalars scalars, N n, const float* __restrict w,
                            float* __restrict u, const float* __restrict old_buf,
                            float* __restrict buf) {
  options.nesterov = V::kNesterov;
  if (!V::kDecay) options.weight_decay = 0.0f;
  if (V::kDecay && options.weight_decay == 0.0f) SAMKERNELS_UNREACHABLE();
  for (int64_t i = 0; i < n; ++i) {
    float b = V::kHasBuffer ? old_buf[i] : 0.0f;
    u[i] = SgdUpdated<V::kHasBuffer>(options, scalars, w[i], u[i], b);
    if (V::kHasBuffer) buf[i] = b;
  }
}

// Calls f(Variant<..>()) for the options at hand.
template <bool kHasBuffer, typename F>
static void DispatchFlags(const SgdOptions& options, const F& f) {
  const bool decay = options.weight_decay != 0.0f;
  if (options.nesterov && decay) return f(Variant<kHasBuffer, true, true>());
  if (options.nesterov) return f(Variant<kHasBuffer, true, false>());
  if (decay) return f(Variant<kHasBuffer, false, true>());
  return f(Variant<kHasBuffer, false, false>());
}

template <typename F>
static void DispatchVariant(const SgdOptions& options, const F& f) {
  if (options.has_momentum) return DispatchFlags<true>(options, f);
  DispatchFlags<false>(options, f);
}

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
