// The arithmetic of perturb, recombine and update, per element, in fp32. Written once: the CPU and
// the CUDA ops call these functions. Contraction into fused multiply-adds is switched off in the
// build, so that both give the same bits from the same inputs.
//
// `static`: the CPU ops are compiled once per instruction set, and an inline function shared
// between those objects would let the linker pick the version that the processor at hand does not
// have.
#pragma once

#include <math.h>

#include "ops.h"

#ifdef __CUDACC__
#define SAMKERNELS_HOST_DEVICE __host__ __device__
#else
#define SAMKERNELS_HOST_DEVICE
#endif

namespace samkernels {

constexpr float kLargestFloat = 3.40282346638528859812e+38f;

static inline SAMKERNELS_HOST_DEVICE bool IsFinite(float x) {
  return x >= -kLargestFloat && x <= kLargestFloat;
}

// As torch.sign: 0 for 0 and for nan.
static inline SAMKERNELS_HOST_DEVICE float Sign(float x) {
  return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f);
}

static inline SAMKERNELS_HOST_DEVICE float Read(const Scalar& x) {
  return x.address ? *x.address : x.value;
}

// 0 stands for "perturb nothing": without a gradient there is no direction, and a gradient that is
// not finite would put nan into every weight.
static inline SAMKERNELS_HOST_DEVICE float PerturbScale(float norm, float rho, float eps) {
  return norm > 0.0f && norm <= kLargestFloat ? rho / (norm + eps) : 0.0f;
}

// w + e(w), e(w) = scale * s^2 * g, s = |w| if adaptive, else 1. scale is not 0.
static inline SAMKERNELS_HOST_DEVICE float Perturbed(float w, float g, float scale, bool adaptive) {
  const float direction = adaptive ? w * w * g : g;
  return w + scale * direction;
}

// The factor of tensor i, if HasCoefficient: numerator / (denominator + eps) / grad_scale.
static inline SAMKERNELS_HOST_DEVICE float Coefficient(const Recombination& r, int64_t tensor) {
  float coefficient = 1.0f;
  if (r.numerator != nullptr) {
    const int64_t i = r.norm_stride * tensor;
    coefficient = r.numerator[i] / (r.denominator[i] + r.eps);
  }
  return r.grad_scale != nullptr ? coefficient / *r.grad_scale : coefficient;
}

static inline SAMKERNELS_HOST_DEVICE bool HasCoefficient(const Recombination& r) {
  return r.numerator != nullptr || r.grad_scale != nullptr;
}

static inline SAMKERNELS_HOST_DEVICE bool IsSkipped(const Recombination& r) {
  return (r.ascent_norm != nullptr && !IsFinite(*r.ascent_norm)) ||
         (r.found_inf != nullptr && *r.found_inf != 0.0f);
}

static inline SAMKERNELS_HOST_DEVICE float Scaled(float x, float coefficient,
                                                  bool has_coefficient) {
  return has_coefficient ? coefficient * x : x;
}

// u from signs: |magnitude| * sign(sign).
static inline SAMKERNELS_HOST_DEVICE float WithSign(float magnitude, float sign) {
  return fabsf(magnitude) * Sign(sign);
}

enum class Momentum { kNone, kInit, kRunning };

static inline SAMKERNELS_HOST_DEVICE Momentum MomentumOf(const SgdOptions& o) {
  return !o.has_momentum ? Momentum::kNone : o.init_momentum ? Momentum::kInit : Momentum::kRunning;
}

// The new weight, with lr = Read(o.lr); buf is read if it is running, and written unless there is
// none.
template <Momentum kMomentum>
static inline SAMKERNELS_HOST_DEVICE float SgdUpdated(const SgdOptions& o, float lr, float w,
                                                      float u, float& buf) {
  u = o.gradient_sign * u;
  if (o.weight_decay != 0.0f) u = u + o.weight_decay * w;
  if (kMomentum != Momentum::kNone) {
    buf = kMomentum == Momentum::kInit ? u : o.momentum * buf + o.one_minus_dampening * u;
    u = o.nesterov ? u + o.momentum * buf : buf;
  }
  return w - lr * u;
}

// What SGDHess puts in the gradient's place: d is |Hv|, or its mean over the spatial positions.
static inline SAMKERNELS_HOST_DEVICE float ScaledByCurvature(float g, float rho, float d) {
  return g * (1.0f + rho * d);
}

}  // namespace samkernels
