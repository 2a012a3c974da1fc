// Kernels whose predictions are known; roofline_toy.sass is what nvcc 13.0 makes of `sum` for sm_90
// with -use_fast_math.

// A plain copy: four loads of 16 bytes a thread are on their way at a time.
__global__ void copy(const uint4* __restrict__ in, uint4* __restrict__ out, int count) {
  for (int i = blockIdx.x * 1024 + threadIdx.x; i < count; i += gridDim.x * 1024) {
    uint4 words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = in[i + k * 256];
#pragma unroll
    for (int k = 0; k < 4; ++k) out[i + k * 256] = words[k];
  }
}

// Sixteen exponentials a number.
__global__ void slow(const float4* __restrict__ in, float4* __restrict__ out, int count) {
  for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
    float4 x = in[i];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      x = {exp2f(x.x), exp2f(x.y), exp2f(x.z), exp2f(x.w)};
    }
    out[i] = x;
  }
}

__device__ __noinline__ float moved(float total, float distance) { return total * exp2f(distance); }

// A row a block. Sums move where a larger number comes, which is rare.
__global__ void sum(const float4* __restrict__ in, float* __restrict__ out, int vectors) {
  __shared__ float sums[8];
  float largest = -1e30f, total = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += 256) {
    const float4 x = in[blockIdx.x * vectors + i];
    const float top = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    if (top > largest) {
      total = moved(total, largest - top);
      largest = top;
    }
    total +=
        exp2f(x.x - largest) + exp2f(x.y - largest) + exp2f(x.z - largest) + exp2f(x.w - largest);
  }
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(~0U, total, distance);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
}
