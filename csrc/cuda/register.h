// Where the operators of this library are registered: those of GPU tensors, or in the emulation
// those of CPU tensors in a namespace of its own.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(INTROKERNELS_EMULATION)
#define INTROKERNELS_IMPLEMENT(library) \
  STABLE_TORCH_LIBRARY_IMPL(introkernels_emulated, CPU, library)
#else
#define INTROKERNELS_IMPLEMENT(library) STABLE_TORCH_LIBRARY_IMPL(introkernels, CUDA, library)
#endif
