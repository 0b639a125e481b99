// Threads take turns: a warp runs until all its lanes wait or are done, then its collectives are carried out; when no
// warp can run, the block stands at a barrier, is finished, or is stuck.
#include "machine.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace simt {

Machine machine;

namespace {

// The device flushes float32 subnormals where CuPy compiles (it appends -ftz=true). The CPU's switch covers float64 too.
class SubnormalsFlushed {
 public:
  explicit SubnormalsFlushed(bool on) {
#if defined(__SSE2__)
    saved_ = _mm_getcsr();
    if (on) _mm_setcsr(saved_ | 0x8040);   // flush to zero, denormals are zero
#else
    (void)on;
#endif
  }
  ~SubnormalsFlushed() {
#if defined(__SSE2__)
    _mm_setcsr(saved_);
#endif
  }

 private:
  unsigned saved_ = 0;
};

}  // namespace

bool Machine::next_copy(void** to, const void** from) {
  Thread& t = *current_;
  if (t.copied == t.copies.size()) {
    t.copies.clear();
    t.copied = 0;
    return false;
  }
  *to = t.copies[t.copied].first;
  *from = t.copies[t.copied++].second;
  return true;
}

void Machine::run(Launch& launch) {
  launch_ = &launch;
  launch.fault_count = 0;
  grid_shape = launch.grid;
  block_shape = launch.block;
  threads_in_block_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  warps_ = (threads_in_block_ + 31) / 32;
  random_.seed(launch.seed);
  shuffled_ = launch.seed != 0;
  abandoned_ = false;
  caller_ = 0;
  stacks_.reserve();
  threads_.resize(kMaxThreads);
  for (int i = 0; i < threads_in_block_; i++) {
    Thread& t = threads_[i];
    t.number = i;
    t.index.x = i % launch.block.x;
    t.index.y = i / launch.block.x % launch.block.y;
    t.index.z = i / (launch.block.x * launch.block.y);
  }
  find_module(reinterpret_cast<const void*>(launch.entry));
  set_up_checks();

  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<uint32_t> block_order(blocks);
  for (uint64_t i = 0; i < blocks; i++) block_order[i] = static_cast<uint32_t>(i);
  if (shuffled_)
    for (uint64_t i = blocks; i-- > 1;) std::swap(block_order[i], block_order[random_.below(static_cast<uint32_t>(i + 1))]);

  const SubnormalsFlushed flushed(launch.flush_subnormals != 0);
  for (uint32_t block : block_order) {
    block_index.x = block % launch.grid.x;
    block_index.y = block / launch.grid.x % launch.grid.y;
    block_index.z = block / (launch.grid.x * launch.grid.y);
    if (launch.checked) {
      order_.begin_block(block + 1, threads_in_block_);
      traffic_.begin_block(warps_);
    }
    run_block();
    if (launch.checked) for (int w = 0; w < warps_; w++) traffic_.flush(w);
    if (abandoned_) break;
  }
  launch.counters = traffic_.counters;
  for (size_t i = 0; i < launch.buffer_count; i++) launch.traffic[i] = traffic_.buffers()[i];
  shadows_.clear();
  launch_ = nullptr;
}

void Machine::thread_main() {
  machine.launch_->entry(machine.launch_->arguments);
  machine.current_->state = Thread::DONE;
  machine.current_->fiber.suspend();
  abort();   // a finished thread is never resumed
}

void Machine::run_block() {
  fill_shared_memory();
  for (int i = 0; i < threads_in_block_; i++) {
    threads_[i].fiber.start(stacks_.of(i), thread_main);
    threads_[i].state = Thread::READY;
    threads_[i].accesses = 0;
    threads_[i].copies.clear();
    threads_[i].copied = 0;
  }
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    for (int w = warps_; w-- > 0;) {
      bool any = false;
      for (int i = w * 32; i < std::min(w * 32 + 32, threads_in_block_); i++) any |= threads_[i].state == Thread::READY;
      if (any) ready.push_back(w);
    }
    if (ready.empty() && !resolve_barrier()) return;
    while (!ready.empty()) {
      // One turn of a warp goes to its next collective; a random choice lets some warps run far ahead of others.
      const size_t pick = shuffled_ ? random_.below(static_cast<uint32_t>(ready.size())) : ready.size() - 1;
      const int warp = ready[pick];
      run_warp(warp);
      if (abandoned_) return;
      resolve_warp(warp);
      bool any = false;
      for (int i = warp * 32; i < std::min(warp * 32 + 32, threads_in_block_); i++)
        any |= threads_[i].state == Thread::READY;
      if (!any) {
        ready[pick] = ready.back();
        ready.pop_back();
      }
    }
  }
}

