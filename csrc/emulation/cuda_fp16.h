#pragma once

#include "../cpu/half.h"

struct __half {
  samkernels::cpu::Float16 value;
};

inline float __half2float(__half x) { return samkernels::cpu::ToFloat(x.value); }

inline __half __float2half_rn(float x) {
  __half result;
  samkernels::cpu::FromFloat(x, &result.value);
  return result;
}
