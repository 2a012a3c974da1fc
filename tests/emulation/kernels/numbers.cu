// Conversions and functions of single numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "report.h"

EXPORTED void widen_half(const unsigned short* bits, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = __half2float(__ushort_as_half(bits[i]));
}
EXPORTED void narrow_half(const float* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __half_as_ushort(__float2half_rn(x[i]));
}
EXPORTED void narrow_bfloat16(const float* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}

EXPORTED float product(float a, float b) { return __fmul_rn(a, b); }
EXPORTED double product_of_doubles(double a, double b) { return __dmul_rn(a, b); }
EXPORTED float of_bits(unsigned bits) { return __uint_as_float(bits); }