void Machine::run_warp(int warp) {
  const int first = warp * 32, lanes = std::min(32, threads_in_block_ - first);
  // start + i * odd visits all 32 lanes, in one of 512 orders
  const uint32_t r = shuffled_ ? random_.below(1024) : 0;
  const int start = static_cast<int>(r & 31), step = static_cast<int>(r >> 5 | 1);
  for (int i = 0; i < 32; i++) {
    const int lane = (start + i * step) & 31;
    if (lane >= lanes) continue;
    Thread& t = threads_[first + lane];
    if (t.state != Thread::READY) continue;
    current_ = &t;
    t.fiber.resume();
    current_ = nullptr;
    if (abandoned_) return;
  }
}

// ---------------------------------------------------------------- warp collectives

void Machine::resolve_warp(int warp) {
  const int first = warp * 32, lanes = std::min(32, threads_in_block_ - first);
  uint32_t alive = 0;
  for (int lane = 0; lane < lanes; lane++) alive |= uint32_t(threads_[first + lane].state != Thread::DONE) << lane;
  for (int lane = 0; lane < lanes; lane++) {
    const Thread& leader = threads_[first + lane];
    if (!leader.waits_in_warp()) continue;
    // Lanes that have exited need not come; the others named in the mask must all be at this very call.
    const uint32_t needed = leader.mask & alive;
    uint32_t arrived = 0;
    for (uint32_t rest = needed; rest; rest &= rest - 1) {
      const Thread& t = threads_[first + __builtin_ctz(rest)];
      if (t.waits_in_warp() && t.op == leader.op && t.mask == leader.mask && t.line == leader.line)
        arrived |= rest & -rest;
    }
    if (arrived != needed) continue;
    exchange(warp, needed);
    if (!launch_->checked) continue;
    traffic_.counters.collectives++;
    if (leader.op == SYNCWARP) order_.syncwarp(warp, needed);
    if (needed == alive) traffic_.flush(warp);
  }
}

void Machine::exchange(int warp, uint32_t lanes) {
  Thread* const thread = &threads_[warp * 32];
  uint32_t votes = 0;
  for (uint32_t rest = lanes; rest; rest &= rest - 1)
    if (thread[__builtin_ctz(rest)].value) votes |= rest & -rest;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Thread& t = thread[lane];
    t.state = Thread::READY;
    const int segment = lane / t.width * t.width, end = segment + t.width;
    int source = lane;   // where a shuffle reads; out of its segment it keeps its own value
    switch (t.op) {
      case SYNCWARP: continue;
      case BALLOT: t.result = votes; continue;
      case ANY: t.result = votes != 0; continue;
      case ALL: t.result = votes == lanes; continue;
      case SHFL_XOR: source = (lane ^ t.argument) < end ? lane ^ t.argument : lane; break;
      case SHFL_DOWN: source = lane + t.argument < end ? lane + t.argument : lane; break;
      case SHFL_UP: source = lane - t.argument >= segment ? lane - t.argument : lane; break;
      case SHFL_IDX: source = segment + (t.argument & (t.width - 1)); break;
    }
    if (lanes >> source & 1) {
      t.result = thread[source].value;
    } else {
      current_ = &t;
      report("bad-mask", t.line, "%s reads lane %d, which does not take part (mask %08x)", name_of(t.op), source, t.mask);
      current_ = nullptr;
      t.result = ~0ull;   // undefined on the device: something that shows
    }
  }
}

