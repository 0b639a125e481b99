// The switch between two stacks: pushes the registers that the ABI lets a caller rely on, exchanges the stack pointers,
// pops the other side's.
#include "fiber.h"

#ifndef SIMT_PORTABLE_FIBERS
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, . - simt_switch
)");
#endif
