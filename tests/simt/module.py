"""Stand-ins for cupy.RawModule and cupy.RawKernel that run the kernel on the CPU and record what it did."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import build, memory
from .faults import Fault, SimtFault, SourceLines, locate

MAX_FAULTS = 16


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """How kernels are run, looked up at every launch.

    mode : "check" sees every access; "fast" is an optimised build without instrumentation, for values over many shapes.
    seed : 0 runs blocks, warps and threads in order, any other number in a random order of its own.
    preempt : chance in 1000 that a thread is suspended after an access (check mode).
    contract : fast mode: let the compiler fuse a*b+c as NVRTC does by default (-fmad=true).
    flush_subnormals : None takes it from the module's options (CuPy appends -ftz=true to them).
    access_limit : accesses by one thread after which it counts as caught in a loop.
    """

    mode: str = "check"
    seed: int = 0
    preempt: int = 0
    contract: bool = False
    flush_subnormals: bool | None = None
    access_limit: int = 20_000_000


_settings = Settings()


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Run kernels with other settings: ``with using(mode="fast", seed=3): ...``."""
    global _settings
    before = _settings
    _settings = dataclasses.replace(before, **changes)
    try:
        yield
    finally:
        _settings = before


@dataclass(frozen=True)
class Limits:
    """What a launch may ask for: the numbers of sm_90."""

    threads: int = 1024
    block: tuple[int, int, int] = (1024, 1024, 64)
    grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)
    shared: int = 48 << 10
    shared_opt_in: int = build.DYNAMIC_SHARED_ROOM


LIMITS = Limits()


def shared_opt_in() -> int:
    """Shared memory that a block may ask for on the current device; host_cupy has its devices' instead."""
    return LIMITS.shared_opt_in


# ---------------------------------------------------------------- what a launch did


@dataclass(frozen=True)
class Flow:
    """Loads or stores of one buffer.

    Sectors are what the warps ask the cache for, unique bytes the least that memory has to move.
    """

    requests: int = 0
    bytes: int = 0
    useful: int = 0
    sectors: int = 0
    unique: int = 0
    wide: int = 0
    widest: int = 0
    narrowest: int = 0

    @property
    def sector_bytes(self) -> int:
        """Bytes of all sectors touched, instruction by instruction."""
        return 32 * self.sectors

    @property
    def efficiency(self) -> float:
        """Useful bytes of those that the sectors hold; 1 where nothing was accessed."""
        return self.useful / self.sector_bytes if self.sectors else 1.0

    def __add__(self, other: Flow) -> Flow:
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        total["widest"] = max(self.widest, other.widest)
        total["narrowest"] = min(self.narrowest or other.narrowest, other.narrowest or self.narrowest)
        return Flow(**total)


@dataclass(frozen=True)
class BufferTraffic:
    """What a launch read from and wrote to one argument, `size` bytes in extent."""

    read: Flow
    write: Flow
    size: int = 0
    address: int = 0


