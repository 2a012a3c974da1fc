// Kernels with one fault each. The line that a report has to name ends in its function's name.
#include <cuda_runtime.h>

#include "report.h"

namespace {

using emulation::launch;

constexpr unsigned kAll = 0xFFFFFFFF;

__device__ int* shared_ints() { return reinterpret_cast<int*>(emulation::dynamic_shared()); }

__device__ int thread() { return int(threadIdx.x); }

// Its neighbours in the next warp and in the one before may not have written yet.
__global__ void missing_barrier(int* out) {
  const int next = (thread() + warpSize) % int(blockDim.x);
  const int previous = (thread() + int(blockDim.x) - warpSize) % int(blockDim.x);
  shared_ints()[thread()] = thread();
  out[2 * thread()] = shared_ints()[next];
  out[2 * thread() + 1] = shared_ints()[previous];
}

// The next round's numbers may be written over before others have read this one's.
__global__ void missing_second_barrier(int* out) {
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    shared_ints()[thread()] = thread() + 1000 * round;
    __syncthreads();
    sum += shared_ints()[(thread() + warpSize) % int(blockDim.x)];
    sum += shared_ints()[(thread() + int(blockDim.x) - warpSize) % int(blockDim.x)];
  }
  out[thread()] = sum;
}

// Lanes of one warp, too, run one after the other.
__global__ void missing_warp_barrier(int* out) {
  shared_ints()[thread()] = thread();
  out[2 * thread()] = shared_ints()[thread() ^ 1];
}

__global__ void divergent_barrier(int*) {
  if (thread() < 40) {
    __syncthreads();
  } else {
    __syncthreads();  // divergent_barrier
  }
}

__global__ void barrier_after_exit(int*) {
  if (thread() == 40) return;
  __syncthreads();  // barrier_after_exit
}

__global__ void barrier_in_a_loop(int*) {
  for (int round = 0; round < 1 + thread() / 32; ++round) {
    __syncthreads();  // barrier_in_a_loop
  }
}

__global__ void mask_without_caller(int* out) {
  out[thread()] = __shfl_xor_sync(0x0000FFFF, thread(), 1);  // mask_without_caller
}

__global__ void mask_of_exited_lanes(int* out) {
  if (thread() == 35) return;
  out[thread()] = __shfl_xor_sync(kAll, thread(), 1);  // mask_of_exited_lanes
}

__global__ void mask_of_missing_lanes(int*) {
  // The last warp of the block is half a warp.
  __syncwarp();  // mask_of_missing_lanes
}

__global__ void different_masks(int*) {
  const unsigned mask = thread() % 32 == 9 ? 0x0000FFFF : kAll;
  __syncwarp(mask);  // different_masks
}

__global__ void different_places(int* out) {
  if (thread() % 32 < 16) {
    out[thread()] = __shfl_xor_sync(kAll, thread(), 1);
  } else {
    out[thread()] = __shfl_xor_sync(kAll, thread(), 1);  // different_places
  }
}

__global__ void source_outside_mask(int* out) {
  if (thread() % 32 >= 16) return;
  out[thread()] = __shfl_xor_sync(0x0000FFFF, thread(), 16);  // source_outside_mask
}

__global__ void deadlock(int*) {
  if (thread() % 32 == 3) {
    __syncthreads();
  } else {
    __syncwarp();  // deadlock
  }
}

__global__ void crossed_masks(int*) {
  // Lane 0 waits for lane 1, which waits for lane 2, which waits for lane 0.
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane == 0 ? 0b011 : lane == 1 ? 0b110 : 0b101;
  if (lane < 3) __syncwarp(mask);  // crossed_masks
}

__global__ void unwritten_shared_memory(float* out) {
  out[thread()] = 0.0F * reinterpret_cast<float*>(emulation::dynamic_shared())[thread()];
}

__global__ void overrun(int*) {
  shared_ints()[thread() + 1] = thread();  // sanitized overrun
  __syncthreads();                         // overrun
}

__global__ void underrun(int*) {
  if (thread() == 0) shared_ints()[-1] = 0;
  __syncwarp();  // underrun
}

// Found when the thread ends, which has no line.
__global__ void overrun_at_the_end(int*) {
  if (thread() == 5) shared_ints()[blockDim.x] = 0;
}

__global__ void overread(int* out) {
  out[thread()] = shared_ints()[thread() + 1];  // overread
}

}  // namespace

#define EXPORT(kernel, T, threads)                                                        \
  EXPORTED const char* run_##kernel(T* out) {                                             \
    return report_of(                                                                     \
        [=] { launch(#kernel, 1, threads, threads * sizeof(T), [=] { kernel(out); }); }); \
  }

EXPORT(missing_barrier, int, 128)
EXPORT(missing_second_barrier, int, 128)
EXPORT(missing_warp_barrier, int, 128)
EXPORT(divergent_barrier, int, 64)
EXPORT(barrier_after_exit, int, 64)
EXPORT(barrier_in_a_loop, int, 64)
EXPORT(mask_without_caller, int, 32)
EXPORT(mask_of_exited_lanes, int, 64)
EXPORT(mask_of_missing_lanes, int, 48)
EXPORT(different_masks, int, 64)
EXPORT(different_places, int, 64)
EXPORT(source_outside_mask, int, 64)
EXPORT(deadlock, int, 64)
EXPORT(crossed_masks, int, 32)
EXPORT(unwritten_shared_memory, float, 64)
EXPORT(overrun, int, 64)
EXPORT(underrun, int, 64)
EXPORT(overrun_at_the_end, int, 64)
EXPORT(overread, int, 64)

EXPORTED const char* run_fault_in_block_2(int* out) {
  return report_of([=] {
    launch("fault_in_block_2", dim3(2, 2), dim3(8, 4, 2), 0, [=] {
      if (blockIdx.x == 0 && blockIdx.y == 1 && threadIdx.y == 1 && threadIdx.z == 1) return;
      __syncthreads();  // fault_in_block_2
    });
  });
}
