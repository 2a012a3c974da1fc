// Stands in for CUDA's header where kernels are compiled for the CPU: float16.
#pragma once

#include "emulation/half_number.h"

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) { return emulation::widened(x.bits); }
inline __half __float2half_rn(float x) { return {emulation::narrowed<emulation::Binary16>(x)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
