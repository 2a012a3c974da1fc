// Scratch memory of a thread, kept from call to call: large allocations are fresh pages each time,
// and touching those costs more than the work on them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace introkernels::cpu {

// Workspaces of a thread are stacked: the last one made is the first to go.
class Workspace {
 public:
  // Room for `bytes`, a sum of what bytes_of says.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static constexpr size_t kAlignment = 64;

  // What `count` numbers of T take of a workspace.
  template <typename T>
  static size_t bytes_of(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

  // `count` numbers, uninitialised and aligned.
  template <typename T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return taken;
  }

 private:
  size_t bytes_;
  std::byte* own_block_;  // null where the thread's block had room
  std::byte* next_;
};

// A workspace of one array.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : workspace_(Workspace::bytes_of<T>(size)), data_(workspace_.take<T>(size)) {}

  T* get() const { return data_; }

 private:
  Workspace workspace_;
  T* data_;
};

}  // namespace introkernels::cpu
