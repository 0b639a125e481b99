// The machine: runs a launch block by block, warp by warp, lane by lane, in an order that the seed decides.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "order.h"
#include "shadow.h"

namespace simt {

enum Collective : int {   // as in device.h
  SYNCTHREADS = 1, SYNCTHREADS_OR, SYNCTHREADS_AND, SYNCTHREADS_COUNT,
  SYNCWARP, SHFL_XOR, SHFL_DOWN, SHFL_UP, SHFL_IDX, BALLOT, ANY, ALL
};
inline const char* name_of(int op) {
  static const char* names[] = {"", "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
                                "__syncwarp", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync", "__shfl_sync",
                                "__ballot_sync", "__any_sync", "__all_sync"};
  return names[op];
}

struct Thread {
  enum State { READY, WAITING, DONE };
  Fiber fiber;
  State state = DONE;
  int number = 0;            // within the block
  Index index{};
  uint64_t accesses = 0;
  // the collective that the thread waits at
  int op = 0, argument = 0, width = 0, line = 0;
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  std::vector<std::pair<void*, const void*>> copies;   // asked for by cp.async; the next to be made is copies[copied]
  size_t copied = 0;

  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
  bool waits_at_barrier() const { return state == WAITING && op <= SYNCTHREADS_COUNT; }
  bool waits_in_warp() const { return state == WAITING && op >= SYNCWARP; }
};

class Random {   // splitmix64
 public:
  void seed(uint64_t s) { state_ = s * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull; }
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }

 private:
  uint64_t state_ = 0;
};

class Machine {
 public:
  void run(Launch& launch);

  // called from inside a CUDA thread
  uint64_t collective(int op, uint32_t mask, uint64_t value, int argument, int width, int line);
  void access(uintptr_t address, int size, bool write, uintptr_t caller, bool atomic = false);
  void atomic_begin(uintptr_t address, int size, uintptr_t caller);
  void atomic_end();
  void fence();
  [[noreturn]] void trap(int line);
  void copy_async(void* to, const void* from) { current_->copies.emplace_back(to, from); }
  bool next_copy(void** to, const void** from);
  const Thread& current() const { return *current_; }

  Index block_index{}, block_shape{}, grid_shape{};

 private:
  // scheduler.cpp
  void run_block();
  void run_warp(int warp);
  void resolve_warp(int warp);
  void exchange(int warp, uint32_t lanes);
  bool resolve_barrier();
  void report_deadlock();
  void fill_shared_memory();
  static void thread_main();

  // checker.cpp
  void find_module(const void* inside);
  void set_up_checks();
  void shared_access(uintptr_t address, int size, bool write, bool atomic);
  void global_access(uintptr_t address, int size, bool write, bool atomic);
  void check_races(Cell* cells, int count, uintptr_t address, int granule, bool write, bool atomic, int buffer);
  void log_access(uintptr_t address, int size, bool write, bool shared, int buffer);
  std::string shared_place(uintptr_t address) const;
  int find_buffer(uintptr_t address, int size, bool write);
  void outside_all_buffers(uintptr_t address, int size, bool write);
  void report(const char* kind, int line, const char* format, ...) __attribute__((format(printf, 4, 5)));
  [[noreturn]] void abandon();   // a fault after which the launch cannot go on

  Launch* launch_ = nullptr;
  Random random_;
  bool shuffled_ = false, abandoned_ = false;
  int threads_in_block_ = 0, warps_ = 0;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  Stacks stacks_;

  Order order_;
  Traffic traffic_;
  uintptr_t caller_ = 0;                       // program counter of the access at hand
  uintptr_t module_low_ = 0, module_high_ = 0;
  uintptr_t shared_low_ = 0, shared_high_ = 0;   // the module's thread_local block: static, then dynamic shared memory
  std::unique_ptr<Shadow> shared_shadow_;
  std::vector<Shadow> shadows_;                  // one for each set of overlapping buffers
  std::vector<int> shadow_of_;                   // by buffer
  int last_found_[2] = {-1, -1};                 // buffer of the latest read, of the latest write
};

extern Machine machine;

}  // namespace simt
