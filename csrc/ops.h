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

// Returns the bytes of workspace that an op needs for the partial sums of num_sums values.
constexpr int64_t WorkspaceBytes(int64_t num_chunks, int64_t num_tensors, int num_sums) {
  return 8 * (num_sums * (num_chunks + num_tensors) + num_tensors + 1);
}

// Says where and how an op runs.
struct Execution {
  void* stream = nullptr;  // cudaStream_t; unused on the host
  int num_threads = 1;     // threads on the host; unused on a device
};

// Holds a number, or the address in the op's memory where it lies and may change without the host
// (CUDA graphs). There is one number for all tensors, or one for each.
struct Scalar {
  float value;
  const float* address;  // or null
  int64_t stride;        // from the number of one tensor to that of the next; 0: one for all
};

constexpr int kMaxDots = 6;

// Returns the number of sums that Dots makes of num_lists lists.
constexpr int NumDots(int num_lists, bool weighted) {
  return weighted ? 2 : num_lists == 1 ? 1 : num_lists == 2 ? 3 : kMaxDots;
}

// Sums over all elements of
//   x                   x * x
//   x with weights      (T * x)^2, x * x;  T = |weights| + eta
//   x, y                x * x, x * y, y * y
//   x, y, z             x * x, x * y, y * y, z * z, [|y| > |x|], [x * y > 0]
struct DotsArgs {
  Tensors tensors;
  ReadOnlyList lists[3];  // [in] x, y, z; null where there are less
  ReadOnlyList weights;   // [in] or null
  float eta;
  void* workspace;     // [out] WorkspaceBytes(.., NumDots)
  double* per_tensor;  // [out] [num_tensors][NumDots]
  double* total;       // [out] [NumDots]
};

// old_params = w;  params = w + scale * T^2 * d,  scale = rho / (sqrt(square) + eps),  T = |w| +
// eta if scaled, else 1. A square that is zero or has no finite root moves nothing of its tensor.
struct PerturbArgs {
  Tensors tensors;
  MutableList params;      // [in, out] w; [out] unless it saves
  ReadOnlyList direction;  // [in] d, may be old_params
  MutableList old_params;  // [out]; [in] w unless it saves
  const double* square;    // [in] [1 + square_stride * (num_tensors - 1)]
  int64_t square_stride;   // 0: one for all tensors
  Scalar rho;              // negative: against d
  float eps;
  bool scaled;
  float eta;
  bool rounds_at_random;  // bfloat16 parameters
  bool saves;
};

// params = old_params, bit for bit.
struct RestoreArgs {
  Tensors tensors;
  MutableList params;       // [out]
  ReadOnlyList old_params;  // [in]
};

// Names the function that makes u from the elements of x and y.
enum class Function : int {
  kLinear,   // a * x + b * y;  a * x without y
  kSign,     // a * |x| * sign(y)
  kDamp,     // a * x where 0 < x / (y + 1e-8) < 1, else x
  kProduct,  // a * x * y
};
constexpr int kFunctions = 4;

// Describes u, which takes the gradient's place. It is divided by `divisor` if that is given.
struct Mix {
  ReadOnlyList x;  // [in]
  ReadOnlyList y;  // [in] or null: then the function is linear
  Scalar a;
  Scalar b;
  Function function;
  const float* divisor;         // [in] [1] or null
  const double* ascent_square;  // [in] [1] or null. No finite root: the step is skipped (see
                                // MixArgs, SgdArgs, AdamArgs).
  const float* found_inf;       // [in] [1] or null. Not 0: the step is skipped.
};

// out = u. Where the step is skipped, out is what it was if this `keeps`, else 0.
struct MixArgs {
  Tensors tensors;
  Mix mix;
  bool keeps;
  MutableList out;  // [out], may be one of the lists that are read
};

// torch.optim.SGD on the restored weights, reading w from old_params:
//   u = gradient_sign * u + weight_decay * w
//   buf = u if init_momentum else momentum * buf + (1 - dampening) * u
//   d = u + momentum * buf if nesterov else buf;  params = w - lr * d
// A skipped step restores params and leaves buf; 0 if init_momentum, which is a first step again
// with 1 in the place of 1 - dampening.
struct SgdOptions {
  Scalar lr;
  float momentum;
  Scalar one_minus_dampening;
  float weight_decay;
  float gradient_sign;  // -1 to maximize, else 1
  bool nesterov;
  bool has_momentum;
  bool init_momentum;
};

struct SgdArgs {
  Tensors tensors;
  Mix mix;
  MutableList params;           // [out]
  ReadOnlyList old_params;      // [in] w
  MutableList momentum_buffer;  // [in, out], null without momentum
  SgdOptions options;
};

// Says how a tensor lies around its spatial positions: [..][count][stride] in memory. The positions
// of a convolution's kernel have stride 1 if contiguous, the number of input channels in
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

// Holds the number of steps that were made with each tensor.
struct StepCounts {
  MutableList address;    // [in, out] whole numbers in float32 or float64
  const bool* is_double;  // [num_tensors]
};

// Holds 1 - beta1^t and sqrt(1 - beta2^t) of a tensor with t steps.
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
  Mix mix;
  MutableList params;                 // [out]
  ReadOnlyList old_params;            // [in] w
  MutableList exp_avg;                // [in, out] m
  MutableList exp_avg_sq;             // [in, out] v
  StepCounts steps;                   // t
  BiasCorrections* bias_corrections;  // [out] [num_tensors]
  AdamOptions options;
};

// Holds one implementation of every op.
struct OpTable {
  const char* name;
  int64_t chunk_size;  // elements; the Tensors given to an op are planned with it
  void (*dots)(const DotsArgs&, const Execution&);
  void (*perturb)(const PerturbArgs&, const Execution&);
  void (*restore)(const RestoreArgs&, const Execution&);
  void (*mix)(const MixArgs&, const Execution&);
  void (*sgd)(const SgdArgs&, const Execution&);
  void (*sgd_hess)(const SgdHessArgs&, const Execution&);
  void (*adam)(const AdamArgs&, const Execution&);
};

// Returns the ops for the widest instruction set that was compiled and that this processor has.
const OpTable& CpuOps();

#ifdef SAMKERNELS_WITH_CUDA
const OpTable& CudaOps();
// Returns nullptr if a kernel can be launched, else the reason why not.
const char* WhyNoCuda();
#endif

}  // namespace samkernels
