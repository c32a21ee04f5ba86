// Declares the ops of one implementation, and their table. The sources of each include it: in those
// of csrc/cuda the namespace is cuda; those of csrc/cpu are compiled once per instruction set, with
// SAMKERNELS_CPU_VARIANT (baseline, avx2) as its name.
#pragma once

#include "ops.h"

#ifdef SAMKERNELS_CPU_VARIANT
namespace samkernels::cpu::SAMKERNELS_CPU_VARIANT {
#else
namespace samkernels::cuda {
#endif

// On a device they enqueue work on the given stream of the current one, and return.
void Dots(const DotsArgs& args, const Execution& execution);
void Perturb(const PerturbArgs& args, const Execution& execution);
void Restore(const RestoreArgs& args, const Execution& execution);
void MixLists(const MixArgs& args, const Execution& execution);
void Sgd(const SgdArgs& args, const Execution& execution);
void SgdHess(const SgdHessArgs& args, const Execution& execution);
void Adam(const AdamArgs& args, const Execution& execution);

static inline constexpr OpTable TableOf(const char* name, int64_t chunk_size) {
  return {name, chunk_size, Dots, Perturb, Restore, MixLists, Sgd, SgdHess, Adam};
}

}  // namespace
