// The arithmetic of perturb, recombine and update, per element, in fp32. Written once: the CPU and
// the CUDA ops call these functions. Contraction into fused multiply-adds is switched off in the
// build, so that both give the same bits from the same inputs.
//
// `static`: the CPU ops are compiled once per instruction set, and an inline function shared
// between those objects would let the linker pick the version that the processor at hand does not
// have.
#pragma once

#include <math.h>
#include <string.h>

#include "ops.h"

#ifdef __CUDACC__
#define SAMKERNELS_HOST_DEVICE __host__ __device__
#else
#define SAMKERNELS_HOST_DEVICE
#endif

namespace samkernels {

constexpr float kLargestFloat = 3.40282346638528859812e+38f;

static inline SAMKERNELS_HOST_DEVICE uint32_t BitsOf(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

static inline SAMKERNELS_HOST_DEVICE float FromBits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

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

// Random bits from a number: a bijection (C. Wellons, "lowbias32").
static inline SAMKERNELS_HOST_DEVICE uint32_t Mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Where the random numbers of a tensor's rounding start. The norm is another one in every step, so
// no state is kept, and the same inputs give the same bits.
static inline SAMKERNELS_HOST_DEVICE uint32_t RoundingKey(float norm, int64_t tensor) {
  return Mixed(BitsOf(norm) ^ Mixed(static_cast<uint32_t>(tensor)));
}

// x rounded to a bfloat16, up or down at random, so that it is x on average: nearest rounding would
// lose a perturbation that is smaller than half a step of the weight.
// place: of the element in its tensor's memory.
static inline SAMKERNELS_HOST_DEVICE float RoundedAtRandom(float x, uint32_t key, int64_t place) {
  if (!IsFinite(x)) return x;
  const uint32_t random = Mixed(key + static_cast<uint32_t>(place));
  return FromBits((BitsOf(x) + (random & 0xffffu)) & 0xffff0000u);
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

// base^exponent, 0 <= base < 1, for a whole number; 1 for what is below 1 or nan. By squaring, in
// an order that every backend keeps: the pow of one library gives other bits than that of the next.
static inline SAMKERNELS_HOST_DEVICE double Power(double base, double exponent) {
  const double largest = 4611686018427387904.0;  // 2^62: no integer holds much more
  int64_t rest = 0;
  if (exponent >= 1.0) rest = static_cast<int64_t>(exponent < largest ? exponent : largest);
  double power = 1.0;
  for (; rest > 0; rest /= 2) {
    if (rest % 2 == 1) power *= base;
    base *= base;
  }
  return power;
}

// For t steps.
static inline SAMKERNELS_HOST_DEVICE BiasCorrections BiasCorrectionsOf(const AdamOptions& o,
                                                                       double t) {
  return {static_cast<float>(1.0 - Power(o.exact_beta1, t)),
          static_cast<float>(sqrt(1.0 - Power(o.exact_beta2, t)))};
}

// Adds this step to the count at `address`, unless it is skipped. How many there are with it.
static inline SAMKERNELS_HOST_DEVICE double Counted(void* address, bool is_double, bool skipped) {
  double* in_double = static_cast<double*>(address);
  float* in_float = static_cast<float*>(address);
  const double t = (is_double ? *in_double : *in_float) + 1.0;
  if (!skipped && is_double) *in_double = t;
  if (!skipped && !is_double) *in_float = static_cast<float>(t);
  return t;
}

// What all elements of a tensor share.
struct AdamScalars {
  float step_size;
  float shrink;  // of the weight, if the decay is decoupled
  float bias_correction2_sqrt;
};

static inline SAMKERNELS_HOST_DEVICE AdamScalars AdamScalarsOf(const AdamOptions& o,
                                                               const BiasCorrections& corrections) {
  const float lr = Read(o.lr);
  return {lr / corrections.first, 1.0f - lr * o.weight_decay, corrections.second_sqrt};
}

// Which of the two arithmetics: without weight decay either.
static inline SAMKERNELS_HOST_DEVICE bool DecaysGradient(const AdamOptions& o) {
  return !o.decoupled && o.weight_decay != 0.0f;
}

// The new weight; m and v are updated.
static inline SAMKERNELS_HOST_DEVICE float AdamUpdated(const AdamOptions& o, const AdamScalars& s,
                                                       bool decays_gradient, float w, float u,
                                                       float& m, float& v) {
  u = o.gradient_sign * u;
  if (decays_gradient) {
    u = u + o.weight_decay * w;
  } else {
    w = s.shrink * w;  // 1 without weight decay
  }
  m = o.beta1 * m + o.one_minus_beta1 * u;
  v = o.beta2 * v + o.one_minus_beta2 * u * u;
  return w - s.step_size * m / (sqrtf(v) / s.bias_correction2_sqrt + o.eps);
}

}  // namespace samkernels
