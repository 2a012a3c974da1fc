// Barriers of a block, and what the lanes of a warp exchange.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>

#include "emulation/emulation.h"

#pragma GCC visibility push(hidden)

namespace emulation {

inline constexpr unsigned kAllLanes = 0xFFFFFFFF;

// A synchronising call, for reports. Calls meet where they stand at the same place in the source.
struct Call {
  const char* name;
  std::source_location place;
};

// Waits for all threads of the block; answers how many of them called with true.
unsigned meet_block(const Call& call, bool predicate);
// Waits for the lanes of the mask; answers which of them called with true.
unsigned meet_vote(const Call& call, unsigned mask, bool predicate);
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

// The first lane of the calling lane's part of the warp.
inline unsigned first_of_part(int width) { return lane() & ~unsigned(width - 1); }

}  // namespace emulation

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  emulation::meet_block({"__syncthreads", place}, false);
}
inline int __syncthreads_count(int predicate,
                               std::source_location place = std::source_location::current()) {
  return int(emulation::meet_block({"__syncthreads_count", place}, predicate != 0));
}
inline int __syncthreads_or(int predicate,
                            std::source_location place = std::source_location::current()) {
  return emulation::meet_block({"__syncthreads_or", place}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate,
                             std::source_location place = std::source_location::current()) {
  return emulation::meet_block({"__syncthreads_and", place}, predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = emulation::kAllLanes,
                       std::source_location place = std::source_location::current()) {
  emulation::meet_vote({"__syncwarp", place}, mask, false);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location place = std::source_location::current()) {
  return emulation::meet_vote({"__ballot_sync", place}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location place = std::source_location::current()) {
  return emulation::meet_vote({"__any_sync", place}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location place = std::source_location::current()) {
  return emulation::meet_vote({"__all_sync", place}, mask, predicate == 0) == 0;
}

// CUDA promises no more than the calling lane.
inline unsigned __activemask() { return 1U << emulation::lane(); }

// Lanes, offsets and masks of lanes count modulo 32, as on a GPU. A lane whose source lies outside
// of its part of the warp gets its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              std::source_location place = std::source_location::current()) {
  const unsigned first = emulation::first_of_part(width);
  return emulation::exchange({"__shfl_sync", place}, mask, value,
                             first | (unsigned(source) & unsigned(width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 std::source_location place = std::source_location::current()) {
  const unsigned lane = emulation::lane(), offset = delta % 32;
  const bool is_inside = lane >= emulation::first_of_part(width) + offset;
  return emulation::exchange({"__shfl_up_sync", place}, mask, value,
                             is_inside ? lane - offset : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   std::source_location place = std::source_location::current()) {
  const unsigned lane = emulation::lane(), source = lane + delta % 32;
  const bool is_inside = source < emulation::first_of_part(width) + unsigned(width);
  return emulation::exchange({"__shfl_down_sync", place}, mask, value, is_inside ? source : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  std::source_location place = std::source_location::current()) {
  const unsigned lane = emulation::lane(), source = lane ^ (unsigned(lane_mask) % 32);
  // Parts before the lane's own can be reached.
  const bool is_inside = source < emulation::first_of_part(width) + unsigned(width);
  return emulation::exchange({"__shfl_xor_sync", place}, mask, value, is_inside ? source : lane);
}

#pragma GCC visibility pop
