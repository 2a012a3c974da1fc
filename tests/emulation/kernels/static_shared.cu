// Does not compile: the emulation knows dynamic shared memory only.
#include <cuda_runtime.h>

__global__ void reverse(float* values) {
  __shared__ float copy[32];
  copy[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = copy[31 - threadIdx.x];
}
