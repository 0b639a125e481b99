// What happens before what: the ordering that CUDA promises between the threads of a launch.
//
// Each thread of a block counts its synchronizing events in a tick; an access carries the stamp (block, thread, tick).
// An earlier access is ordered before the present one if
//   - the same thread made it, or
//   - its tick lies before its thread's last __syncthreads, or
//   - its tick lies before what the present lane knows of that lane through __syncwarp (any mask; shuffles and votes
//     order nothing, as CUDA's guide says), or
//   - it was released to the present thread through an atomic. A release is a write, then __threadfence by the writer (or
//     by a thread that already sees the write through a barrier), then an atomic; it is received by a thread that makes
//     an atomic on the same address later and fences after it. Leaving out either fence is the usual mistake in
//     "the last block sums up": it works on most devices most of the time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simt {

using Tick = uint32_t;

struct Stamp {
  uint32_t block = 0;          // linear index + 1; 0: no access yet
  uint32_t thread : 10;
  uint32_t atomic : 1;
  uint32_t tick : 21;
  Stamp() : thread(0), atomic(0), tick(0) {}
  Stamp(uint32_t block_, int thread_, Tick tick_, bool atomic_)
      : block(block_), thread(static_cast<uint32_t>(thread_)), atomic(atomic_), tick(tick_) {}
  explicit operator bool() const { return block != 0; }
  bool same_thread(const Stamp& other) const { return block == other.block && thread == other.thread; }
};
static_assert(sizeof(Stamp) == 8, "the shadow memory counts on it");

class Order {
 public:
  void begin_launch() { locations_.clear(); }

  void begin_block(uint32_t block, int threads) {
    block_ = block;
    tick_.assign(threads, 1);
    at_barrier_.assign(threads, 0);
    lane_knows_.assign(static_cast<size_t>(threads) * 32, 0);
    fenced_.assign(threads, 0);
    fenced_at_barrier_.assign(threads, 0);
    barrier_snapshot_.reset();
    if (static_cast<int>(fences_.size()) == threads && !releases_in_block_) return;   // still as new
    fences_.assign(threads, {});
    received_.assign(threads, {});
    unfenced_.assign(threads, {});
    block_received_.clear();
    block_unfenced_.clear();
    releases_in_block_ = false;
  }

  // Names an address in `before` and `atomic_begin`: the same shared address is another place in every block.
  uintptr_t place(uintptr_t address, bool shared) const {
    return shared ? address ^ (static_cast<uintptr_t>(block_) << 47) : address;
  }

  Stamp stamp(int thread, bool atomic) const { return Stamp(block_, thread, tick_[thread], atomic); }
  uint32_t block() const { return block_; }

  bool before(const Stamp& earlier, int thread, uintptr_t place) const {
    if (!earlier) return true;
    if (earlier.block == block_) {
      const int other = static_cast<int>(earlier.thread);
      if (other == thread || earlier.tick < at_barrier_[other]) return true;
      if (other / 32 == thread / 32 && earlier.tick < lane_knows_[thread * 32 + other % 32]) return true;
    }
    return releases_in_block_ && released_to(earlier, thread, place);
  }

  void syncthreads() {
    for (size_t t = 0; t < tick_.size(); t++) {
      at_barrier_[t] = ++tick_[t];
      fenced_at_barrier_[t] = fenced_[t];
      if (releases_in_block_) {
        merge(block_received_, received_[t]);
        merge(block_unfenced_, unfenced_[t]);
      }
    }
    barrier_snapshot_.reset();
  }

  void syncwarp(int warp, uint32_t lanes) {
    Tick joined[32] = {};
    Received received, unfenced;
    for_lanes(warp, lanes, [&](int thread) {
      const Tick* knows = &lane_knows_[thread * 32];
      for (int lane = 0; lane < 32; lane++) joined[lane] = std::max(joined[lane], knows[lane]);
      merge(received, received_[thread]);
      merge(unfenced, unfenced_[thread]);
    });
    for_lanes(warp, lanes, [&](int thread) { joined[thread % 32] = ++tick_[thread]; });
    for_lanes(warp, lanes, [&](int thread) {
      std::copy(joined, joined + 32, &lane_knows_[thread * 32]);
      merge(received_[thread], received);
      merge(unfenced_[thread], unfenced);
    });
  }

  void fence(int thread) {
    releases_in_block_ = true;
    fenced_[thread] = ++tick_[thread];
    merge(received_[thread], unfenced_[thread]);
    merge(received_[thread], block_unfenced_);
    if (!barrier_snapshot_) barrier_snapshot_ = std::make_shared<const std::vector<Tick>>(at_barrier_);
    Fence& fence = fences_[thread];
    fence.sees = barrier_snapshot_;
    fence.lanes.assign(&lane_knows_[thread * 32], &lane_knows_[thread * 32] + 32);
    fence.received = received_[thread];
    merge(fence.received, block_received_);
  }

