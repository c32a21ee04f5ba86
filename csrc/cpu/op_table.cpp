#include "../op_functions.h"
#include "blocks.h"

#define SAMKERNELS_STRING_(x) #x
#define SAMKERNELS_STRING(x) SAMKERNELS_STRING_(x)

namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {

extern const OpTable kOps;
const OpTable kOps = TableOf(SAMKERNELS_STRING(SAMKERNELS_CPU_VARIANT), kChunkSize);

}  // namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT
