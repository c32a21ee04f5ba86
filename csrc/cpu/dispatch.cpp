// Picks the instruction set at run time, so that one build runs on every processor of its
// architecture. SAMKERNELS_CPU_VARIANT=baseline in the environment insists on the plainest.
#include <cstdlib>
#include <cstring>

#include "../ops.h"

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace samkernels {

namespace cpu::baseline {
extern const OpTable kOps;
}
#ifdef SAMKERNELS_WITH_AVX2
namespace cpu::avx2 {
extern const OpTable kOps;
}
#endif

#ifdef SAMKERNELS_WITH_AVX2
// Says whether AVX2 and F16C are there, in the processor and in the system, which has to save the
// wider registers.
static bool HasAvx2() {
#ifdef _MSC_VER
  int registers[4];  // eax, ebx, ecx, edx
  __cpuid(registers, 0);
  if (registers[0] < 7) return false;
  __cpuid(registers, 1);
  constexpr int kSystemSaves = 1 << 27, kF16c = 1 << 29, kNeeded = kSystemSaves | kF16c;
  if ((registers[2] & kNeeded) != kNeeded || (_xgetbv(0) & 6) != 6) return false;
  __cpuidex(registers, 7, 0);
  return (registers[1] & 1 << 5) != 0;
#else
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
}
#endif

const OpTable& CpuOps() {
#ifdef SAMKERNELS_WITH_AVX2
  static const bool has_avx2 = HasAvx2();
  const char* wanted = std::getenv("SAMKERNELS_CPU_VARIANT");
  static const bool insists = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  if (has_avx2 && !insists) return cpu::avx2::kOps;
#endif
  return cpu::baseline::kOps;
}

}  // namespace samkernels
