// Runs kernels on the CPU, and says what is wrong with them.
//
// A thread of a block is a fiber that runs until it synchronises or ends; blocks run one after the
// other. The environment variable INTROKERNELS_EMULATION_ORDER, read at each launch, rules in which
// order blocks, warps, and lanes between two synchronisations run: "ascending" (which is usual),
// "descending", or "shuffled" and "shuffled:<seed>", another order at each resumption and in each
// launch. A right kernel gives the same results in all of them.
#pragma once

#include <cstddef>

#include "emulation/vector_types.h"

#pragma GCC visibility push(hidden)

namespace emulation {

// The dynamic shared memory of the block that runs. It holds nothing but 0xFF bytes (which as
// floating numbers are NaN) until the block writes to it.
unsigned char* dynamic_shared();

struct Launch {
  const char* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  void (*thread)(const void* context);
  const void* context;
};

void run(const Launch& launch);

// Calls thread() once for each thread of the grid. Throws std::runtime_error, which names the
// kernel, the block, the thread and the place of its call, for: launches that no GPU takes;
// barriers that not all threads of a block reach; operations of a warp whose mask leaves out the
// calling lane, names lanes that have exited or is not that of the other lanes; lanes of one mask
// that call at different places; values taken from lanes that the mask leaves out; threads that
// wait for each other; writes next to the dynamic shared memory.
template <typename Thread>
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Thread& thread) {
  run({kernel, grid, block, shared_bytes,
       [](const void* context) { (*static_cast<const Thread*>(context))(); }, &thread});
}

}  // namespace emulation

// Those of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

#pragma GCC visibility pop
