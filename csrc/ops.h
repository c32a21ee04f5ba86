// Entry points of the core. Torch-free: tensors are addresses and element counts.
//
// An op works on lists of tensors. Lists are walked together: tensor i has tensors.numel[i]
// elements of tensors.dtype in every list, densely packed, in the same order. Arithmetic is in
// fp32, sums in fp32 or better. [in] is read, [out] is overwritten; addresses are host or device
// memory, as the table of ops says.
#pragma once

#include <cstdint>

namespace samkernels {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

using ReadOnlyList = const void* const*;  // [num_tensors] addresses
using MutableList = void* const*;         // [num_tensors] addresses

// The shapes that all lists of one op share, and how they are cut into chunks (chunk_plan.h).
struct Tensors {
  DType dtype;
  int64_t num_tensors;
  const int64_t* numel;        // [num_tensors]
  const int64_t* first_chunk;  // [num_tensors + 1]
  int64_t chunk_size;
  int64_t total_numel;
};

// Room for the partial sums of an op that reduces num_sums values at once.
constexpr int64_t WorkspaceBytes(int64_t num_chunks, int64_t num_tensors, int num_sums) {
  return 8 * (num_sums * (num_chunks + num_tensors) + num_tensors + 1);
}

// Where and how an op runs.
struct Execution {
  void* stream = nullptr;  // cudaStream_t; unused on the host
  int num_threads = 1;     // threads on the host; unused on a device
};

// A hyperparameter: a number, or an address in the op's memory where a number lies that may change
// without the host (CUDA graphs).
struct Scalar {
  float value;
  const float* address;  // or null
};

constexpr int kNormsSums = 2;  // without weights, 1
constexpr int kCompareSums = 6;
constexpr int kSecondSquares = 1;  // the sum of g2^2 among them

// norm_i = ||x_i||_2; total over all i. If weights are given, ||weights_i * x_i||_2 first.
struct NormsArgs {
  Tensors tensors;
  ReadOnlyList x;        // [in]
  ReadOnlyList weights;  // [in] or null
  void* workspace;       // [out] WorkspaceBytes(.., kNormsSums)
  float* per_tensor;     // [out] [num_tensors]; with weights [2][num_tensors]
  float* total;          // [out] [1]; with weights [2]
};

// old_params = w;  w += scale * s^2 * g,  scale = rho / (norm + eps), s = |w| if adaptive, else 1.
// A norm that is zero or not finite leaves w as it is.
struct PerturbArgs {
  Tensors tensors;
  MutableList params;      // [in, out] w
  ReadOnlyList grads;      // [in] g1
  MutableList old_params;  // [out]
  const float* norm;       // [in] [1]
  Scalar rho;              // negative: away from the gradient
  float eps;
  bool adaptive;
  bool rounds_at_random;  // bfloat16 parameters
};

// params = old_params, bit for bit.
struct RestoreArgs {
  Tensors tensors;
  MutableList params;       // [out]
  ReadOnlyList old_params;  // [in]
};

// What takes the gradient's place:
//   u = |magnitude| * sign(sign)                          if `sign` is given, else
//   u = (numerator / (denominator + eps)) * magnitude     if `numerator` is given, else
//   u = magnitude,
// divided by grad_scale if that is given.
struct Recombination {
  ReadOnlyList magnitude;    // [in]
  ReadOnlyList sign;         // [in] or null
  const float* numerator;    // [in] [1 + norm_stride * (num_tensors - 1)] or null
  const float* denominator;  // [in] as numerator
  int norm_stride;           // 0: one norm for all tensors; 1: one per tensor
  float eps;
  const float* ascent_norm;  // [in] [1] or null. Not finite: the step is skipped (see
                             // RecombineArgs, SgdArgs, AdamArgs).
  const float* grad_scale;   // [in] [1] or null
  const float* found_inf;    // [in] [1] or null. Not 0: the step is skipped.
};

// out = u; 0 where the step is skipped.
struct RecombineArgs {
  Tensors tensors;
  Recombination recombination;
  MutableList out;  // [out], may be one of the lists that are read
};

// torch.optim.SGD on the restored weights, reading w from old_params:
//   u = gradient_sign * u + weight_decay * w
//   buf = u if init_momentum else momentum * buf + (1 - dampening) * u
//   d = u + momentum * buf if nesterov else buf;  params = w - lr * d
// A skipped step restores params and leaves buf (0 if init_momentum).
struct SgdOptions {
  Scalar lr;
  float momentum;
  float one_minus_dampening;
  float weight_decay;
  float gradient_sign;  // -1 to maximize, else 1
  bool nesterov;
  bool has_momentum;
  bool init_momentum;
};

struct SgdArgs {
  Tensors tensors;
  Recombination recombination;
  MutableList params;           // [out]
  ReadOnlyList old_params;      // [in] w
  MutableList momentum_buffer;  // [in, out], null without momentum
  SgdOptions options;
};

// How a tensor lies around its spatial positions: [..][count][stride] in memory. The positions of
// a convolution's kernel have stride 1 if contiguous, the number of input channels in
// channels_last; a tensor without spatial dimensions has one position.
struct Positions {  // both below 2^31
  int64_t count;
  int64_t stride;
};

// torch.optim.SGD with u = g * (1 + rho * D) in the gradient's place. D is the mean of |Hv| over
// the positions, added up in their order.
struct SgdHessArgs {
  Tensors tensors;
  MutableList params;             // [in, out] w
  ReadOnlyList grads;             // [in] g
  ReadOnlyList hessian_products;  // [in] Hv
  MutableList momentum_buffer;    // [in, out], null without momentum
  const Positions* positions;     // [num_tensors]
  Scalar rho;
  SgdOptions options;
};

// How many steps were made with each tensor.
struct StepCounts {
  MutableList address;    // [in, out] whole numbers in float32 or float64
  const bool* is_double;  // [num_tensors]
};

// For t steps: 1 - beta1^t and sqrt(1 - beta2^t).
struct BiasCorrections {
  float first;
  float second_sqrt;
};

// torch.optim.Adam or AdamW on the restored weights, reading w from old_params:
//   u = gradient_sign * u;  u += weight_decay * w, or w *= 1 - lr * weight_decay if decoupled
//   t += 1;  m = beta1 * m + (1 - beta1) * u;  v = beta2 * v + (1 - beta2) * u^2
//   params = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// A skipped step restores params and leaves m, v and t.
struct AdamOptions {
  Scalar lr;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float weight_decay;
  float gradient_sign;  // -1 to maximize, else 1
  bool decoupled;
  double exact_beta1;  // for the bias corrections: in float32, 1 - 0.999 is off by 1e-5
  double exact_beta2;
};

struct AdamArgs {
  Tensors tensors;
  Recombination recombination;
  MutableList params;                 // [out]
  ReadOnlyList old_params;            // [in] w
  MutableList exp_avg;                // [in, out] m
  MutableList exp_avg_sq;             // [in, out] v
  StepCounts steps;                   // t
  BiasCorrections* bias_corrections;  // [out] [num_tensors]
  AdamOptions options;
};

// Sums over all elements of g1^2, g2^2, g1 * g2, [|g2| > |g1|], [g1 * g2 > 0] and w^2, in this
// order; and the norms of g2, as NormsArgs has them.
struct CompareArgs {
  Tensors tensors;
  ReadOnlyList first_grads;   // [in] g1
  ReadOnlyList second_grads;  // [in] g2
  ReadOnlyList weights;       // [in] w
  void* workspace;            // [out] WorkspaceBytes(.., kCompareSums)
  double* sums;               // [out] [kCompareSums]
  float* per_tensor;          // [out] [num_tensors]
  float* total;               // [out] [1]
};

// One implementation of every op.
struct OpTable {
  const char* name;
  int64_t chunk_size;  // elements; the Tensors given to an op are planned with it
  void (*norms)(const NormsArgs&, const Execution&);
  void (*perturb)(const PerturbArgs&, const Execution&);
  void (*restore)(const RestoreArgs&, const Execution&);
  void (*recombine)(const RecombineArgs&, const Execution&);
  void (*sgd)(const SgdArgs&, const Execution&);
  void (*sgd_hess)(const SgdHessArgs&, const Execution&);
  void (*adam)(const AdamArgs&, const Execution&);
  void (*compare)(const CompareArgs&, const Execution&);
};

// The widest instruction set that was compiled and that this processor has.
const OpTable& CpuOps();

#ifdef SAMKERNELS_WITH_CUDA
const OpTable& CudaOps();
// nullptr if a kernel can be launched, else why not.
const char* WhyNoCuda();
#endif

}  // namespace samkernels
