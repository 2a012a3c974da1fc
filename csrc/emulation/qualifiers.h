// CUDA's words for where code runs and data lie.
#pragma once

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define __shared__ _Pragma("GCC error \"__shared__ is not emulated: use dynamic_shared()\"")
