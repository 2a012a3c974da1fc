// Copies from global to shared memory that run beside their thread, and the barriers in shared
// memory that tell when they are done: PTX's cp.async.bulk and mbarrier, of compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace introkernels::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// What this thread did with shared memory comes before what copies do with it, once a barrier has
// put the one before the other. Copies go by a proxy of their own, which barriers alone leave out.
__device__ __forceinline__ void fence_before_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An mbarrier object in shared memory, for one thread that copies and any number that wait. Each
// call of expect() begins a use; a use is over when all of its bytes are there.
class CopyBarrier {
 public:
  // To be followed by fence_before_copies() and a barrier of those who use it.
  __device__ __forceinline__ void start() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
  }

  // By the thread that copies, before it does, and after all have waited for the use before.
  // bytes: of all copies of this use, fewer than 2^20.
  __device__ __forceinline__ void expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }

  // to: shared memory of this block; from: global memory. Both addresses and the number of bytes
  // are multiples of 16.
  __device__ __forceinline__ void copy(void* to, const void* from, uint32_t bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(this))
        : "memory");
  }

  // Until use number n is over, for parity n % 2; the thread then sees what was copied. Not to be
  // called when a later use may have begun.
  __device__ __forceinline__ void wait(uint32_t parity) {
    uint32_t is_over;
    do {
      asm volatile(
          "{\n"
          ".reg .pred is_over;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, is_over;\n"
          "}"
          : "=r"(is_over)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    } while (is_over == 0);
  }

 private:
  uint64_t state_;
};

}  // namespace introkernels::cuda
