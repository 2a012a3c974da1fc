// Scratch memory of a thread, kept from call to call: large allocations are fresh pages each time,
// and touching those costs more than the work on them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace introkernels::cpu {

// Workspaces of a thread are stacked: the last one made is the first to go.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Uninitialised and aligned to 64 bytes.
  void* data() const { return data_; }

 private:
  size_t bytes_;
  bool is_own_;  // the thread's block had no room
  std::byte* data_;
};

// A workspace of `size` numbers.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : workspace_(static_cast<size_t>(size) * sizeof(T)) {}

  T* get() const { return static_cast<T*>(workspace_.data()); }

 private:
  Workspace workspace_;
};

}  // namespace introkernels::cpu
