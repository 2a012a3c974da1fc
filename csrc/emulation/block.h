// The threads of one block: who waits for whom, and who runs next.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/order.h"
#include "emulation/shared_memory.h"
#include "emulation/synchronization.h"

namespace emulation {

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kMaxWarps = kMaxThreads / kLanes;

// Sets of lanes are masks. A lane that exists is in at most one of them, and in none while it runs.
struct Warp {
  uint32_t existing = 0;
  uint32_t ready = 0;
  uint32_t at_warp = 0;   // waits in an operation of the warp
  uint32_t at_block = 0;  // waits in a barrier
  uint32_t exited = 0;

  // What each lane that waits called, and with what.
  std::array<Call, kLanes> calls;
  std::array<uint32_t, kLanes> masks;
  std::array<uint8_t, kLanes> sources;
  // The lanes' values, and then their results.
  std::array<uint64_t, kLanes> values;
};

class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;

  // Runs all threads of a block to their end; threadIdx is set for each. Throws std::runtime_error
  // where they can't all come to it, and is then ready for another block.
  void run(const Launch& launch, Order& order, SharedMemory& shared);

  unsigned lane() const { return lane_; }
  unsigned char* shared() const { return shared_->data(); }

  void meet_block(const Call& call);
  void meet_warp(const Call& call, unsigned mask);
  uint64_t meet_exchange(const Call& call, unsigned mask, uint64_t value, unsigned source);

 private:
  static void fiber_body();

  void start(const Launch& launch);
  // Runs threads that have not started yet, and returns never.
  [[noreturn]] void work();
  void exit();
  // Lets other threads run until the calling one is ready.
  void wait();
  // Makes the next ready thread the current one; false where none is ready.
  bool choose();
  Fiber& fiber_of_current();
  void release_block();
  void check_mask(const Call& call, unsigned mask);
  // Has the lane wait in the call; whether the lanes of the mask are then complete.
  bool come_to_warp(const Call& call, unsigned mask);
  void release_warp(unsigned mask);

  // Ends the block with a report; threads lie where they are until the next block. Reports are made
  // by functions, so that callers have none of it on their way.
  template <typename What>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const What& what);
  template <typename What>
  [[noreturn, gnu::cold, gnu::noinline]] void fail_at(const Call& call, const What& what);
  [[noreturn]] void leave_for_good();
  std::string name_of_block() const;
  std::string name_of(unsigned thread) const;
  std::string name_of_current() const { return name_of(current()); }
  // Where threads wait, by the places of their calls.
  std::string waiting_threads() const;

  unsigned current() const { return warp_ * kLanes + lane_; }
  Warp& warp() { return warps_[warp_]; }

  const Launch* launch_ = nullptr;
  Order* order_ = nullptr;
  SharedMemory* shared_ = nullptr;

  unsigned num_threads_ = 0;
  unsigned num_warps_ = 0;
  unsigned num_exited_ = 0;
  std::array<Warp, kMaxWarps> warps_;
  std::array<uint3, kMaxThreads> indices_;
  dim3 indexed_block_{0, 0, 0};

  // The thread that runs; the lanes of its warp that run after it; the warps with ready lanes.
  unsigned warp_ = 0;
  unsigned lane_ = 0;
  uint32_t turn_ = 0;
  uint32_t ready_warps_ = 0;

  // The barrier that threads wait in.
  unsigned num_arrived_ = 0;
  unsigned first_arrived_ = 0;

  // That of the caller of run, and those of threads; idle ones have no thread.
  Fiber caller_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::array<Fiber*, kMaxThreads> fiber_of_;
  Fiber* running_ = nullptr;

  std::string report_;
};

// The only one: launches come one after the other.
extern Block& the_block;

}  // namespace emulation
