// Stacks that a single thread of the system runs by turns.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define INTROKERNELS_EMULATION_ASAN 1
#endif

// Assembly for the two usual architectures; a system call for each switch on others, or where asked
// for.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(INTROKERNELS_EMULATION_UCONTEXT)
#define INTROKERNELS_EMULATION_UCONTEXT 1
#endif

#if defined(INTROKERNELS_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulation {

class Fiber {
 public:
  // What the stack of the system's thread is kept as while fibers run.
  Fiber() = default;
  // body: what the fiber does when it is first gone to; it must not return. number: stacks of
  // different numbers begin at different places in the caches.
  Fiber(void (*body)(), unsigned number);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which must be the one that runs, for another; returns when it is gone to.
  void go_to(Fiber& other);

  // To be called by the body first of all.
  void arrived();

  // Forgets what the fiber did: it starts again. Nothing on its stack is destroyed.
  void restart();

 private:
  void (*body_)() = nullptr;
  char* stack_ = nullptr;
  char* top_ = nullptr;
#if defined(INTROKERNELS_EMULATION_UCONTEXT)
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(INTROKERNELS_EMULATION_ASAN)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;

  static Fiber* left_;
#endif
};

}  // namespace emulation
