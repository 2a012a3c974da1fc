// Stands in for CUDA's header where kernels are compiled for the CPU: float16.
#pragma once

#include "emulation/half_number.h"
#include "emulation/vector_types.h"

using __half = emulation::HalfNumber<emulation::Binary16>;
using __half2 = emulation::HalfPair<emulation::Binary16>;
using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits(); }
inline __half __ushort_as_half(unsigned short bits) { return __half::of_bits(bits); }
inline short __half_as_short(__half x) { return short(x.bits()); }
inline __half __short_as_half(short bits) { return __half::of_bits(uint16_t(bits)); }

inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