@dataclass(frozen=True)
class Launch:
    """The record of one launch; the counters are zero in fast mode."""

    kernel: str
    options: tuple[str, ...]
    mode: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_mem: int
    scalars: dict[str, Any]
    buffers: dict[str, BufferTraffic]
    shared_requests: int
    shared_wavefronts: int
    barriers: int
    collectives: int
    atomics: int
    fences: int
    accesses: int
    faults: tuple[Fault, ...]

    @property
    def blocks(self) -> int:
        """Blocks in the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def read(self) -> Flow:
        """All global loads."""
        return sum((b.read for b in self.buffers.values()), Flow())

    @property
    def write(self) -> Flow:
        """All global stores."""
        return sum((b.write for b in self.buffers.values()), Flow())

    @property
    def bank_conflicts(self) -> float:
        """Shared-memory wavefronts for one that is needed; 1 where there are no conflicts."""
        return self.shared_wavefronts / self.shared_requests if self.shared_requests else 1.0


_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside: ``with recorded() as launches: ...``."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        # by identity: two empty lists are equal
        _recorders[:] = [recorder for recorder in _recorders if recorder is not launches]


# ---------------------------------------------------------------- the structures of launch.h


class _Flow(ctypes.Structure):
    _fields_ = [(f.name, ctypes.c_uint64) for f in dataclasses.fields(Flow)]


class _BufferTraffic(ctypes.Structure):
    _fields_ = [("read", _Flow), ("write", _Flow)]


class _Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("shared_requests", "shared_wavefronts", "barriers", "collectives", "atomics", "fences", "accesses")
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("initialised", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_uint64),
    ]


_Index = ctypes.c_uint32 * 3


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("text", ctypes.c_char * 256),
        ("offset", ctypes.c_uint64),
        ("line", ctypes.c_uint64),
        ("block", _Index),
        ("thread", _Index),
        ("count", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", _Index),
        ("block", _Index),
        ("shared_bytes", ctypes.c_uint64),
        ("dynamic_low", ctypes.c_uint64),
        ("dynamic_room", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("preempt", ctypes.c_uint64),
        ("checked", ctypes.c_uint64),
        ("flush_subnormals", ctypes.c_uint64),
        ("access_limit", ctypes.c_uint64),
        ("buffer_count", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("counters", _Counters),
        ("traffic", ctypes.POINTER(_BufferTraffic)),
        ("fault_count", ctypes.c_uint64),
        ("faults", _Fault * MAX_FAULTS),
    ]


# ---------------------------------------------------------------- arguments

POINTER, FLOATING, INTEGER, STRUCT, CONST = 0x100, 0x200, 0x300, 0x400, 0x1000


@dataclass
class _Arguments:
    """The parameter block of a launch, and the buffers that its pointers lead to."""

    values: list[np.ndarray] = field(default_factory=list)
    buffers: list[tuple[str, int, int, bool]] = field(default_factory=list)  # name, low, high, writable
    scalars: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def pointer(self, name: str, argument: Any, writable: bool) -> None:
        """A pointer parameter: an array, an address inside an allocation, or None."""
        if argument is None:
            address = 0
        elif (
            isinstance(argument, (int, np.integer))
            and not isinstance(argument, bool)
            and np.asarray(argument).nbytes == 8
        ):
            address = int(argument)
            allocation = memory.allocation_at(address)
            if allocation is not None:
                self.buffers.append((name, allocation.low, allocation.low + allocation.size, writable))
        elif hasattr(argument, "data") and hasattr(argument.data, "ptr"):
            address = argument.data.ptr
            low, high = memory.extent(address, argument.shape, argument.strides, argument.dtype.itemsize)
            self.buffers.append((name, low, high, writable))
        else:
            self.faults.append(
                Fault("argument", f"{name}: {type(argument).__name__} given for a pointer to device memory")
            )
            return
        self.values.append(np.frombuffer(np.uint64(address).tobytes(), np.uint8))

    def scalar(self, name: str, argument: Any, kind: int, size: int) -> None:
        """A parameter passed by value: what CuPy would pass has to have its size and kind."""
        if isinstance(argument, np.generic) or (isinstance(argument, np.ndarray) and argument.size == 1):
            value = np.asarray(argument)
        elif isinstance(argument, (bool, int, float)):  # CuPy: 1, 8 and 8 bytes
            value = np.asarray(argument, {bool: np.bool_, int: np.int64, float: np.float64}[type(argument)])
        else:
            self.faults.append(Fault("argument", f"{name}: {type(argument).__name__} given for a value"))
            return
        passed = {"f": FLOATING, "V": STRUCT}.get(value.dtype.kind, INTEGER)
        if value.nbytes != size or passed != kind:
            wanted = {FLOATING: "floating-point", INTEGER: "integer", STRUCT: "struct"}[kind]
            given = (
                f"Python {type(argument).__name__}, which CuPy passes as {value.dtype}"
                if not hasattr(argument, "dtype")
                else value.dtype
            )
            self.faults.append(Fault("argument", f"{name}: {given}, for a {wanted} parameter of {size} bytes"))
            return
        self.values.append(np.frombuffer(value.tobytes(), np.uint8))
        self.scalars[name] = argument

    def block(self) -> tuple[np.ndarray, int]:
        """The table of pointers to the values, and the values, each at a multiple of 16; its address."""
        at = -(-8 * len(self.values) // 16) * 16
        offsets = []
        for value in self.values:
            offsets.append(at)
            at += -(-len(value) // 16) * 16
        raw = np.zeros(at + 16, np.uint8)
        start = -raw.ctypes.data % 16
        base = raw.ctypes.data + start
        raw[start : start + 8 * len(offsets)] = np.array([base + o for o in offsets], np.uint64).view(np.uint8)
        for offset, value in zip(offsets, self.values, strict=True):
            raw[start + offset : start + offset + len(value)] = value
        return raw, base


# ---------------------------------------------------------------- modules and kernels

_device = threading.RLock()  # the machine runs one launch at a time


class _Loaded:
    """A built library in this process."""

    def __init__(self, library: build.KernelLibrary) -> None:
        self.library = library
        self.runtime = ctypes.CDLL(str(build.runtime_library()))
        self.code = ctypes.CDLL(str(library.path))
        self.code.simt_dynamic_low.restype = ctypes.c_uint64
        if self.runtime.simt_launch_size() != ctypes.sizeof(_Launch):
            raise AssertionError("launch.h and module.py disagree")


class RawModule:
    """Takes what `cupy.RawModule` takes; its kernels run here. Built at the first launch in each mode."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Sequence[str] | None = None,
        jitify: bool = False,
    ) -> None:
        if not isinstance(options, tuple):
            raise TypeError(f"options must be a tuple, got {type(options).__name__}")  # as Cython says in CuPy
        if backend != "nvrtc" or translate_cucomplex or enable_cooperative_groups or jitify:
            raise ValueError("the emulator takes plain NVRTC sources")
        self.code = code
        self.options = options
        self.name_expressions = tuple(name_expressions or ())
        self._loaded: dict[str, _Loaded] = {}

    def loaded(self, mode: str) -> _Loaded:
        """The library for this mode, built if it has to be."""
        with _device:
            if mode not in self._loaded:
                self._loaded[mode] = _Loaded(build.kernel_library(self.code, self.options, self.name_expressions, mode))
            return self._loaded[mode]

    def get_function(self, name: str) -> Kernel:
        """The kernel called `name` (or one of the name expressions)."""
        return Kernel(self, name)