  // Between begin and end the thread's tick is that of the atomic access alone.
  void atomic_begin(int thread, uintptr_t place) {
    releases_in_block_ = true;
    Location& location = locations_[place];
    Release release{block_, thread, ++tick_[thread], visible_ticks(thread), fences_[thread].received};
    merge(unfenced_[thread], Received{{&location, location.releases.size()}});
    const size_t index = location.releases.size();
    location.of_block[block_].push_back(index);
    if (!release.received.empty()) location.forwarding.push_back(index);
    location.releases.push_back(std::move(release));
  }
  void atomic_end(int thread) { ++tick_[thread]; }

 private:
  struct Location;
  // Per address, how many of the atomics made there have been seen: a prefix of its history.
  using Received = std::vector<std::pair<const Location*, size_t>>;

  struct Fence {
    std::shared_ptr<const std::vector<Tick>> sees;   // all threads' ticks at the last barrier before the fence
    std::vector<Tick> lanes;                           // the same through __syncwarp
    Received received;
  };
  struct Release {
    uint32_t block;
    int thread;
    Tick atomic_tick;
    std::shared_ptr<const std::vector<Tick>> visible;   // per thread of the block: accesses below this tick are released
    Received received;                                  // and what had been released to the releasing thread before
  };
  struct Location {
    std::deque<Release> releases;
    std::unordered_map<uint32_t, std::vector<size_t>> of_block;
    std::vector<size_t> forwarding;                     // releases with a non-empty `received`
  };

  template <class F> void for_lanes(int warp, uint32_t lanes, F f) const {
    for (; lanes; lanes &= lanes - 1) f(warp * 32 + __builtin_ctz(lanes));
  }

  static void merge(Received& into, const Received& from) {
    for (const auto& item : from) {
      auto found = std::find_if(into.begin(), into.end(), [&](const auto& x) { return x.first == item.first; });
      if (found == into.end()) into.push_back(item);
      else found->second = std::max(found->second, item.second);
    }
  }

  std::shared_ptr<const std::vector<Tick>> visible_ticks(int thread) const {
    const Fence& fence = fences_[thread];
    if (!fence.sees) return nullptr;
    auto visible = std::make_shared<std::vector<Tick>>(*fence.sees);
    const int first = thread / 32 * 32;
    for (int lane = 0; lane < 32 && first + lane < static_cast<int>(visible->size()); lane++) {
      const int other = first + lane;
      Tick& tick = (*visible)[other];
      tick = std::max(tick, fence.lanes[lane]);
      if (fenced_[other] <= lane_knows_[thread * 32 + lane]) tick = std::max(tick, fenced_[other]);
    }
    // A thread that fenced its own writes before a barrier needs no second fence by the thread that makes the atomic.
    for (size_t other = 0; other < visible->size(); other++)
      (*visible)[other] = std::max((*visible)[other], fenced_at_barrier_[other]);
    (*visible)[thread] = std::max((*visible)[thread], fenced_[thread]);
    return visible;
  }

  bool released_to(const Stamp& earlier, int thread, uintptr_t place) const {
    if (received_in(received_[thread], earlier, 0) || received_in(block_received_, earlier, 0)) return true;
    // Accesses to one address need no fence between them: the atomics themselves are in order there.
    if (!earlier.atomic) return false;
    for (const Received* seen : {&unfenced_[thread], &block_unfenced_})
      for (const auto& [location, count] : *seen)
        if (location == at(place) && find(*location, count, earlier, /*only_atomic=*/true)) return true;
    return false;
  }
  const Location* at(uintptr_t place) const {
    const auto found = locations_.find(place);
    return found == locations_.end() ? nullptr : &found->second;
  }
  static bool find(const Location& location, size_t count, const Stamp& earlier, bool only_atomic) {
    const auto found = location.of_block.find(earlier.block);
    if (found == location.of_block.end()) return false;
    for (size_t index : found->second) {
      if (index >= count) break;
      const Release& release = location.releases[index];
      if (release.thread == static_cast<int>(earlier.thread) && release.atomic_tick == earlier.tick) return true;
      if (!only_atomic && release.visible && earlier.tick < (*release.visible)[earlier.thread]) return true;
    }
    return false;
  }
  static bool received_in(const Received& received, const Stamp& earlier, int depth) {
    for (const auto& [location, count] : received) {
      if (find(*location, count, earlier, false)) return true;
      if (depth == 4) continue;   // a chain of more than four counters is not worth the search
      for (size_t index : location->forwarding)
        if (index < count && received_in(location->releases[index].received, earlier, depth + 1)) return true;
    }
    return false;
  }

  uint32_t block_ = 0;
  bool releases_in_block_ = false;
  std::vector<Tick> tick_, at_barrier_, fenced_, fenced_at_barrier_;
  std::vector<Tick> lane_knows_;                        // [thread][lane of its warp]
  std::vector<Fence> fences_;
  std::vector<Received> received_, unfenced_;           // per thread: after, before its fence
  Received block_received_, block_unfenced_;            // the same at the last barrier
  std::shared_ptr<const std::vector<Tick>> barrier_snapshot_;
  std::unordered_map<uintptr_t, Location> locations_;   // node-based: pointers to values stay valid
};

}  // namespace simt
