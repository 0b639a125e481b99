// The structures that module.py fills in and reads back. Any change here is a change there (class names are the same).
#pragma once
#include <cstdint>

#include "traffic.h"

namespace simt {

struct Index { uint32_t x, y, z; };

struct Buffer {
  uintptr_t low, high;       // what the kernel may touch of it
  uint8_t* initialised;      // map for `low` and on (see shadow.h), or null
  const char* name;
  uint64_t writable;
};

struct Fault {
  char kind[32];
  char text[256];
  uint64_t offset;           // program counter relative to the module's start; 0: unknown
  uint64_t line;             // 0: unknown
  Index block, thread;
  uint64_t count;            // how often this fault was met at this place
};

constexpr int kMaxFaults = 16;

struct Launch {
  void (*entry)(void**);
  void** arguments;
  Index grid, block;
  uint64_t shared_bytes;     // dynamic, as launched
  uintptr_t dynamic_low;     // where dynamic shared memory lies, and how much of it there is room for
  uint64_t dynamic_room;
  uint64_t seed;             // 0: threads, warps and blocks in order
  uint64_t preempt;          // chance in 1000 that a thread is suspended after an access
  uint64_t checked;          // whether the module was built with instrumented accesses
  uint64_t flush_subnormals;
  uint64_t access_limit;     // of one thread, against loops without end
  uint64_t buffer_count;
  const Buffer* buffers;
  // results
  Counters counters;
  BufferTraffic* traffic;    // one for each buffer
  uint64_t fault_count;
  Fault faults[kMaxFaults];
};

}  // namespace simt
