// Kernels without a fault.
#include <cuda_runtime.h>

#include <cstdint>

#include "report.h"

namespace {

using emulation::launch;

constexpr unsigned kAll = 0xFFFFFFFF;

__device__ float* shared_floats() { return reinterpret_cast<float*>(emulation::dynamic_shared()); }

// The sum over a block, for all of its threads.
__device__ float block_sum(float value) {
  float* const of_warps = shared_floats();
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance);
  }
  if (threadIdx.x % warpSize == 0) of_warps[threadIdx.x / warpSize] = value;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / warpSize; ++warp) sum += of_warps[warp];
  return sum;
}

__global__ void row_sums(const float* x, int columns, float* out) {
  float sum = 0;
  for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) {
    sum += x[int(blockIdx.x) * columns + c];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

constexpr int kTile = 32;

__global__ void transpose(const float* in, int rows, int columns, float* out) {
  float* const tile = shared_floats();
  const int row = int(blockIdx.y) * kTile, column = int(blockIdx.x) * kTile;
  const int x = int(threadIdx.x);
  for (int y = int(threadIdx.y); y < kTile; y += int(blockDim.y)) {
    if (row + y < rows && column + x < columns) {
      tile[y * (kTile + 1) + x] = in[(row + y) * columns + column + x];
    }
  }
  __syncthreads();
  for (int y = int(threadIdx.y); y < kTile; y += int(blockDim.y)) {
    if (row + x < rows && column + y < columns) {
      out[(column + y) * rows + row + x] = tile[x * (kTile + 1) + y];
    }
  }
}

// The last block to take a ticket adds up what all blocks left.
__global__ void sum_by_tickets(const float* x, int columns, float* partial, int* ticket,
                               float* out) {
  float sum = 0;
  const int step = int(gridDim.x * blockDim.x);
  for (int c = int(blockIdx.x * blockDim.x + threadIdx.x); c < columns; c += step) sum += x[c];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = sum;
  __threadfence();
  if (atomicAdd(ticket, 1) == int(gridDim.x) - 1) {
    float total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(partial + block);
    *out = total;
  }
}

template <typename T>
__global__ void shuffle(const T* in, int lane_mask, int width, T* out) {
  out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], lane_mask, width);
}

// Groups of eight lanes that take part in as many shuffles as their number in the warp says.
__global__ void groups(int* out) {
  const int lane = int(threadIdx.x) % warpSize, group = lane / 8;
  const unsigned mask = 0xFFU << (group * 8);
  int value = lane;
  for (int round = 0; round <= group; ++round) {
    value = __shfl_xor_sync(mask, value + 1, 1, 8);
    __syncwarp(mask);
  }
  out[threadIdx.x] = value;
}

// Each thread notes when it came by, twice.
__global__ void note_turns(int* clock, int* turns) {
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  turns[2 * thread] = atomicAdd(clock, 1);
  __syncthreads();
  turns[2 * thread + 1] = atomicAdd(clock, 1);
}

__global__ void copy_shared(unsigned char* out) {
  const unsigned char* const memory = emulation::dynamic_shared();
  out[blockIdx.x * blockDim.x + threadIdx.x] = memory[threadIdx.x];
  memcpy(emulation::dynamic_shared() + threadIdx.x, "", 1);
}

template <typename T>
const char* run_shuffle(const T* in, int lane_mask, int width, T* out) {
  return report_of(
      [=] { launch("shuffle", 1, 32, 0, [=] { shuffle(in, lane_mask, width, out); }); });
}

}  // namespace

EXPORTED const char* run_row_sums(const float* x, int rows, int columns, int threads, float* out) {
  return report_of([=] {
    launch("row_sums", unsigned(rows), unsigned(threads), sizeof(float) * unsigned(threads) / 32,
           [=] { row_sums(x, columns, out); });
  });
}

EXPORTED const char* run_transpose(const float* in, int rows, int columns, float* out) {
  const dim3 grid(unsigned(columns + kTile - 1) / kTile, unsigned(rows + kTile - 1) / kTile);
  return report_of([=] {
    launch("transpose", grid, dim3(kTile, 8), sizeof(float) * kTile * (kTile + 1),
           [=] { transpose(in, rows, columns, out); });
  });
}

EXPORTED const char* run_sum_by_tickets(const float* x, int columns, int blocks, float* partial,
                                        int* ticket, float* out) {
  return report_of([=] {
    launch("sum_by_tickets", unsigned(blocks), 64, sizeof(float) * 2,
           [=] { sum_by_tickets(x, columns, partial, ticket, out); });
  });
}

EXPORTED const char* run_shuffle_int(const int* in, int lane_mask, int width, int* out) {
  return run_shuffle(in, lane_mask, width, out);
}
EXPORTED const char* run_shuffle_long(const long long* in, int lane_mask, int width,
                                      long long* out) {
  return run_shuffle(in, lane_mask, width, out);
}
EXPORTED const char* run_shuffle_float(const float* in, int lane_mask, int width, float* out) {
  return run_shuffle(in, lane_mask, width, out);
}
EXPORTED const char* run_shuffle_double(const double* in, int lane_mask, int width, double* out) {
  return run_shuffle(in, lane_mask, width, out);
}

EXPORTED const char* run_groups(int* out) {
  return report_of([=] { launch("groups", 1, 64, 0, [=] { groups(out); }); });
}

EXPORTED const char* run_note_turns(int blocks, int threads, int* clock, int* turns) {
  return report_of([=] {
    launch("note_turns", unsigned(blocks), unsigned(threads), 0, [=] { note_turns(clock, turns); });
  });
}

EXPORTED const char* run_copy_shared(int blocks, int bytes, unsigned char* out) {
  return report_of([=] {
    launch("copy_shared", unsigned(blocks), unsigned(bytes), size_t(bytes),
           [=] { copy_shared(out); });
  });
}

EXPORTED const char* run_nothing(int grid, int threads, int shared_bytes) {
  return report_of(
      [=] { launch("nothing", unsigned(grid), unsigned(threads), size_t(shared_bytes), [] {}); });
}
