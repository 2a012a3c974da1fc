// Barriers of a block, and what the lanes of a warp exchange.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>

#include "emulation/emulation.h"

#pragma GCC visibility push(hidden)

namespace emulation {

// A synchronising call, for reports. Calls meet where they stand at the same place in the source.
struct Call {
  const char* name;
  std::source_location place;
};

// Waits for all threads of the block.
void meet_block(const Call& call);
// Waits for the lanes of the mask.
void meet_warp(const Call& call, unsigned mask);
// Waits for the lanes of the mask; answers with the value of the source lane.
uint64_t meet_exchange(const Call& call, unsigned mask, uint64_t value, unsigned source);

unsigned lane();

template <typename T>
T exchange(const Call& call, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange values of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_exchange(call, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  emulation::meet_block({"__syncthreads", place});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF,
                       std::source_location place = std::source_location::current()) {
  emulation::meet_warp({"__syncwarp", place}, mask);
}

// Lanes and masks of lanes count modulo 32, as on a GPU. A lane whose source lies behind its part
// of the warp gets its own value; parts before it can be reached.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  std::source_location place = std::source_location::current()) {
  const unsigned lane = emulation::lane(), source = lane ^ (unsigned(lane_mask) % 32);
  const unsigned end_of_part = (lane & ~unsigned(width - 1)) + unsigned(width);
  return emulation::exchange({"__shfl_xor_sync", place}, mask, value,
                             source < end_of_part ? source : lane);
}

#pragma GCC visibility pop
