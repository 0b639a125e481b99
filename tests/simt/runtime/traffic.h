// What a launch costs in memory: bytes, 32-byte sectors and shared-memory wavefronts, instruction by instruction.
//
// The threads run one after another, so the accesses of one warp instruction arrive apart. They are put together again by
// (warp, program counter, how often this lane has been there since the warp last stood together).
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace simt {

// Mirrored by module.py.
struct Flow {
  uint64_t requests;   // warp instructions
  uint64_t bytes;      // asked for, all lanes
  uint64_t useful;     // distinct within each warp instruction
  uint64_t sectors;    // 32-byte pieces touched by each warp instruction
  uint64_t unique;     // distinct bytes within the launch
  uint64_t wide;       // bytes asked for by 16-byte accesses
  uint64_t widest;     // bytes of the widest access
  uint64_t narrowest;  // and of the narrowest
};
struct BufferTraffic {
  Flow read, write;
};
struct Counters {
  uint64_t shared_requests;     // phases of 32 words: what the accesses would cost without bank conflicts
  uint64_t shared_wavefronts;   // what they cost
  uint64_t barriers, collectives, atomics, fences, accesses;
};

class Traffic {
 public:
  void begin_launch(size_t buffers) {
    buffers_.assign(buffers, {});
    counters = {};
    sites_.clear();
    by_offset_.clear();
    warps_.clear();
  }
  void begin_block(int warps) {
    if (static_cast<int>(warps_.size()) < warps) warps_.resize(warps);
  }

  // A site is a place in the program that makes accesses of one kind. A program counter can have several: the pieces of a
  // memcpy, or a pointer that is now shared, now global.
  int site(uintptr_t offset, int size, bool write, bool shared) {
    if (by_offset_.size() <= offset) by_offset_.resize(offset + 4096, -1);
    int* slot = &by_offset_[offset];
    while (*slot >= 0) {
      Site& s = sites_[*slot];
      if (s.size == size && s.write == write && s.shared == shared) return *slot;
      slot = &s.next;
    }
    *slot = static_cast<int>(sites_.size());
    const int id = *slot;                    // push_back may move what slot points into
    sites_.push_back({size, write, shared, -1});
    return id;
  }

  void record(int warp, int lane, int site, int buffer, uintptr_t address) {
    Warp& w = warps_[warp];
    if (static_cast<int>(w.logs.size()) <= site) w.logs.resize(site + 1);
    Log& log = w.logs[site];
    if (log.rows.empty()) w.touched.push_back(site);
    const uint32_t row = log.count[lane]++;
    if (log.rows.size() <= row) log.rows.emplace_back();
    log.rows[row].address[lane] = address;
    log.rows[row].buffer = buffer;
  }

  void count(int buffer, bool write, int size) {
    Flow& flow = write ? buffers_[buffer].write : buffers_[buffer].read;
    flow.bytes += size;
    if (size == 16) flow.wide += size;
    if (static_cast<int>(flow.widest) < size) flow.widest = size;
    if (flow.narrowest == 0 || static_cast<int>(flow.narrowest) > size) flow.narrowest = size;
  }
  void count_unique(int buffer, bool write, int size) {
    (write ? buffers_[buffer].write : buffers_[buffer].read).unique += size;
  }

  // The warp stands together: what its lanes did so far is complete.
  void flush(int warp) {
    Warp& w = warps_[warp];
    for (int site : w.touched) {
      Log& log = w.logs[site];
      for (Row& row : log.rows) {
        if (sites_[site].shared) shared_row(row, sites_[site].size);
        else global_row(row, sites_[site]);
      }
      log.rows.clear();
      std::fill(log.count, log.count + 32, 0);
    }
    w.touched.clear();
  }

  const std::vector<BufferTraffic>& buffers() const { return buffers_; }
  Counters counters{};

 private:
  struct Site { int size; bool write, shared; int next; };
  struct Row {
    uintptr_t address[32] = {};   // 0: this lane is not there
    int buffer = 0;
  };
  struct Log {
    std::vector<Row> rows;
    uint32_t count[32] = {};
  };
  struct Warp {
    std::vector<Log> logs;        // by site
    std::vector<int> touched;
  };

  void global_row(const Row& row, const Site& site) {
    uintptr_t a[32];
    int n = 0;
    for (uintptr_t address : row.address)
      if (address) a[n++] = address;
    std::sort(a, a + n);
    n = static_cast<int>(std::unique(a, a + n) - a);
    uint64_t sectors = 0, last = ~0ull;
    for (int i = 0; i < n; i++)   // an aligned access lies in one sector
      if (a[i] / 32 != last) last = a[i] / 32, sectors++;
    Flow& flow = site.write ? buffers_[row.buffer].write : buffers_[row.buffer].read;
    flow.requests++;
    flow.sectors += sectors;
    flow.useful += static_cast<uint64_t>(n) * site.size;
  }

  // 32 banks of 4 bytes. 8-byte accesses are served half a warp at a time, 16-byte ones a quarter; within such a phase,
  // different words in one bank wait for each other, the same word is broadcast.
  void shared_row(const Row& row, int size) {
    const int words = std::max(1, size / 4), lanes = 32 / words;
    for (int phase = 0; phase < words; phase++) {
      uintptr_t seen[32][32];
      int in_bank[32] = {}, worst = 0;
      for (int lane = phase * lanes; lane < (phase + 1) * lanes; lane++) {
        if (!row.address[lane]) continue;
        for (int i = 0; i < words; i++) {
          const uintptr_t word = row.address[lane] / 4 + i;
          uintptr_t* bank = seen[word % 32];
          int& n = in_bank[word % 32];
          if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
          worst = std::max(worst, n);
        }
      }
      counters.shared_requests += worst > 0;
      counters.shared_wavefronts += worst;
    }
  }

  std::vector<BufferTraffic> buffers_;
  std::vector<Site> sites_;
  std::vector<int> by_offset_;    // first site of each program counter, relative to the module
  std::vector<Warp> warps_;
};

}  // namespace simt
