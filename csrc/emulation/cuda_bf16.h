#pragma once

#include "../cpu/half.h"

struct __nv_bfloat16 {
  samkernels::cpu::BFloat16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) { return samkernels::cpu::ToFloat(x.value); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 result;
  samkernels::cpu::FromFloat(x, &result.value);
  return result;
}
