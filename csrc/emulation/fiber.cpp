#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(INTROKERNELS_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

namespace {

#if defined(INTROKERNELS_EMULATION_ASAN)
// Red zones between variables, and no reuse of the places of dead ones.
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

}  // namespace

#if !defined(INTROKERNELS_EMULATION_UCONTEXT)

// Keeps the registers that a call preserves on the stack that is left, its address in *left, and
// takes them from the stack that is gone to.
extern "C" __attribute__((visibility("hidden"))) void introkernels_emulation_switch(void** left,
                                                                                    void* gone_to);

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .type introkernels_emulation_switch, @function
introkernels_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size introkernels_emulation_switch, . - introkernels_emulation_switch
)");

namespace {

// A stack as a switch leaves it, inside a body that was called from nowhere.
void* prepared(char* top, void (*body)()) {
  auto* words = reinterpret_cast<uintptr_t*>(top);
  *--words = 0;
  *--words = reinterpret_cast<uintptr_t>(body);
  for (int saved = 0; saved < 6; ++saved) *--words = 0;
  return words;
}

}  // namespace

#else
asm(R"(
    .text
    .p2align 4
    .type introkernels_emulation_switch, %function
introkernels_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size introkernels_emulation_switch, . - introkernels_emulation_switch
)");

namespace {

void* prepared(char* top, void (*body)()) {
  auto* words = reinterpret_cast<uintptr_t*>(top) - 20;
  for (int saved = 0; saved < 20; ++saved) words[saved] = 0;
  constexpr int kLinkRegister = 11;
  words[kLinkRegister] = reinterpret_cast<uintptr_t>(body);
  return words;
}

}  // namespace
#endif

#endif

Fiber::Fiber(void (*body)(), unsigned number) : body_(body) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // A stack that overflows meets this page.
  mprotect(memory, page, PROT_NONE);
  stack_ = static_cast<char*>(memory) + page;
  // Frames of the same depth would otherwise compete for the same few lines of a cache, in which
  // addresses a page apart have the same place.
  constexpr unsigned kPlaces = 48, kPlaceBytes = 192;
  top_ = stack_ + kStackBytes - size_t(number % kPlaces) * kPlaceBytes;
#if defined(INTROKERNELS_EMULATION_ASAN)
  bottom_ = stack_;
  size_ = kStackBytes;
#endif
  restart();
}

void Fiber::restart() {
#if defined(INTROKERNELS_EMULATION_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
#if defined(INTROKERNELS_EMULATION_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = static_cast<size_t>(top_ - stack_);
  context_.uc_link = nullptr;
  makecontext(&context_, body_, 0);
#else
  stack_pointer_ = prepared(top_, body_);
#endif
}

#if defined(INTROKERNELS_EMULATION_ASAN)

Fiber* Fiber::left_ = nullptr;

void Fiber::arrived() {
  // Where the stack of the system's thread lies is known only when it is left.
  __sanitizer_finish_switch_fiber(fake_stack_, &left_->bottom_, &left_->size_);
}

__attribute__((noinline)) void Fiber::go_to(Fiber& other) {
  left_ = this;
  __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#if defined(INTROKERNELS_EMULATION_UCONTEXT)
  swapcontext(&context_, &other.context_);
#else
  introkernels_emulation_switch(&stack_pointer_, other.stack_pointer_);
#endif
  __sanitizer_finish_switch_fiber(fake_stack_, &left_->bottom_, &left_->size_);
}

#else

void Fiber::arrived() {}

// Not inlined: where all fibers wait in the same call, processors predict its return.
__attribute__((noinline)) void Fiber::go_to(Fiber& other) {
#if defined(INTROKERNELS_EMULATION_UCONTEXT)
  swapcontext(&context_, &other.context_);
#else
  introkernels_emulation_switch(&stack_pointer_, other.stack_pointer_);
#endif
}

#endif

}  // namespace emulation
