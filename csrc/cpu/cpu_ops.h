// The ops on host memory. These files are compiled once per instruction set, with
// SAMKERNELS_CPU_VARIANT (baseline, avx2) as the name of the namespace.
#pragma once

#include "../ops.h"

namespace samkernels::cpu {

namespace SAMKERNELS_CPU_VARIANT {
void Norms(const NormsArgs& args, const Execution& execution);
void Perturb(const PerturbArgs& args, const Execution& execution);
void Restore(const RestoreArgs& args, const Execution& execution);
void Recombine(const RecombineArgs& args, const Execution& execution);
void Sgd(const SgdArgs& args, const Execution& execution);
void SgdHess(const SgdHessArgs& args, const Execution& execution);
void Adam(const AdamArgs& args, const Execution& execution);
void Compare(const CompareArgs& args, const Execution& execution);
}  // namespace SAMKERNELS_CPU_VARIANT

}  // namespace samkernels::cpu
