#include "emulation/shared_memory.h"

#include <cstdlib>
#include <new>

namespace emulation {

namespace {

constexpr size_t kAlignment = 128;

unsigned char* allocated(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

}  // namespace

void SharedMemory::Free::operator()(unsigned char* memory) const { std::free(memory); }

SharedMemory::SharedMemory(size_t bytes)
    : bytes_(bytes), memory_(allocated(kGuardBytes + bytes + kGuardBytes)) {
  for (size_t i = 0; i < kGuardBytes; i += sizeof(kGuard)) {
    std::memcpy(memory_.get() + i, &kGuard, sizeof(kGuard));
    std::memcpy(data() + bytes + i, &kGuard, sizeof(kGuard));
  }
}

std::string SharedMemory::damage() const {
  for (size_t i = 0; i < kGuardBytes; i += sizeof(kGuard)) {
    if (word(data() + bytes_ + i) != kGuard) {
      return "written to behind the end of the dynamic shared memory of " + std::to_string(bytes_) +
             " bytes, in bytes " + std::to_string(i) + " to " +
             std::to_string(i + sizeof(kGuard) - 1) + " behind it";
    }
    if (word(data() - sizeof(kGuard) - i) != kGuard) {
      return "written to before the start of the dynamic shared memory, in bytes " +
             std::to_string(i + 1) + " to " + std::to_string(i + sizeof(kGuard)) + " before it";
    }
  }
  return {};
}

}  // namespace emulation
