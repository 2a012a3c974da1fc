// The kernels for 512-bit registers (Skylake-X, Zen 4 and later).
#include "cpu/simd/prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// GCC 12 takes the undefined vectors inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define INTROKERNELS_TARGET avx512
#define INTROKERNELS_AVX512
#define INTROKERNELS_REGISTER_BYTES 64
#include "cpu/simd/kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
