// Conversions and functions of single numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "report.h"

EXPORTED void widen_half(const unsigned short* bits, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = __half2float(__ushort_as_half(bits[i]));
}
EXPORTED void widen_bfloat16(const unsigned short* bits, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
}
EXPORTED void narrow_half(const float* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __half_as_ushort(__float2half_rn(x[i]));
}
EXPORTED void narrow_bfloat16(const float* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}
EXPORTED void narrow_double_half(const double* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __half_as_ushort(__double2half(x[i]));
}
EXPORTED void narrow_double_bfloat16(const double* x, int count, unsigned short* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __bfloat16_as_ushort(__double2bfloat16(x[i]));
}

EXPORTED float larger(float x, float y) { return fmaxf(x, y); }
EXPORTED float smaller(float x, float y) { return fminf(x, y); }
EXPORTED float reciprocal_root(float x) { return rsqrtf(x); }
EXPORTED unsigned high_product(unsigned x, unsigned y) { return __umulhi(x, y); }
EXPORTED int first_bit(int x) { return __ffs(x); }
EXPORTED int leading_zeros(int x) { return __clz(x); }
EXPORTED unsigned bits_of(float x) { return __float_as_uint(x); }
