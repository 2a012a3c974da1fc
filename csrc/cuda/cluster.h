// Blocks that run at the same time and read each other's shared memory: PTX's clusters, of compute
// capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace introkernels::cuda {

// Of this block among those of its cluster, which follow each other in the grid.
__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// Waits for all threads of the cluster; each sees what the others wrote before.
__device__ __forceinline__ void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What another block of the cluster has where `own` is in this one's shared memory.
__device__ __forceinline__ double load_from_block(const double* own, int rank) {
  uint32_t address;
  double value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(uint32_t(__cvta_generic_to_shared(own))), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
  return value;
}

// Adds up `values` of the blocks of a cluster, number by number and in the order of the blocks: the
// first one gets the sums. All threads of the cluster call this.
__device__ __forceinline__ void add_up_cluster(double* values, int64_t count, int blocks) {
  synchronize_cluster();
  if (rank_in_cluster() == 0) {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      double sum = values[i];
#pragma unroll 1
      for (int rank = 1; rank < blocks; ++rank) sum += load_from_block(values + i, rank);
      values[i] = sum;
    }
  }
  // A block that has ended has no shared memory to be read.
  synchronize_cluster();
}

}  // namespace introkernels::cuda
