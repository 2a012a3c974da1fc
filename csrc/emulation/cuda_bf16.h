// Stands in for CUDA's header where kernels are compiled for the CPU: bfloat16.
#pragma once

#include "emulation/half_number.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {emulation::narrowed<emulation::BrainFloat16>(x)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
