// The kernels for 256-bit registers (Haswell, Zen and later).
#include "cpu/simd/prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define INTROKERNELS_TARGET avx2
#define INTROKERNELS_AVX2
#define INTROKERNELS_REGISTER_BYTES 32
#include "cpu/simd/kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
