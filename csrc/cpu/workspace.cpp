#include "cpu/workspace.h"

#include <algorithm>
#include <new>

namespace introkernels::cpu {

namespace {

constexpr size_t kAlignment = 64;
constexpr std::align_val_t kAligned{kAlignment};

std::byte* allocate(size_t bytes) {
  return static_cast<std::byte*>(::operator new(bytes, kAligned));
}

// What a thread keeps: one block, and no more than this.
constexpr size_t kMostKept = 4 << 20;

struct Stack {
  std::byte* block = nullptr;
  size_t capacity = 0;
  size_t used = 0;    // of the block
  size_t wanted = 0;  // by all workspaces that live now, in the block or not
  size_t peak = 0;    // of wanted

  ~Stack() { ::operator delete(block, kAligned); }
};

thread_local Stack stack;

}  // namespace

Workspace::Workspace(size_t bytes)
    : bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment), is_own_(false) {
  if (stack.wanted == 0 && stack.capacity < std::min(stack.peak, kMostKept)) {
    // Nobody uses the block, so it may grow to what was wanted before.
    ::operator delete(stack.block, kAligned);
    stack.block = nullptr;
    stack.capacity = 0;
    stack.block = allocate(std::min(stack.peak, kMostKept));
    stack.capacity = std::min(stack.peak, kMostKept);
  }
  is_own_ = stack.used + bytes_ > stack.capacity;
  if (is_own_) {
    data_ = allocate(bytes_);
  } else {
    data_ = stack.block + stack.used;
    stack.used += bytes_;
  }
  stack.wanted += bytes_;
  stack.peak = std::max(stack.peak, stack.wanted);
}

Workspace::~Workspace() {
  stack.wanted -= bytes_;
  if (is_own_) {
    ::operator delete(data_, kAligned);
  } else {
    stack.used -= bytes_;
  }
}

}  // namespace introkernels::cpu
