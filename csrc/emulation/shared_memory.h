// The dynamic shared memory of a block, guarded on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

namespace emulation {

// AddressSanitizer guards memory itself, at its very last byte.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kGuardBytes = 0;
#else
inline constexpr size_t kGuardBytes = 128;
#endif

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);

  unsigned char* data() const { return memory_.get() + kGuardBytes; }

  // To be called at the start of each block.
  void fill() { std::memset(data(), 0xFF, bytes_); }

  // Whether the words next to the memory are as they were: quick enough for each synchronisation.
  bool borders_are_whole() const {
    if constexpr (kGuardBytes == 0) return true;
    return word(data() - sizeof(uint64_t)) == kGuard && word(data() + bytes_) == kGuard;
  }
  // Empty where nothing next to the memory was written to, else what was.
  std::string damage() const;

 private:
  // Any part of it is NaN to those who read it as floating numbers of any kind.
  static constexpr uint64_t kGuard = 0xFFF7FFF7FFF7FFF7;

  static uint64_t word(const unsigned char* address) {
    uint64_t value;
    std::memcpy(&value, address, sizeof(value));
    return value;
  }

  struct Free {
    void operator()(unsigned char* memory) const;
  };

  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

}  // namespace emulation
