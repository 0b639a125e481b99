// The C interface: what device.h calls from inside a kernel, what g++'s -fsanitize=thread calls before every access
// (in place of libtsan, which is not linked), and what module.py calls to launch.
#include "machine.h"

using simt::machine;

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

extern "C" {

int simt_launch(simt::Launch* launch) {
  machine.run(*launch);
  return static_cast<int>(launch->fault_count);
}
size_t simt_launch_size() { return sizeof(simt::Launch); }   // module.py compares it with its own

simt::Index simt_thread_index() { return machine.current().index; }
simt::Index simt_block_index() { return machine.block_index; }
simt::Index simt_block_shape() { return machine.block_shape; }
simt::Index simt_grid_shape() { return machine.grid_shape; }
uint64_t simt_collective(int op, unsigned mask, uint64_t value, int argument, int width, int line) {
  return machine.collective(op, mask, value, argument, width, line);
}
void simt_fence() { machine.fence(); }
void simt_atomic_begin(const void* address, int size, const void* caller) {
  machine.atomic_begin(reinterpret_cast<uintptr_t>(address), size, reinterpret_cast<uintptr_t>(caller));
}
void simt_atomic_end() { machine.atomic_end(); }
void simt_trap(int line) { machine.trap(line); }
void simt_copy_async(void* to, const void* from) { machine.copy_async(to, from); }
bool simt_next_copy(void** to, const void** from) { return machine.next_copy(to, from); }

// ---- g++'s instrumentation
#define SIMT_ACCESS(n)                                                                                              \
  void __tsan_read##n(void* p) { machine.access(reinterpret_cast<uintptr_t>(p), n, false, CALLER); }               \
  void __tsan_write##n(void* p) { machine.access(reinterpret_cast<uintptr_t>(p), n, true, CALLER); }               \
  void __tsan_volatile_read##n(void* p) { machine.access(reinterpret_cast<uintptr_t>(p), n, false, CALLER); }      \
  void __tsan_volatile_write##n(void* p) { machine.access(reinterpret_cast<uintptr_t>(p), n, true, CALLER); }
SIMT_ACCESS(1) SIMT_ACCESS(2) SIMT_ACCESS(4) SIMT_ACCESS(8) SIMT_ACCESS(16)

// g++ calls these for what is no naturally aligned power of two: a struct of 12 or 32 bytes, or a type whose alignment is
// smaller than its size. The device's compiler makes accesses of the type's alignment of it, which is not passed on: it is
// taken as 4 for a size that would have had a call of its own, else as what the size allows.
static void access_range(uintptr_t address, size_t bytes, bool write, uintptr_t caller) {
  const bool underaligned = (bytes & (bytes - 1)) == 0 && bytes <= 16;
  uintptr_t piece = underaligned ? 4 : 16;
  while (piece > 1 && ((bytes | address) & (piece - 1))) piece /= 2;
  for (size_t i = 0; i < bytes; i += piece) machine.access(address + i, static_cast<int>(piece), write, caller + i);
}
void __tsan_read_range(void* p, size_t n) { access_range(reinterpret_cast<uintptr_t>(p), n, false, CALLER); }
void __tsan_write_range(void* p, size_t n) { access_range(reinterpret_cast<uintptr_t>(p), n, true, CALLER); }
#define SIMT_UNALIGNED(n)                                                                                           \
  void __tsan_unaligned_read##n(void* p) { access_range(reinterpret_cast<uintptr_t>(p), n, false, CALLER); }       \
  void __tsan_unaligned_write##n(void* p) { access_range(reinterpret_cast<uintptr_t>(p), n, true, CALLER); }
SIMT_UNALIGNED(2) SIMT_UNALIGNED(4) SIMT_UNALIGNED(8) SIMT_UNALIGNED(16)
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access_range(reinterpret_cast<uintptr_t>(from), n, false, CALLER);
  access_range(reinterpret_cast<uintptr_t>(to), n, true, CALLER);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access_range(reinterpret_cast<uintptr_t>(from), n, false, CALLER);
  access_range(reinterpret_cast<uintptr_t>(to), n, true, CALLER);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access_range(reinterpret_cast<uintptr_t>(to), n, true, CALLER);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
