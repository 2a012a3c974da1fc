// Numbers of a GPU thread: conversions, exponentials, and a wrapper that gives one number the
// operations which csrc/common asks of a backend's number type.
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

template <typename S>
constexpr bool is_half_type = sizeof(S) == 2;

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
// A logarithm that no exponential comes back from, yet finite: 0 times infinity is no number.
template <typename T>
constexpr T kVeryFar = sizeof(T) == 8 ? T(1e308) : T(3e38);
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
__device__ __forceinline__ float min_of(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double min_of(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float abs_of(float x) { return fabsf(x); }
__device__ __forceinline__ double abs_of(double x) { return fabs(x); }

// exp(x) - 1 - x for |x| <= 1: x^2 times the polynomial that interpolates the rest at Chebyshev
// nodes of the interval; it errs by 6e-9 (float) and 2e-17 (double) of its value.
__device__ __forceinline__ float exp_rest(float x) {
  float p = fmaf(x, 2.806280258e-6F, 2.535851224e-5F);
  p = fmaf(p, x, 0.0001983810197F);
  p = fmaf(p, x, 0.001388539691F);
  p = fmaf(p, x, 0.008333339676F);
  p = fmaf(p, x, 0.0416667366F);
  p = fmaf(p, x, 0.1666666665F);
  p = fmaf(p, x, 0.4999999978F);
  return x * x * p;
}
__device__ __forceinline__ double exp_rest(double x) {
  double p = fma(x, 7.7461785930188274892e-13, 1.1639194124150522395e-11);
  p = fma(p, x, 1.6057679623801637746e-10);
  p = fma(p, x, 2.0874435575864274724e-9);
  p = fma(p, x, 2.5052117695907823572e-8);
  p = fma(p, x, 2.755733506893372671e-7);
  p = fma(p, x, 2.7557319191381816996e-6);
  p = fma(p, x, 0.000024801587246096816904);
  p = fma(p, x, 0.00019841269841324197917);
  p = fma(p, x, 0.0013888888888981404452);
  p = fma(p, x, 0.0083333333333332993552);
  p = fma(p, x, 0.041666666666666088346);
  p = fma(p, x, 0.16666666666666666701);
  p = fma(p, x, 0.5000000000000000059);
  return x * x * p;
}

// One number with the operations of csrc/common.
struct Double {
  double v = 0;

  __device__ __forceinline__ static Double of(double v) { return {v}; }
};
__device__ __forceinline__ Double operator+(Double a, Double b) { return {a.v + b.v}; }
__device__ __forceinline__ Double operator-(Double a, Double b) { return {a.v - b.v}; }
__device__ __forceinline__ Double operator-(Double a) { return {-a.v}; }
__device__ __forceinline__ Double operator*(Double a, Double b) { return {a.v * b.v}; }
__device__ __forceinline__ Double operator/(Double a, Double b) { return {a.v / b.v}; }
__device__ __forceinline__ bool operator<(Double a, Double b) { return a.v < b.v; }
__device__ __forceinline__ bool operator>(Double a, Double b) { return a.v > b.v; }
__device__ __forceinline__ bool operator==(Double a, Double b) { return a.v == b.v; }
__device__ __forceinline__ Double select(bool condition, Double a, Double b) {
  return condition ? a : b;
}
__device__ __forceinline__ Double sqrt(Double a) { return {::sqrt(a.v)}; }

}  // namespace introkernels::cuda
