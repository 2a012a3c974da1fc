// Stands in for CUDA's header where kernels are compiled for the CPU: what kernels may use.
#pragma once

#include "emulation/atomics.h"
#include "emulation/cuda_runtime_api.h"
#include "emulation/device_math.h"
#include "emulation/emulation.h"
#include "emulation/loads.h"
#include "emulation/qualifiers.h"
#include "emulation/synchronization.h"
#include "emulation/vector_types.h"
