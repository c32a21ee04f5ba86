// Does the arithmetic of perturb, mix and update, per element, in fp32. It is written once: the CPU
// and the CUDA ops call these functions. Contraction into fused multiply-adds is switched off in
// the build, so that both give the same bits from the same inputs.
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

#ifdef _MSC_VER
#pragma fp_contract(off)
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

// Returns what torch.sign does: 0 for 0 and for nan.
static inline SAMKERNELS_HOST_DEVICE float Sign(float x) {
  return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f);
}

static inline SAMKERNELS_HOST_DEVICE float Read(const Scalar& x, int64_t tensor = 0) {
  return x.address ? x.address[x.stride * tensor] : x.value;
}

static inline SAMKERNELS_HOST_DEVICE float NormOf(double square) {
  return static_cast<float>(sqrt(square));
}

// Says whether NormOf(square) is finite, without the root, which is far dearer: roots round to
// infinity from (2^128 - 2^103)^2 on.
static inline SAMKERNELS_HOST_DEVICE bool HasFiniteRoot(double square) {
  return square >= 0.0 && square < 1.1579208233556995e+77;
}

// Returns the scale of e(w). 0 stands for "perturb nothing": without a gradient there is no
// direction, and a gradient that is not finite would put nan into every weight.
static inline SAMKERNELS_HOST_DEVICE float PerturbScale(float norm, float rho, float eps) {
  return norm > 0.0f && norm <= kLargestFloat ? rho / (norm + eps) : 0.0f;
}

// Returns T of one weight.
static inline SAMKERNELS_HOST_DEVICE float WeightScale(float w, float eta) {
  return fabsf(w) + eta;
}

// Returns w + e(w), e(w) = scale * T^2 * d. Where scale is 0, it is not to be used.
static inline SAMKERNELS_HOST_DEVICE float Perturbed(float w, float d, float scale, bool scaled,
                                                     float eta) {
  const float t = WeightScale(w, eta);
  return w + scale * (scaled ? t * t * d : d);
}

// Makes random bits from a number, by a bijection (C. Wellons, "lowbias32").
static inline SAMKERNELS_HOST_DEVICE uint32_t Scrambled(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Returns where the random numbers of a tensor's rounding start. The norm differs in every step, so
// no state is kept, and the same inputs give the same bits.
static inline SAMKERNELS_HOST_DEVICE uint32_t RoundingKey(float norm, int64_t tensor) {
  return Scrambled(BitsOf(norm) ^ Scrambled(static_cast<uint32_t>(tensor)));
}

// Rounds x to a bfloat16, up or down at random, so that it is x on average: nearest rounding would
// lose a perturbation that is smaller than half a step of the weight. `place` is that of the
// element in its tensor's memory.
static inline SAMKERNELS_HOST_DEVICE float RoundedAtRandom(float x, uint32_t key, int64_t place) {
  if (!IsFinite(x)) return x;
  const uint32_t random = Scrambled(key + static_cast<uint32_t>(place));
  return FromBits((BitsOf(x) + (random & 0xffffu)) & 0xffff0000u);
}

// Holds what all elements of a tensor share in a mix.
struct MixScalars {
  float a;
  float b;
  float whole;  // in place of `a` where kDamp does not damp
};

static inline SAMKERNELS_HOST_DEVICE MixScalars MixScalarsOf(const Mix& mix, int64_t tensor) {
  const float a = Read(mix.a, tensor);
  const float b = Read(mix.b, tensor);
  if (mix.divisor == nullptr) return {a, b, 1.0f};
  return {a / *mix.divisor, b / *mix.divisor, 1.0f / *mix.divisor};
}

static inline SAMKERNELS_HOST_DEVICE bool IsSkipped(const Mix& mix) {
  return (mix.ascent_square != nullptr && !HasFiniteRoot(*mix.ascent_square)) ||
         (mix.found_inf != nullptr && *mix.found_inf != 0.0f);
}

// Says whether 0 < x / d < 1 as floats, where the quotient may round to 0 but never up to 1.
static inline SAMKERNELS_HOST_DEVICE bool IsProperFraction(float x, float d) {
  const float along = d < 0.0f ? -x : x;
  const float size = fabsf(d);
  // The quotient rounds to 0 up to 2^-150.
  return along > 0.0f && along < size && along * 0x1p75f > size * 0x1p-75f;
}

// Returns u of one element. All functions share one multiplication, without a branch: the loops
// stay short.
template <bool kHasY>
static inline SAMKERNELS_HOST_DEVICE float Mixed(Function function, const MixScalars& s, float x,
                                                 float y) {
  if (!kHasY) return s.a * x;
  const bool stays = function == Function::kDamp && !IsProperFraction(x, y + 1e-8f);
  const float product = function == Function::kSign      ? fabsf(x) * Sign(y)
                        : function == Function::kProduct ? x * y
                                                         : x;
  const float u = (stays ? s.whole : s.a) * product;
  return function == Function::kLinear ? u + s.b * y : u;
}

// Holds what all elements share.
struct SgdScalars {
  float lr;
  float one_minus_dampening;
};

static inline SAMKERNELS_HOST_DEVICE SgdScalars SgdScalarsOf(const SgdOptions& o) {
  return {Read(o.lr), Read(o.one_minus_dampening)};
}

// Returns the new weight; buf becomes the new buffer if there is one.
template <bool kHasBuffer>
static inline SAMKERNELS_HOST_DEVICE float SgdUpdated(const SgdOptions& o, const SgdScalars& s,
                                                      float w, float u, float& buf) {
  u = o.gradient_sign * u;
  if (o.weight_decay != 0.0f) u = u + o.weight_decay * w;
  if (kHasBuffer) {
    buf = o.init_momentum ? u : o.momentum * buf + s.one_minus_dampening * u;
    u = o.nesterov ? u + o.momentum * buf : buf;
  }
  return w - s.lr * u;
}

// Returns what SGDHess puts in the gradient's place: d is |Hv|, or its mean over the positions.
static inline SAMKERNELS_HOST_DEVICE float ScaledByCurvature(float g, float rho, float d) {
  return g * (1.0f + rho * d);
}

// Returns base^exponent, 0 <= base < 1, for a whole number; 1 for what is below 1 or nan. It
// squares in an order that every backend keeps: the pow of one library gives other bits than that
// of the next.
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

// Returns the corrections for t steps.
static inline SAMKERNELS_HOST_DEVICE BiasCorrections BiasCorrectionsOf(const AdamOptions& o,
                                                                       double t) {
  return {static_cast<float>(1.0 - Power(o.exact_beta1, t)),
          static_cast<float>(sqrt(1.0 - Power(o.exact_beta2, t)))};
}

// Adds this step to the count at `address`, unless it is skipped, and returns the new count.
static inline SAMKERNELS_HOST_DEVICE double Counted(void* address, bool is_double, bool skipped) {
  double* in_double = static_cast<double*>(address);
  float* in_float = static_cast<float*>(address);
  const double t = (is_double ? *in_double : *in_float) + 1.0;
  if (!skipped && is_double) *in_double = t;
  if (!skipped && !is_double) *in_float = static_cast<float>(t);
  return t;
}

// Holds what all elements of a tensor share.
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

// Says whether weight decay changes the gradient, and not the weight; without any, either is right.
static inline SAMKERNELS_HOST_DEVICE bool DecaysGradient(const AdamOptions& o) {
  return !o.decoupled && o.weight_decay != 0.0f;
}

// Returns the new weight, and updates m and v.
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
