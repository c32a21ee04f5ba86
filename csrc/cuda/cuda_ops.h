// The ops on device memory. They enqueue work on the given stream of the current device and return.
#pragma once

#include <cuda_runtime.h>

#include "../ops.h"

namespace samkernels::cuda {

void Norms(const NormsArgs& args, const Execution& execution);
void Perturb(const PerturbArgs& args, const Execution& execution);
void Restore(const RestoreArgs& args, const Execution& execution);
void Recombine(const RecombineArgs& args, const Execution& execution);
void Sgd(const SgdArgs& args, const Execution& execution);
void SgdHess(const SgdHessArgs& args, const Execution& execution);
void Adam(const AdamArgs& args, const Execution& execution);
void Compare(const CompareArgs& args, const Execution& execution);

// cudaSuccess if the build holds code that the current device can run.
cudaError_t KernelImageError();

}  // namespace samkernels::cuda
