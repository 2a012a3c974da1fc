// In which order blocks, warps and lanes run.
#pragma once

#include <bit>
#include <cstdint>

namespace emulation {

class Order {
 public:
  // What INTROKERNELS_EMULATION_ORDER asks for. Throws std::runtime_error for unknown orders.
  static Order of_launch(uint64_t launch_number);

  // The member of a set of numbers below 32, not empty, that comes next.
  unsigned next(uint32_t set) {
    switch (kind_) {
      case Kind::kAscending:
        return unsigned(std::countr_zero(set));
      case Kind::kDescending:
        return unsigned(std::bit_width(set)) - 1;
      case Kind::kShuffled:
        break;
    }
    // The first member from a random place on, as far as there are any: sets have few gaps.
    const int start = int(((random() >> 32) * unsigned(std::bit_width(set))) >> 32);
    return unsigned(start + std::countr_zero(std::rotr(set, start))) % 32;
  }

  // Blocks are numbered from 0; each comes once.
  void set_num_blocks(uint64_t count);
  uint64_t block(uint64_t turn) const;

 private:
  enum class Kind { kAscending, kDescending, kShuffled };

  Order(Kind kind, uint64_t seed) : kind_(kind), state_(seed) {}

  // Splitmix64.
  uint64_t random() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  Kind kind_;
  uint64_t state_;
  uint64_t num_blocks_ = 0;
  // Shuffled, block number `turn` is (turn * factor_ + offset_) modulo their number.
  uint64_t factor_ = 1;
  uint64_t offset_ = 0;
};

}  // namespace emulation
