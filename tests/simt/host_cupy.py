"""Real `cupy.ndarray` objects in host memory, so that a CuPy library's own wrapper runs unmodified, without a driver.

CuPy asks its allocator for memory; ours gives guarded host memory. What CuPy does with the device itself (memset,
copies, device properties, streams) needs a driver, and is replaced while `installed()` is active: by NumPy on the same
memory, or by a stand-in. Copies and fills made that way are recorded beside the kernels' launches, so that a traffic
test cannot miss them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from . import memory, module

try:
    import cupy
    from cupy.cuda import memory as cupy_memory
except ImportError:
    cupy = None


def missing() -> str | None:
    """Why there is no CuPy to be had, or None."""
    return "CuPy is not installed" if cupy is None else None


# ---------------------------------------------------------------- devices


@dataclass(frozen=True)
class Properties:
    """A device as libraries see it through CuPy."""

    name: str = "emulated H100"
    multiprocessors: int = 132
    major: int = 9
    minor: int = 0
    shared_per_block: int = 48 << 10
    shared_opt_in: int = 227 << 10
    shared_per_multiprocessor: int = 228 << 10
    reserved_shared: int = 1 << 10
    registers_per_multiprocessor: int = 65536
    threads_per_multiprocessor: int = 2048
    blocks_per_multiprocessor: int = 32
    l2_bytes: int = 50 << 20

    def attributes(self) -> dict[str, int]:
        """As `cupy.cuda.Device.attributes` names them."""
        return {
            "MultiProcessorCount": self.multiprocessors,
            "ComputeCapabilityMajor": self.major,
            "ComputeCapabilityMinor": self.minor,
            "MaxSharedMemoryPerBlock": self.shared_per_block,
            "MaxSharedMemoryPerBlockOptin": self.shared_opt_in,
            "MaxSharedMemoryPerMultiprocessor": self.shared_per_multiprocessor,
            "ReservedSharedMemoryPerBlock": self.reserved_shared,
            "MaxRegistersPerBlock": 65536,
            "MaxRegistersPerMultiprocessor": self.registers_per_multiprocessor,
            "MaxThreadsPerBlock": 1024,
            "MaxThreadsPerMultiProcessor": self.threads_per_multiprocessor,
            "MaxBlocksPerMultiprocessor": self.blocks_per_multiprocessor,
            "MaxGridDimX": 2**31 - 1,
            "L2CacheSize": self.l2_bytes,
            "WarpSize": 32,
        }

    def properties(self) -> dict[str, Any]:
        """As `cupy.cuda.runtime.getDeviceProperties` names them."""
        return {
            "name": self.name.encode(),
            "multiProcessorCount": self.multiprocessors,
            "major": self.major,
            "minor": self.minor,
            "sharedMemPerBlock": self.shared_per_block,
            "sharedMemPerBlockOptin": self.shared_opt_in,
            "sharedMemPerMultiprocessor": self.shared_per_multiprocessor,
            "reservedSharedMemPerBlock": self.reserved_shared,
            "regsPerBlock": 65536,
            "regsPerMultiprocessor": self.registers_per_multiprocessor,
            "maxThreadsPerBlock": 1024,
            "maxThreadsPerMultiProcessor": self.threads_per_multiprocessor,
            "maxBlocksPerMultiProcessor": self.blocks_per_multiprocessor,
            "maxThreadsDim": (1024, 1024, 64),
            "maxGridSize": (2**31 - 1, 65535, 65535),
            "l2CacheSize": self.l2_bytes,
            "warpSize": 32,
            "totalGlobalMem": 80 << 30,
        }


H100 = Properties()

#: Numbers of cudaDeviceAttr for those who ask the runtime by number.
_ATTRIBUTE_NUMBERS = {
    1: "MaxThreadsPerBlock",
    8: "MaxSharedMemoryPerBlock",
    10: "WarpSize",
    12: "MaxRegistersPerBlock",
    16: "MultiProcessorCount",
    38: "L2CacheSize",
    39: "MaxThreadsPerMultiProcessor",
    75: "ComputeCapabilityMajor",
    76: "ComputeCapabilityMinor",
    81: "MaxSharedMemoryPerMultiprocessor",
    82: "MaxRegistersPerMultiprocessor",
    97: "MaxSharedMemoryPerBlockOptin",
    106: "MaxBlocksPerMultiprocessor",
    111: "ReservedSharedMemoryPerBlock",
}

_devices: tuple[Properties, ...] = (H100,)
_current = [0]


class Device:
    """Stand-in for `cupy.cuda.Device`."""

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = _current[-1] if device is None else int(device)
        if not 0 <= self.id < len(_devices):
            raise ValueError(f"device {self.id} of {len(_devices)}")

    def __int__(self) -> int:
        return self.id

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<emulated CUDA device {self.id}>"

    def __enter__(self) -> Device:
        _current.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def use(self) -> Device:
        _current[-1] = self.id
        return self

    def synchronize(self) -> None:
        raise AssertionError("the library waits for the device")

    @property
    def attributes(self) -> dict[str, int]:
        return _devices[self.id].attributes()

    @property
    def compute_capability(self) -> str:
        return f"{_devices[self.id].major}{_devices[self.id].minor}"


class Stream:
    """Stand-in for the current stream: everything runs at once, and nobody may wait for it."""

    ptr = 0
    null = True
    device_id = 0

    def synchronize(self) -> None:
        raise AssertionError("the library waits for the stream")


# ---------------------------------------------------------------- memory

_allocated: list[list[int]] = []


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Collect the sizes of the arrays allocated inside, in bytes."""
    sizes: list[int] = []
    _allocated.append(sizes)
    try:
        yield sizes
    finally:
        _allocated[:] = [s for s in _allocated if s is not sizes]