def raw_kernel(code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc", **keywords: Any) -> Kernel:
    """Stand-in for `cupy.RawKernel`."""
    return RawModule(code=code, options=options, backend=backend, **keywords).get_function(name)


class Kernel:
    """One kernel: ``kernel(grid, block, args, shared_mem=0)`` runs it; `last` is the record of its latest launch."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.module = module
        self.name = self.__name__ = name
        self.last: Launch | None = None
        self.preferred_shared_memory_carveout = -1
        self._max_dynamic_shared = LIMITS.shared

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """How much dynamic shared memory a launch may ask for: to have more than 48 KiB, set it."""
        return self._max_dynamic_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if not 0 <= size <= shared_opt_in():
            raise SimtFault(
                self.name, [Fault("launch", f"{size} bytes of dynamic shared memory, the device has {shared_opt_in()}")]
            )
        self._max_dynamic_shared = size

    @property
    def max_threads_per_block(self) -> int:
        """The kernel's launch bound."""
        loaded = self.module.loaded(_mode())
        return getattr(loaded.code, f"simt_bound_{self._index(loaded)}")()

    def compile(self, log_stream: Any = None) -> None:
        """Build it now."""
        self.module.loaded(_mode())

    def _index(self, loaded: _Loaded) -> int:
        try:
            return loaded.library.index[self.name]
        except KeyError:
            raise AttributeError(
                f"no kernel {self.name!r} in the module, which has {sorted(loaded.library.index)}"
            ) from None

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        with _device:
            self._launch(tuple(map(int, grid)), tuple(map(int, block)), tuple(args), int(shared_mem))

    def _launch(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int) -> None:
        mode = _mode()
        loaded = self.module.loaded(mode)
        index = self._index(loaded)
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        faults = self._refusals(grid, block, shared_mem, getattr(loaded.code, f"simt_bound_{index}")())
        arguments = self._arguments(loaded, index, args)
        faults += arguments.faults
        if faults:
            raise SimtFault(self.name, faults)

        count = len(arguments.buffers)
        buffers = (_Buffer * max(count, 1))()
        allocations = [memory.allocation_at(low) for _, low, _, _ in arguments.buffers]
        for buffer, allocation, (name, low, high, writable) in zip(
            buffers, allocations, arguments.buffers, strict=False
        ):
            buffer.low, buffer.high, buffer.name, buffer.writable = low, high, name.encode(), writable
            if allocation is not None and allocation.initialised is not None and high > low:
                buffer.initialised = allocation.initialised.ctypes.data + low - allocation.low
        traffic = (_BufferTraffic * max(count, 1))()
        keep, address = arguments.block()
        launch = _Launch(
            entry=ctypes.cast(getattr(loaded.code, f"simt_entry_{index}"), ctypes.c_void_p),
            arguments=address,
            grid=_Index(*grid),
            block=_Index(*block),
            shared_bytes=shared_mem,
            dynamic_low=loaded.code.simt_dynamic_low(),
            dynamic_room=build.DYNAMIC_SHARED_ROOM,
            seed=_settings.seed,
            preempt=_settings.preempt,
            checked=mode == "check",
            flush_subnormals=self._flush_subnormals(),
            access_limit=_settings.access_limit,
            buffer_count=count,
            buffers=buffers,
            traffic=traffic,
        )
        loaded.runtime.simt_launch(ctypes.byref(launch))
        del keep
        faults = self._faults(loaded, launch)
        if mode != "check":
            for allocation, (name, low, high, writable) in zip(allocations, arguments.buffers, strict=True):
                if allocation is None:
                    continue
                if not allocation.guards_intact():
                    faults.append(Fault("guard", f"bytes beside the allocation of {name} have been overwritten"))
                if writable:
                    allocation.written(low, high - low)
        self.last = self._record(mode, grid, block, shared_mem, arguments, launch, traffic, faults)
        for recorder in _recorders:
            recorder.append(self.last)
        if faults:
            raise SimtFault(self.name, faults)

    def _refusals(self, grid: tuple[int, ...], block: tuple[int, ...], shared_mem: int, bound: int) -> list[Fault]:
        """What a device would refuse, or CuPy would change silently."""
        said = []
        threads = block[0] * block[1] * block[2]
        if any(not 1 <= n <= limit for n, limit in zip(grid, LIMITS.grid, strict=True)):
            # CuPy makes one block of none, which then works on data that is not there.
            said.append(f"grid {grid}: every size has to be at least 1 and at most {LIMITS.grid}")
        if any(not 1 <= n <= limit for n, limit in zip(block, LIMITS.block, strict=True)) or threads > LIMITS.threads:
            said.append(f"block {block}: at most {LIMITS.threads} threads, at most {LIMITS.block}")
        elif threads > bound:
            said.append(f"block of {threads} threads, __launch_bounds__ says {bound}")
        if shared_mem > self._max_dynamic_shared:
            said.append(
                f"{shared_mem} bytes of dynamic shared memory, "
                f"max_dynamic_shared_size_bytes is {self._max_dynamic_shared}"
            )
        return [Fault("launch", text) for text in said]

    def _arguments(self, loaded: _Loaded, index: int, args: tuple[Any, ...]) -> _Arguments:
        describe = getattr(loaded.code, f"simt_signature_{index}")
        describe.restype = ctypes.POINTER(ctypes.c_int)
        signature = describe()
        names = loaded.library.kernels[self.name].parameters
        arguments = _Arguments()
        if len(args) != signature[0]:
            arguments.faults.append(Fault("argument", f"{len(args)} arguments given, the kernel takes {signature[0]}"))
            return arguments
        for i, argument in enumerate(args):
            kind, size = signature[i + 1] >> 16, signature[i + 1] & 0xFFFF
            if kind & 0xF00 == POINTER:
                arguments.pointer(names[i], argument, not kind & CONST)
            else:
                arguments.scalar(names[i], argument, kind, size)
        return arguments

    def _flush_subnormals(self) -> bool:
        if _settings.flush_subnormals is not None:
            return _settings.flush_subnormals
        return not any(o in ("-ftz=false", "--ftz=false") for o in self.module.options)

    def _faults(self, loaded: _Loaded, launch: _Launch) -> list[Fault]:
        found = launch.faults[: launch.fault_count]
        lines = SourceLines(self.module.code) if found else None
        places = locate(loaded.library.path, [f.offset for f in found if f.offset])
        faults = []
        for f in found:
            file, line, how = next(places) if f.offset else (lines.of_barrier(f.line), f.line, "")
            message = f.text.decode() + (f" ({how})" if how else "")
            source = lines.text.get((file, line), "")
            faults.append(Fault(f.kind.decode(), message, file, line, source, tuple(f.block), tuple(f.thread), f.count))
        return faults

    def _record(
        self,
        mode: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared_mem: int,
        arguments: _Arguments,
        launch: _Launch,
        traffic: ctypes.Array,
        faults: list[Fault],
    ) -> Launch:
        def flow(f: _Flow) -> Flow:
            return Flow(*(getattr(f, name) for name, _ in f._fields_))

        return Launch(
            kernel=self.name,
            options=self.module.options,
            mode=mode,
            grid=grid,
            block=block,
            shared_mem=shared_mem,
            scalars=arguments.scalars,
            buffers={
                name: BufferTraffic(flow(t.read), flow(t.write), high - low, low)
                for (name, low, high, _), t in zip(arguments.buffers, traffic, strict=False)
            },
            **{name: getattr(launch.counters, name) for name, _ in _Counters._fields_},
            faults=tuple(faults),
        )


def _mode() -> str:
    return "fast-contract" if _settings.mode == "fast" and _settings.contract else _settings.mode
