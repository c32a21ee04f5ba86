#include "blocks.h"
#include "cpu_ops.h"

#define SAMKERNELS_STRING_(x) #x
#define SAMKERNELS_STRING(x) SAMKERNELS_STRING_(x)

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

extern const OpTable kOps;
const OpTable kOps = {SAMKERNELS_STRING(SAMKERNELS_CPU_VARIANT),
                      kChunkSize,
                      Norms,
                      Perturb,
                      Restore,
                      Recombine,
                      Sgd,
                      SgdHess,
                      Adam,
                      Compare};

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