uint64_t Machine::collective(int op, uint32_t mask, uint64_t value, int argument, int width, int line) {
  Thread& t = *current_;
  caller_ = 0;
  if (op >= SYNCWARP && !(mask >> t.lane() & 1))
    report("bad-mask", line, "%s: the calling lane %d is not in its mask %08x", name_of(op), t.lane(), mask);
  if (op >= SYNCWARP && (width < 1 || width > 32 || (width & (width - 1)))) {
    report("bad-mask", line, "%s: width %d is no power of two up to 32", name_of(op), width);
    width = 32;
  }
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  t.width = width;
  t.line = line;
  t.state = Thread::WAITING;
  t.fiber.suspend();
  return t.result;
}

// ---------------------------------------------------------------- block barriers

// No warp can run. True: the threads that stood at a barrier have been let go.
bool Machine::resolve_barrier() {
  int waiting = 0, done = 0;
  uint64_t votes = 0;
  const Thread* first = nullptr;
  const Thread* different = nullptr;
  for (int i = 0; i < threads_in_block_; i++) {
    const Thread& t = threads_[i];
    if (t.state == Thread::DONE) done++;
    if (!t.waits_at_barrier()) continue;
    waiting++;
    votes += t.value;
    if (!first) first = &t;
    else if (t.op != first->op || t.line != first->line) different = &t;
  }
  if (done == threads_in_block_) return false;
  if (waiting + done != threads_in_block_) {
    report_deadlock();
    return false;
  }
  caller_ = 0;
  if (done) {
    report("divergent-barrier", first->line, "%d threads wait at %s, %d have left the kernel", waiting,
           name_of(first->op), done);
    abandoned_ = true;
    return false;
  }
  if (different) {
    report("divergent-barrier", first->line, "some threads wait at %s in line %d, others at %s in line %d",
           name_of(first->op), first->line, name_of(different->op), different->line);
    abandoned_ = true;
    return false;
  }
  for (int i = 0; i < threads_in_block_; i++) {
    Thread& t = threads_[i];
    t.result = t.op == SYNCTHREADS_OR ? votes != 0 : t.op == SYNCTHREADS_AND ? votes == uint64_t(waiting) : votes;
    t.state = Thread::READY;
  }
  if (launch_->checked) {
    order_.syncthreads();
    traffic_.counters.barriers++;
    for (int w = 0; w < warps_; w++) traffic_.flush(w);
  }
  return true;
}

void Machine::report_deadlock() {
  for (int i = 0; i < threads_in_block_; i++) {
    Thread& t = threads_[i];
    if (!t.waits_in_warp()) continue;
    const Thread* missing = nullptr;
    for (int lane = 0; lane < 32 && t.warp() * 32 + lane < threads_in_block_; lane++) {
      const Thread& other = threads_[t.warp() * 32 + lane];
      const bool arrived = other.waits_in_warp() && other.op == t.op && other.mask == t.mask && other.line == t.line;
      if ((t.mask >> lane & 1) && other.state != Thread::DONE && !arrived) missing = &other;
    }
    current_ = &t;
    caller_ = 0;
    report("deadlock", t.line, "%s with mask %08x waits for lane %d, which is at %s in line %d", name_of(t.op), t.mask,
           missing ? missing->lane() : -1, missing ? name_of(missing->op) : "", missing ? missing->line : 0);
    current_ = nullptr;
    break;
  }
  abandoned_ = true;
}

// Shared memory starts as NaN: on the device it holds whatever the last block left there.
void Machine::fill_shared_memory() {
  const uintptr_t dynamic_end = launch_->dynamic_low + launch_->dynamic_room;
  auto fill = [](uintptr_t low, uintptr_t high) {
    if (low < high) memset(reinterpret_cast<void*>(low), 0xFF, high - low);
  };
  fill(shared_low_, launch_->dynamic_low);
  fill(launch_->dynamic_low, launch_->dynamic_low + launch_->shared_bytes);
  fill(dynamic_end, shared_high_);
}

}  // namespace simt
