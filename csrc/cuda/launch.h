// How kernels are started and reach their shared memory: the one place that knows whether nvcc or
// the emulation of csrc/emulation compiles them.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#if defined(INTROKERNELS_EMULATION)
#include "emulation/emulation.h"
#endif

namespace introkernels::cuda {

// Threads of every block: eight warps leave each thread 85 registers with three blocks a
// multiprocessor, 128 with two.
constexpr int kThreadsShift = 8;
constexpr int kThreads = 1 << kThreadsShift;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The name of a kernel in reports.
struct KernelName {
  const char* text;
};

// Throws std::runtime_error, RuntimeError in Python, for an error that CUDA reports.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("introkernels: ") + what + ": " + cudaGetErrorString(error));
}

// The dynamic shared memory of this block.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(INTROKERNELS_EMULATION)
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// A grid of x times y blocks. Throws std::runtime_error where no launch has as many.
inline dim3 grid_of(int64_t x, int64_t y = 1) {
  if (x > 2147483647 || y > 65535) {
    throw std::runtime_error("introkernels: more blocks than a launch may have");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// Starts a kernel on the current device. Throws std::runtime_error where CUDA refuses.
template <typename... Parameters>
void launch(KernelName name, void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes,
            cudaStream_t stream, Parameters... arguments) {
#if defined(INTROKERNELS_EMULATION)
  (void)stream;
  emulation::launch(name.text, grid, dim3(kThreads), shared_bytes, [=] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name.text);
#endif
}

// What the current device has of an attribute.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
  return value;
}

}  // namespace introkernels::cuda