def _log(name: str, size: int, read: Any = None) -> None:
    """Record what CuPy would have done with a kernel or copy of its own."""
    write = module.Flow(bytes=size, useful=size, sectors=-(-size // 32), unique=size)
    buffers = {"to": module.BufferTraffic(module.Flow(), write, size)}
    if read is not None:
        source = module.Flow(bytes=read.nbytes, useful=read.nbytes, sectors=-(-read.nbytes // 32), unique=read.nbytes)
        buffers["from"] = module.BufferTraffic(source, module.Flow(), read.nbytes)
    zero = dict.fromkeys(
        (
            "shared_mem",
            "shared_requests",
            "shared_wavefronts",
            "barriers",
            "collectives",
            "atomics",
            "fences",
            "accesses",
        ),
        0,
    )
    record = module.Launch(
        kernel=name,
        options=(),
        mode="host",
        grid=(1, 1, 1),
        block=(1, 1, 1),
        scalars={},
        buffers=buffers,
        faults=(),
        **zero,
    )
    for recorder in module._recorders:
        recorder.append(record)


if cupy is not None:

    class HostPointer(cupy_memory.MemoryPointer):
        """A pointer whose memset and device copies work on the host; views of an array keep the type through `+`."""

        def __add__(self, offset: int) -> HostPointer:
            return HostPointer(self.mem, self.ptr - self.mem.ptr + int(offset))

        def memset_async(self, value: int, size: int, stream: Any = None) -> None:
            ctypes.memset(self.ptr, value, size)
            memory.allocation_at(self.ptr).written(self.ptr, size)
            _log("cupy.memset", size)

        def memset(self, value: int, size: int) -> None:
            raise AssertionError("a memset that waits for the device")


def _allocate(size: int, *, sparse: bool = False) -> Any:
    for sizes in _allocated:
        sizes.append(size)
    allocation = memory.Allocation(size, sparse=sparse)
    return HostPointer(cupy_memory.UnownedMemory(allocation.low, size, allocation, _current[-1]), 0)


def to_host(array: Any) -> np.ndarray:
    """NumPy's view of a CuPy array in host memory: no copy, writing to it writes to the array."""
    owner = array.data.mem._owner
    return owner.host(array.data.ptr, array.shape, array.dtype, array.strides)


def _written(array: Any) -> None:
    """Mark the elements of an array as initialised, not what lies between them."""
    allocation = array.data.mem._owner
    if allocation.initialised is None:
        return
    mark = np.ndarray(
        array.shape,
        np.dtype((np.void, array.dtype.itemsize)),
        allocation.initialised,
        array.data.ptr - allocation.low,
        array.strides,
    )
    mark[...] = np.ones(array.dtype.itemsize, np.uint8).view(mark.dtype)[0]


def to_device(array: Any, device: int = 0) -> Any:
    """A CuPy array with the values and strides (order, gaps, sign, zero strides) of a NumPy array."""
    host = np.asarray(array)
    low, high = memory.extent(0, host.shape, host.strides, host.itemsize)
    with Device(device):
        pointer = _allocate(high - low)
    result = cupy.ndarray(host.shape, host.dtype, HostPointer(pointer.mem, -low), host.strides)
    writable = to_host(result)
    writable.flags.writeable = True
    writable[...] = host
    _written(result)
    return result


def sparse(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...]) -> Any:
    """A CuPy array of zeros with these strides (not negative), which takes memory only where it is touched."""
    _, size = memory.extent(0, shape, strides, np.dtype(dtype).itemsize)
    return cupy.ndarray(shape, dtype, _allocate(size, sparse=True), strides)


# ---------------------------------------------------------------- what CuPy's arrays do with kernels of its own


def _fill(self: Any, value: Any) -> None:
    to_host(self).fill(value)
    _written(self)
    _log("cupy.fill", self.nbytes)


def _setitem(self: Any, index: Any, value: Any) -> None:
    part = self[index]
    source = to_host(value) if isinstance(value, cupy.ndarray) else value
    to_host(part)[...] = source
    _written(part)
    _log("cupy.copy", part.nbytes, source if isinstance(value, cupy.ndarray) else None)


def _astype(self: Any, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Any:
    if not copy and self.dtype == np.dtype(dtype):
        return self
    result = cupy.empty_like(self, dtype=dtype, order=order)
    to_host(result)[...] = to_host(self).astype(dtype)
    _written(result)
    _log("cupy.astype", result.nbytes, self)
    return result


def _copy(self: Any, order: str = "C") -> Any:
    result = cupy.empty_like(self, order=order)
    to_host(result)[...] = to_host(self)
    _written(result)
    _log("cupy.copy", result.nbytes, self)
    return result


def _copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if where is not None:
        raise TypeError("copyto with where is not emulated")
    dst[...] = src


def _ascontiguousarray(array: Any, dtype: Any = None) -> Any:
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if array.flags.c_contiguous and array.dtype == wanted:
        return array
    return array.astype(wanted, order="C")


def _set(self: Any, array: np.ndarray, stream: Any = None) -> None:
    to_host(self)[...] = array
    _written(self)
    _log("cupy.set", self.nbytes)


def _get(self: Any, *_: Any, **__: Any) -> np.ndarray:
    raise AssertionError("the library reads the device's memory, and waits for it")


def _interface(self: Any) -> dict[str, Any]:
    """As CuPy's own, which asks the driver for the current stream."""
    return {
        "shape": self.shape,
        "typestr": self.dtype.str,
        "descr": self.dtype.descr,
        "version": 3,
        "strides": None if self.flags.c_contiguous else self.strides,
        "data": (self.data.ptr, False),
        "stream": 1,
    }


@contextlib.contextmanager
def installed(*devices: Properties) -> Iterator[None]:
    """Let CuPy work on emulated devices (one H100 where none is named), and its RawModule on the emulator."""
    global _devices
    before = _devices
    _devices = devices or (H100,)

    def attribute(number: int, device: int) -> int:
        return _devices[device].attributes()[_ATTRIBUTE_NUMBERS[number]]

    replaced = {
        cupy: {
            "RawModule": module.RawModule,
            "RawKernel": module.raw_kernel,
            "is_available": lambda: True,
            "copyto": _copyto,
            "ascontiguousarray": _ascontiguousarray,
        },
        cupy.cuda: {"Device": Device, "get_current_stream": lambda *_: Stream(), "is_available": lambda: True},
        cupy.cuda.runtime: {
            "getDevice": lambda: _current[-1],
            "getDeviceCount": lambda: len(_devices),
            "getDeviceProperties": lambda device: _devices[device].properties(),
            "deviceGetAttribute": attribute,
        },
        module: {"shared_opt_in": lambda: _devices[_current[-1]].shared_opt_in},
        cupy.ndarray: {
            "device": property(lambda array: Device(array.data.device_id)),
            "__cuda_array_interface__": property(_interface),
            "fill": _fill,
            "__setitem__": _setitem,
            "astype": _astype,
            "copy": _copy,
            "set": _set,
            "get": _get,
        },
    }
    with contextlib.ExitStack() as stack:
        previous = cupy.cuda.get_allocator()
        cupy.cuda.set_allocator(_allocate)
        stack.callback(cupy.cuda.set_allocator, previous)
        for owner, names in replaced.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.callback(lambda: _restore(before))
        yield


def _restore(devices: tuple[Properties, ...]) -> None:
    global _devices
    _devices = devices
