// The kernels for 128-bit registers, which every 64-bit machine has.
#include "cpu/simd/prelude.h"

#define INTROKERNELS_TARGET baseline
#define INTROKERNELS_REGISTER_BYTES 16
#include "cpu/simd/kernels.inc.h"
