// Every load and store of an instrumented kernel comes by here: is it allowed, is it ordered, what does it cost?
#include <link.h>

#include "machine.h"

namespace simt {

namespace {

struct ModuleQuery {
  uintptr_t inside;
  uintptr_t low = ~uintptr_t(0), high = 0, shared_low = 0, shared_high = 0;
};

// The loaded object that holds `inside`: its address range and this thread's block of its thread_local variables.
int inspect_module(dl_phdr_info* info, size_t, void* data) {
  auto& query = *static_cast<ModuleQuery*>(data);
  bool here = false;
  uintptr_t low = ~uintptr_t(0), high = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t start = info->dlpi_addr + header.p_vaddr;
    here |= query.inside >= start && query.inside < start + header.p_memsz;
    low = std::min<uintptr_t>(low, start);
    high = std::max<uintptr_t>(high, start + header.p_memsz);
  }
  if (!here) return 0;
  query.low = low;
  query.high = high;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
      query.shared_low = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      query.shared_high = query.shared_low + info->dlpi_phdr[i].p_memsz;
    }
  return 1;
}

}  // namespace

void Machine::find_module(const void* inside) {
  ModuleQuery query;
  query.inside = reinterpret_cast<uintptr_t>(inside);
  dl_iterate_phdr(inspect_module, &query);
  module_low_ = query.low;
  module_high_ = query.high;
  shared_low_ = query.shared_low;
  shared_high_ = query.shared_high;
}

void Machine::set_up_checks() {
  traffic_.begin_launch(launch_->buffer_count);
  order_.begin_launch();
  shadows_.clear();
  shadow_of_.assign(launch_->buffer_count, -1);
  last_found_[0] = last_found_[1] = -1;
  if (!launch_->checked) return;
  shared_shadow_ = std::make_unique<Shadow>(shared_low_, shared_high_);
  // Buffers that overlap (out=x, views of one array) share their shadow, or races between them would go unseen.
  std::vector<size_t> by_address(launch_->buffer_count);
  for (size_t i = 0; i < by_address.size(); i++) by_address[i] = i;
  const Buffer* buffers = launch_->buffers;
  std::sort(by_address.begin(), by_address.end(), [&](size_t a, size_t b) { return buffers[a].low < buffers[b].low; });
  for (size_t i = 0; i < by_address.size();) {
    const uintptr_t low = buffers[by_address[i]].low;
    uintptr_t high = buffers[by_address[i]].high;
    size_t end = i;
    while (end < by_address.size() && (end == i || buffers[by_address[end]].low < high)) {
      high = std::max(high, buffers[by_address[end]].high);
      shadow_of_[by_address[end++]] = static_cast<int>(shadows_.size());
    }
    shadows_.emplace_back(low, high);
    i = end;
  }
}

void Machine::access(uintptr_t address, int size, bool write, uintptr_t caller, bool atomic) {
  if (!current_ || stacks_.contains(address)) return;   // a local variable
  caller_ = caller;
  traffic_.counters.accesses++;
  if (++current_->accesses > launch_->access_limit) {
    report("runaway", 0, "more than %zu accesses by one thread", static_cast<size_t>(launch_->access_limit));
    abandon();
  }
  if (address & (size - 1)) {   // the device stops the kernel here, and so may an aligned move of the CPU
    report("misaligned", 0, "%s of %d bytes at an address that is %d modulo %d", write ? "store" : "load", size,
           static_cast<int>(address & (size - 1)), size);
    abandon();
  }
  if (address - shared_low_ < shared_high_ - shared_low_) shared_access(address, size, write, atomic);
  else global_access(address, size, write, atomic);
  caller_ = 0;
  if (launch_->preempt && random_.below(1000) < launch_->preempt) current_->fiber.suspend();   // stays ready
}

// "byte 12 of dynamic shared memory", "byte 3 of static shared memory"
std::string Machine::shared_place(uintptr_t address) const {
  const uintptr_t dynamic = launch_->dynamic_low;
  const bool inside = address >= dynamic && address < dynamic + launch_->dynamic_room;
  return "byte " + std::to_string(address - (inside ? dynamic : shared_low_)) +
         (inside ? " of dynamic shared memory" : " of static shared memory");
}

