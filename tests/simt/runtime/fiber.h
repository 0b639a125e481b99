// Fibers: one stack per CUDA thread, switched in user space, so that a block of 1024 threads costs no OS thread.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_PORTABLE_FIBERS 1
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 256 << 10;   // reserved, not touched: a kernel uses a few kilobytes of it
constexpr int kMaxThreads = 1024;

// All stacks lie in one mapping, so that "is this a local variable?" is one comparison. A page without access below each
// stack turns an overflow into a crash instead of a corrupted neighbour.
class Stacks {
 public:
  void reserve() {
    if (base_) return;
    void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<uint8_t*>(p);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (int i = 0; i < kMaxThreads; i++) mprotect(base_ + i * kStackBytes, page, PROT_NONE);
  }
  uint8_t* of(int thread) const { return base_ + thread * kStackBytes; }
  bool contains(uintptr_t address) const { return address - (uintptr_t)base_ < kMaxThreads * kStackBytes; }

 private:
  uint8_t* base_ = nullptr;
};

#ifndef SIMT_PORTABLE_FIBERS
// fiber.cpp: 15 times faster than swapcontext, which makes two system calls for the signal mask.
extern "C" void simt_switch(void** save, void* resume);

class Fiber {
 public:
  void start(uint8_t* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);   // 64: the red zone, and the ABI's alignment
    *--top = nullptr;                                                    // entry never returns
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;                                                            // the six registers that simt_switch pops
    memset(top, 0, 6 * sizeof(void*));
    stack_pointer_ = top;
  }
  void resume() { simt_switch(&scheduler_stack_pointer_, stack_pointer_); }
  void suspend() { simt_switch(&stack_pointer_, scheduler_stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
  static inline void* scheduler_stack_pointer_ = nullptr;
};
#else
class Fiber {
 public:
  void start(uint8_t* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void resume() { swapcontext(&scheduler_context_, &context_); }
  void suspend() { swapcontext(&context_, &scheduler_context_); }

 private:
  ucontext_t context_;
  static inline ucontext_t scheduler_context_;
};
#endif

}  // namespace simt
