// Numbers of a GPU thread: conversions, and arithmetic of one name for float and double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/calls.h"

namespace introkernels::cuda {

// The bits of the half types. Kernels load and store them as such.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__host__ __device__ constexpr int64_t size_of(NumberType type) {
  return type == NumberType::kFloat64 ? 8 : type == NumberType::kFloat32 ? 4 : 2;
}

// What loads and stores of S are computed in.
template <typename S>
using Computed = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename T>
constexpr T kNever = -std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
// A bfloat16 is the upper half of a float.
__device__ __forceinline__ float widened(BFloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float widened(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <typename S>
__device__ __forceinline__ S narrowed(Computed<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<S, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
}

// 2^x to 2 units in the last place. Results of floats below the smallest normal number are 0, which
// takes one instruction instead of five; a softmax has no use for them.
__device__ __forceinline__ float exp2_of(float x) {
#if defined(INTROKERNELS_EMULATION)
  const float y = exp2f(x);
  return y < std::numeric_limits<float>::min() ? 0.0F : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

__device__ __forceinline__ float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_of(double a, double b, double c) { return fma(a, b, c); }
// The larger of two numbers; NaN only where both are.
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }

// Not fused with an addition, so that what is subtracted from itself is nothing.
__device__ __forceinline__ float product_of(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product_of(double a, double b) { return __dmul_rn(a, b); }

__device__ __forceinline__ void store_number(void* data, bool is_double, int64_t index,
                                             double value) {
  if (is_double) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = float(value);
  }
}

}  // namespace introkernels::cuda
