// Mathematics that several compilation targets share has to be inlined: a function that is emitted
// once and shared by the linker could hold instructions which the caller's machine lacks.
#pragma once

#if defined(__CUDACC__)
#define INTROKERNELS_INLINE __host__ __device__ __forceinline__
#else
#define INTROKERNELS_INLINE inline __attribute__((always_inline))
#endif
