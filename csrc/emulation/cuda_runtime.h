// Stands in for CUDA's header where kernels are compiled for the CPU: what the kernels of csrc/cuda
// use, and no more.
#pragma once

#include <math.h>  // the functions of <cmath> without std::, as in CUDA

#include <bit>
#include <cstdint>

#include "emulation/cuda_runtime_api.h"
#include "emulation/emulation.h"
#include "emulation/synchronization.h"
#include "emulation/vector_types.h"

// Words for where code runs and data lie.
#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define __shared__ _Pragma("GCC error \"__shared__ is not emulated: use dynamic_shared()\"")

// Functions of numbers that C++ does not know.
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// Loads that say how they are cached, which changes nothing here.
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}

// Threads run by turns, and what one wrote is in memory at once.
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline void __threadfence() {}
