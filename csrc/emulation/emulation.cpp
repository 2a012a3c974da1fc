#include "emulation/emulation.h"

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "emulation/block.h"
#include "emulation/cuda_runtime_api.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace emulation {

namespace {

std::string text_of(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

void check(const Launch& launch) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string("kernel ") + launch.kernel + " can't be launched: " + why);
  };
  const dim3 grid = launch.grid, block = launch.block;
  constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridOther = 65535;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridOther ||
      grid.z > kMaxGridOther) {
    refuse("no grid is " + text_of(grid) + " blocks large");
  }
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    refuse("no block is " + text_of(block) + " threads large");
  }
  // More takes an attribute of the kernel.
  constexpr size_t kMaxSharedBytes = 49152;
  if (launch.shared_bytes > kMaxSharedBytes) {
    refuse("no block has " + std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
}

std::mutex one_at_a_time;
uint64_t num_launches = 0;
uint64_t num_memsets = 0;

}  // namespace

unsigned char* dynamic_shared() { return the_block.shared(); }
unsigned lane() { return the_block.lane(); }
void meet_block(const Call& call) { the_block.meet_block(call); }
void meet_warp(const Call& call, unsigned mask) { the_block.meet_warp(call, mask); }
uint64_t meet_exchange(const Call& call, unsigned mask, uint64_t value, unsigned source) {
  return the_block.meet_exchange(call, mask, value, source);
}

void run(const Launch& launch) {
  check(launch);
  const std::lock_guard lock(one_at_a_time);
  Order order = Order::of_launch(num_launches++);
  SharedMemory shared(launch.shared_bytes);
  const uint64_t width = launch.grid.x, area = width * launch.grid.y;
  const uint64_t num_blocks = area * launch.grid.z;
  order.set_num_blocks(num_blocks);
  gridDim = launch.grid;
  blockDim = launch.block;
  for (uint64_t turn = 0; turn < num_blocks; ++turn) {
    const uint64_t index = order.block(turn);
    blockIdx = {unsigned(index % width), unsigned(index % area / width), unsigned(index / area)};
    the_block.run(launch, order, shared);
  }
}

cudaError_t set_memory(void* memory, int value, size_t bytes) {
  const std::lock_guard lock(one_at_a_time);
  ++num_memsets;
  // Where there is nothing to set, C's function, unlike CUDA's, still asks for an address.
  if (bytes != 0) std::memset(memory, value, bytes);
  return cudaSuccess;
}

}  // namespace emulation

// What a GPU would have been given so far, for tests that count it.
extern "C" __attribute__((visibility("default"))) uint64_t introkernels_emulated_launches() {
  return emulation::num_launches;
}

extern "C" __attribute__((visibility("default"))) uint64_t introkernels_emulated_memsets() {
  return emulation::num_memsets;
}
