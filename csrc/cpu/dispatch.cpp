// Picks the instruction set at run time, so that one build runs on every processor of its
// architecture. SAMKERNELS_CPU_VARIANT=baseline in the environment insists on the plainest.
#include <cstdlib>
#include <cstring>

#include "../ops.h"

namespace samkernels {

namespace cpu::baseline {
extern const OpTable kOps;
}
#ifdef SAMKERNELS_WITH_AVX2
namespace cpu::avx2 {
extern const OpTable kOps;
}
#endif

const OpTable& CpuOps() {
#ifdef SAMKERNELS_WITH_AVX2
  __builtin_cpu_init();
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const char* wanted = std::getenv("SAMKERNELS_CPU_VARIANT");
  static const bool insists = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  if (has_avx2 && !insists) return cpu::avx2::kOps;
#endif
  return cpu::baseline::kOps;
}

}  // namespace samkernels
