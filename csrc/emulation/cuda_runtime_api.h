// The part of CUDA's run time that launches need, for a device whose memory is the host's.
#pragma once

#include <cstddef>
#include <cstring>

#include "emulation/vector_types.h"

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0 };

inline const char* cudaGetErrorString(cudaError_t /*error*/) { return "no error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

// Few multiprocessors: grids that are made for so few are soon run.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr /*attribute*/,
                                          int /*device*/) {
  *value = 4;
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                   cudaMemcpyKind /*kind*/, cudaStream_t /*stream*/) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return cudaSuccess; }

namespace emulation {

cudaError_t set_memory(void* memory, int value, size_t bytes);

}  // namespace emulation

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t /*stream*/) {
  return emulation::set_memory(memory, value, bytes);
}
