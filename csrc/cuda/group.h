// Threads that work on one row: a power of two of neighbours in a warp, or a whole block. All
// threads of a group take part in every call and get the same bits back.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/number.h"

namespace introkernels::cuda {

// What the warps of a block exchange: up to so many numbers each, in two places by turns, so that
// one barrier separates a write from its reads and the next write finds the other place.
constexpr int kExchanged = 8;
constexpr size_t kExchangeBytes = 2 * kWarps * kExchanged * sizeof(double);

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Of numbers, NaN left out: so that all threads agree.
struct Largest {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return max_of(a, b);
  }
};

class Group {
 public:
  // size: 1, 2, 4 ... 32, or kThreads. exchange: kExchangeBytes of shared memory.
  __device__ __forceinline__ Group(int size, unsigned char* exchange)
      : size_(size),
        rank_(int(threadIdx.x) & (size - 1)),
        exchange_(reinterpret_cast<double*>(exchange)) {
    const int lane = int(threadIdx.x) & (kWarp - 1);
    mask_ = size >= kWarp ? ~0U : ((1U << size) - 1U) << (lane & ~(size - 1));
  }

  __device__ __forceinline__ int size() const { return size_; }
  __device__ __forceinline__ int rank() const { return rank_; }
  __device__ __forceinline__ bool is_block() const { return size_ == kThreads; }

  // Threads see what others of the group wrote before.
  __device__ __forceinline__ void synchronize() const {
    if (is_block()) {
      __syncthreads();
    } else {
      __syncwarp(mask_);
    }
  }

  // values[i] of all threads combined, for each i, in an order that only the size of the group
  // decides. T: float or double; N <= kExchanged.
  template <int N, typename T, typename Operation>
  __device__ __forceinline__ void reduce(T (&values)[N], Operation combine) {
    static_assert(N <= kExchanged);
    const int width = size_ < kWarp ? size_ : kWarp;
#pragma unroll 1
    for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] = combine(values[i], __shfl_xor_sync(mask_, values[i], distance));
      }
    }
    if (!is_block()) return;
    T* const place = reinterpret_cast<T*>(exchange_ + (place_is_second_ ? kWarps * kExchanged : 0));
    place_is_second_ = !place_is_second_;
    if ((threadIdx.x & (kWarp - 1)) == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) place[(threadIdx.x / kWarp) * N + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = place[i];
    // Unrolled, all loads would come first and take more registers than the rest of a kernel.
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = combine(values[i], place[warp * N + i]);
    }
  }

 private:
  int size_;
  int rank_;
  unsigned mask_;
  double* exchange_;
  bool place_is_second_ = false;
};

// Whether this block is the last of `blocks` to come here; a counter starts at 0. What the others
// wrote before is then visible to all threads of this block. `flag` is a shared int.
__device__ __forceinline__ bool is_last_to_arrive(int* counter, int blocks, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  const bool is_last = *flag != 0;
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace introkernels::cuda
