// Shadow memory: who wrote and who read each piece of a buffer last, and whether it has ever been written.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "order.h"

namespace simt {

// Two readers are kept, of different warps where possible: a later write has to be ordered after all readers, and the
// usual mistake (no __syncthreads before a buffer is written again) leaves readers of every warp unordered.
struct Cell {
  Stamp write, read, read_too;
};

// One cell stands for a granule of 2^shift bytes. It starts at 16, the widest access there is, and is halved when a
// narrower access arrives: most buffers are accessed in one width, and a float4 then costs one cell, not sixteen.
class Shadow {
 public:
  Shadow(uintptr_t low, uintptr_t high) : low_(low), high_(high) { allocate(4); }

  bool contains(uintptr_t address, size_t size) const { return address >= low_ && address + size <= high_; }

  // The cells of an access of `size` (a power of two, aligned to it): pointer to the first, and how many.
  std::pair<Cell*, int> cells(uintptr_t address, int size) {
    while (size >> shift_ == 0) halve();
    return {cells_.get() + ((address >> shift_) - (low_ >> shift_)), size >> shift_};
  }
  int granule() const { return 1 << shift_; }

 private:
  struct Free { void operator()(Cell* p) const { free(p); } };

  size_t count(int shift) const { return ((high_ - 1) >> shift) - (low_ >> shift) + 1; }
  void allocate(int shift) {
    shift_ = shift;
    // calloc: pages that the kernel never touches are never touched here either
    cells_.reset(low_ == high_ ? nullptr : static_cast<Cell*>(calloc(count(shift), sizeof(Cell))));
  }
  void halve() {
    const std::unique_ptr<Cell[], Free> coarse(cells_.release());
    const int shift = shift_;
    allocate(shift - 1);
    const uintptr_t first = low_ >> (shift - 1);
    for (size_t i = 0; i < count(shift - 1); i++) cells_[i] = coarse[((first + i) >> 1) - (low_ >> shift)];
  }

  uintptr_t low_, high_;
  int shift_ = 4;
  std::unique_ptr<Cell[], Free> cells_;
};

// One byte for each byte of an allocation, 1 once it has been written, by the host or by a kernel. Kept by memory.py from
// launch to launch; absent (null) for memory that the emulator did not allocate.
class Initialised {
 public:
  Initialised() = default;
  explicit Initialised(uint8_t* map) : map_(map) {}
  explicit operator bool() const { return map_ != nullptr; }
  bool all(size_t offset, int size) const {
    for (int i = 0; i < size; i++)
      if (!map_[offset + i]) return false;
    return true;
  }
  void set(size_t offset, int size) { memset(map_ + offset, 1, static_cast<size_t>(size)); }

 private:
  uint8_t* map_ = nullptr;
};

}  // namespace simt