void Machine::shared_access(uintptr_t address, int size, bool write, bool atomic) {
  const uintptr_t dynamic = launch_->dynamic_low;
  if (address >= dynamic && address < dynamic + launch_->dynamic_room && address + size > dynamic + launch_->shared_bytes) {
    report("out-of-bounds", 0, "%s of %d bytes at byte %zu of dynamic shared memory, of which the launch gave %zu",
           write ? "store" : "load", size, static_cast<size_t>(address - dynamic), static_cast<size_t>(launch_->shared_bytes));
    abandon();
  }
  auto [cells, count] = shared_shadow_->cells(address, size);
  const uint32_t block = order_.block();
  for (int i = 0; i < count; i++) {
    if (cells[i].write.block != block) cells[i].write = Stamp();   // another block's shared memory, in the same place
    if (cells[i].read.block != block) cells[i].read = Stamp();
    if (cells[i].read_too.block != block) cells[i].read_too = Stamp();
    if (!cells[i].write && (!write || atomic))
      report("uninitialised-shared", 0, "load of %d bytes at %s, which this block has not written", size,
             shared_place(address).c_str());
  }
  check_races(cells, count, address, shared_shadow_->granule(), write, atomic, -1);
  log_access(address, size, write, true, 0);
}

void Machine::global_access(uintptr_t address, int size, bool write, bool atomic) {
  const int index = find_buffer(address, size, write);
  if (index < 0) {
    outside_all_buffers(address, size, write);
    return;
  }
  const Buffer& buffer = launch_->buffers[index];
  if (write && !buffer.writable)
    report("const-write", 0, "store of %d bytes to %s, a pointer to const", size, buffer.name);
  if (Initialised known{buffer.initialised}) {
    const size_t offset = address - buffer.low;
    if ((!write || atomic) && !known.all(offset, size))
      report("uninitialised-global", 0, "load of %d bytes at byte %zu of %s, never written", size, offset, buffer.name);
    if (write) known.set(offset, size);
  }
  Shadow& shadow = shadows_[shadow_of_[index]];
  auto [cells, count] = shadow.cells(address, size);
  for (int i = 0; i < count; i++) {
    const bool first = write ? !cells[i].write : !cells[i].read;
    if (first) traffic_.count_unique(index, write, size / count);
  }
  check_races(cells, count, address, shadow.granule(), write, atomic, index);
  traffic_.count(index, write, size);
  log_access(address, size, write, false, index);
}

void Machine::check_races(Cell* cells, int count, uintptr_t address, int granule, bool write, bool atomic, int buffer) {
  const int thread = current_->number;
  const Stamp now = order_.stamp(thread, atomic);
  const uintptr_t place = order_.place(address, buffer < 0);
  for (int i = 0; i < count; i++) {
    Cell& cell = cells[i];
    auto ordered = [&](const Stamp& earlier) {
      return (atomic && earlier.atomic) || order_.before(earlier, thread, place);
    };
    const Stamp* other = nullptr;
    const char* was = "store";
    if (!ordered(cell.write)) other = &cell.write;
    else if (write && !ordered(cell.read)) other = &cell.read, was = "load";
    else if (write && !ordered(cell.read_too)) other = &cell.read_too, was = "load";
    if (other) {
      const bool inside = other->block == order_.block();
      char where[96], whose[64] = "";
      if (buffer < 0) snprintf(where, sizeof where, "%s", shared_place(address + i * granule).c_str());
      else snprintf(where, sizeof where, "byte %zu of %s",
                    static_cast<size_t>(address - launch_->buffers[buffer].low + i * granule), launch_->buffers[buffer].name);
      if (!inside) snprintf(whose, sizeof whose, " of block %u", other->block - 1);
      report(buffer < 0 ? "race-shared" : inside ? "race-global" : "race-blocks", 0,
             "%s at %s races with a %s by thread %d%s: nothing orders them", write ? (atomic ? "atomic" : "store") : "load",
             where, was, static_cast<int>(other->thread), whose);
    }
    if (write) {
      cell.write = now;
      // Whoever is ordered after this write is ordered after what it was checked against.
      if (cell.read) cell.read = now;
      cell.read_too = Stamp();
      continue;
    }
    // An earlier reader gives way to one that is ordered after it, else to one of its own warp.
    auto gives_way = [&](const Stamp& reader) {
      return reader.same_thread(now) || order_.before(reader, thread, place) ||
             (reader.block == now.block && reader.thread / 32 == now.thread / 32);
    };
    if (gives_way(cell.read)) cell.read = now;
    else if (gives_way(cell.read_too)) cell.read_too = now;
  }
}

