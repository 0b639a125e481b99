"""Device memory on the host: guarded allocations that know which of their bytes have been written."""

from __future__ import annotations

import mmap
import weakref
from types import SimpleNamespace

import numpy as np

#: Bytes on either side of an allocation. An access there is named in check mode, a store found afterwards in fast mode.
GUARD = 4096

#: Linux: do not ask whether all of a mapping would fit in memory. Python's mmap names it from 3.13 on.
MAP_NORESERVE = 0x4000

#: Alignment of CuPy's pool.
ALIGNMENT = 512

#: Fresh memory and guards: NaN in every float type, so that what is read unwritten shows in the result.
FRESH = 0xFF


class Allocation:
    """`size` bytes at `low`; `initialised` has a 1 for each byte that the host or a kernel has written.

    A sparse allocation takes no memory before it is touched, so that an array can reach beyond 2^31 elements: it starts
    as zeros, and what has been written is not kept (`initialised` is None).
    """

    def __init__(self, size: int, *, sparse: bool = False) -> None:
        self.size = size
        self.initialised: np.ndarray | None = None
        if sparse:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self._raw = np.frombuffer(mmap.mmap(-1, size + 2 * GUARD + ALIGNMENT, flags), np.uint8)
        else:
            self._raw = np.full(size + 2 * GUARD + ALIGNMENT, FRESH, np.uint8)
            self.initialised = np.zeros(size, np.uint8)
        self.low = -(-(self._raw.ctypes.data + GUARD) // ALIGNMENT) * ALIGNMENT
        _allocations[self.low] = self

    def written(self, address: int, size: int) -> None:
        """The host (or a kernel that nobody watched) wrote here."""
        if self.initialised is not None:
            self.initialised[address - self.low : address - self.low + size] = 1

    def guards_intact(self) -> bool:
        """Whether nothing has been written before the first or behind the last byte."""
        start = self.low - self._raw.ctypes.data
        before, behind = self._raw[start - GUARD : start], self._raw[start + self.size : start + self.size + GUARD]
        untouched = 0 if self.initialised is None else FRESH
        return bool((before == untouched).all() and (behind == untouched).all())

    def host(self, address: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...]) -> np.ndarray:
        """NumPy's view of an array that lies in this allocation."""
        return np.ndarray(shape, dtype, self._raw, address - self._raw.ctypes.data, strides)


_allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()


def allocation_at(address: int) -> Allocation | None:
    """The allocation that holds `address` (its end counts as inside: an empty array may lie there)."""
    exact = _allocations.get(address)
    if exact is not None:
        return exact
    for allocation in list(_allocations.values()):
        if allocation.low <= address <= allocation.low + allocation.size:
            return allocation
    return None


def extent(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """First byte, and the one behind the last, of a strided array."""
    if 0 in shape:
        return address, address
    reach = [stride * (n - 1) for n, stride in zip(shape, strides, strict=True)]
    return address + sum(r for r in reach if r < 0), address + sum(r for r in reach if r > 0) + itemsize


class Array:
    """A device array for tests of the emulator itself, where CuPy's are not needed: `host` is NumPy's view of it."""

    def __init__(
        self, host: np.ndarray | None = None, *, shape: int | tuple[int, ...] = (), dtype: object = np.float32
    ) -> None:
        fresh = np.empty(shape, dtype) if host is None else np.asarray(host)
        self._allocation = Allocation(fresh.nbytes)
        contiguous = np.empty(fresh.shape, fresh.dtype)
        self.host = self._allocation.host(self._allocation.low, fresh.shape, fresh.dtype, contiguous.strides)
        if host is not None:
            self.host[...] = fresh
            self._allocation.written(self._allocation.low, fresh.nbytes)

    def __getitem__(self, index: object) -> Array:
        view = object.__new__(Array)
        view._allocation = self._allocation
        view.host = self.host[index]
        return view

    data = property(lambda self: SimpleNamespace(ptr=self.host.ctypes.data))
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    nbytes = property(lambda self: self.host.nbytes)
