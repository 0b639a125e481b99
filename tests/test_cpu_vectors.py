"""Promise: parts of vectors are moved to the element, with and without the processor's masks."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numba
import numpy as np
import pytest
from libraries import dtype_of

from cugn.cpu import convert
from cugn.cpu.simd import count_lanes


def _page_end(size: int) -> tuple[np.ndarray, mmap.mmap]:
    """The last bytes of a page, behind which nothing may be touched."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = np.frombuffer(pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = memory.ctypes.data + mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return memory[mmap.PAGESIZE - size : mmap.PAGESIZE], pages


@pytest.mark.skipif(sys.platform != "linux", reason="a page is locked by mprotect")
@pytest.mark.parametrize("masks", [True, False], ids=["the processor's own way", "in pieces"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool"])
def test_parts_of_vectors(dtype: str, masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many elements are moved, and no byte beyond them is touched, whether the processor has masks or not."""
    if not masks:
        monkeypatch.setattr(convert, "cpu_has", lambda feature: False)
        monkeypatch.setattr(convert, "has_half", lambda: False)
    if dtype == "bool":
        _, load = convert.mask_loader.__wrapped__()

        @numba.njit
        def move(source: int, target: int, count: int) -> int:
            return count_lanes(load(source, count))
    else:
        compute = "float64" if dtype == "float64" else "float32"
        _, load = convert.loader.__wrapped__(dtype, compute)
        _, store, _ = convert.storer.__wrapped__(dtype, compute)

        @numba.njit
        def move(source: int, target: int, count: int) -> int:
            store(target, load(source, count), count)
            return 0

    element = np.dtype(np.uint8) if dtype == "bool" else dtype_of(dtype)
    for count in range(17):
        size = count * element.itemsize
        values = np.arange(1, count + 1).astype(element)
        (source, first), (target, second) = _page_end(size), _page_end(size + 64)
        source[:] = values.view(np.uint8)
        target[:] = 0xAB
        for place in (0, 64) if dtype != "bool" else ():  # the second one ends where the page does
            assert move(source.ctypes.data, target.ctypes.data + place, count) == 0
            assert target[place : place + size].tobytes() == values.tobytes()
            assert (target[size:64] == 0xAB).all()
        if dtype == "bool":
            source[::3] = 0
            assert move(source.ctypes.data, 0, count) == np.count_nonzero(source)
        del source, target, first, second