void Machine::log_access(uintptr_t address, int size, bool write, bool shared, int buffer) {
  // 0 is reserved for accesses from outside the module (there are none but memcpy's)
  const uintptr_t offset = caller_ - module_low_ < module_high_ - module_low_ ? caller_ - module_low_ : 0;
  traffic_.record(current_->warp(), current_->lane(), traffic_.site(offset, size, write, shared), buffer, address);
}

// A read prefers a pointer to const, a write one that may be written: with out=x both name the same memory.
int Machine::find_buffer(uintptr_t address, int size, bool write) {
  auto inside = [&](size_t i) { return address >= launch_->buffers[i].low && address + size <= launch_->buffers[i].high; };
  int& last = last_found_[write];
  if (static_cast<size_t>(last) < launch_->buffer_count && inside(last)) return last;
  int found = -1;
  for (size_t i = 0; i < launch_->buffer_count; i++) {
    if (!inside(i)) continue;
    if (found < 0 || (launch_->buffers[i].writable != 0) == write) found = static_cast<int>(i);
    if ((launch_->buffers[i].writable != 0) == write) break;
  }
  if (found >= 0) last = found;
  return found;
}

void Machine::outside_all_buffers(uintptr_t address, int size, bool write) {
  const char* what = write ? "store" : "load";
  if (address - module_low_ < module_high_ - module_low_) {   // constants, and variables at file scope
    if (!write) return;
    report("wild", 0, "store of %d bytes to a variable at file scope", size);
    return;
  }
  const Buffer* nearest = nullptr;
  uintptr_t distance = 1 << 20;
  for (size_t i = 0; i < launch_->buffer_count; i++) {
    const Buffer& b = launch_->buffers[i];
    const uintptr_t d = address < b.low ? b.low - address : address >= b.high ? address - b.high : 0;
    if (d < distance) distance = d, nearest = &b;
  }
  if (address < 4096) report("out-of-bounds", 0, "%s of %d bytes through a null pointer", what, size);
  else if (!nearest) report("out-of-bounds", 0, "wild %s of %d bytes, far from every argument", what, size);
  else report("out-of-bounds", 0, "%s of %d bytes at byte %td of %s, which has %zu", what, size,
              static_cast<ptrdiff_t>(address - nearest->low), nearest->name, static_cast<size_t>(nearest->high - nearest->low));
  abandon();
}

void Machine::atomic_begin(uintptr_t address, int size, uintptr_t caller) {
  if (!launch_->checked) return;
  traffic_.counters.atomics++;
  const bool shared = address - shared_low_ < shared_high_ - shared_low_;
  order_.atomic_begin(current_->number, order_.place(address, shared));
  access(address, size, true, caller, true);
}

void Machine::atomic_end() {
  if (launch_->checked) order_.atomic_end(current_->number);
}

void Machine::fence() {
  if (!launch_->checked) return;
  traffic_.counters.fences++;
  order_.fence(current_->number);
}

void Machine::trap(int line) {
  report("trap", line, "__trap()");
  abandon();
}

// ---------------------------------------------------------------- faults

void Machine::report(const char* kind, int line, const char* format, ...) {
  const uint64_t offset = caller_ ? caller_ - module_low_ : 0;
  for (uint64_t i = 0; i < launch_->fault_count; i++) {
    Fault& known = launch_->faults[i];
    if (known.offset == offset && known.line == uint64_t(line) && !strcmp(known.kind, kind)) {
      known.count++;
      return;
    }
  }
  if (launch_->fault_count == kMaxFaults) {
    abandoned_ = true;   // seen enough; the thread at hand still gets to its next collective
    return;
  }
  Fault& fault = launch_->faults[launch_->fault_count++];
  memset(&fault, 0, sizeof fault);
  snprintf(fault.kind, sizeof fault.kind, "%s", kind);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault.text, sizeof fault.text, format, arguments);
  va_end(arguments);
  fault.offset = offset;
  fault.line = static_cast<uint64_t>(line);
  fault.block = block_index;
  if (current_) fault.thread = current_->index;
  fault.count = 1;
}

void Machine::abandon() {
  abandoned_ = true;
  for (;;) current_->fiber.suspend();   // its stack is simply used again
}

}  // namespace simt
