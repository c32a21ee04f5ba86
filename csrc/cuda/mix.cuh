// Holds what mix and the fused updates share.
#pragma once

#include "../update_math.h"
#include "vectors.cuh"

namespace samkernels::cuda {

// Calls f(std::true_type()) if u is made of two lists, else f(std::false_type()).
template <typename F>
void DispatchHasY(const Mix& mix, const F& f) {
  if (mix.y) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

}  // namespace samkernels::cuda
