"""The CUDA engine without a GPU: CuPy's arrays in host memory, the kernels on the emulator.

With CUGN_CUDA=device the same tests run on the GPU at hand: `python -m tests.gpu` does that. What looks into the
emulator (faults, traffic, orders of execution, devices of other sizes) is left out there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import simt
from libraries import Library
from simt import host_cupy, memory

from cugn.cuda import compile as compile_
from cugn.cuda import launches


def why_no_device() -> str | None:
    """Why there is no GPU here, or None."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


ON_DEVICE = os.environ.get("CUGN_CUDA") == "device"
REASON = why_no_device() if ON_DEVICE else host_cupy.missing() or simt.missing_tools()
NEEDED = pytest.mark.skipif(REASON is not None, reason=str(REASON))
EMULATOR_NEEDED = pytest.mark.skipif(
    ON_DEVICE or REASON is not None, reason=str(REASON or "on a GPU: this looks into the emulator")
)


@contextmanager
def emulated(*devices: host_cupy.Properties, **settings: Any) -> Iterator[Library]:
    """The library `cupy`, on these devices (an H100 by default), under these settings of the emulator."""
    if ON_DEVICE:
        if devices:
            pytest.skip("on a GPU: this is about other devices")
        yield Library("cupy", to_device, to_host)
        return
    with host_cupy.installed(*devices), simt.using(**settings):
        forget_devices()
        try:
            yield Library("cupy on the emulator", host_cupy.to_device, host_cupy.to_host)
        finally:
            forget_devices()


def forget_devices() -> None:
    """The engine asks a device once for what it can; here another one may come under the same number."""
    compile_.device_properties.cache_clear()
    launches.program.cache_clear()


def to_device(array: Any) -> Any:
    """A CuPy array on the GPU with the values and strides (order, gaps, sign, zero strides) of a NumPy array."""
    import cupy

    host = np.asarray(array)
    low, high = memory.extent(0, host.shape, host.strides, host.itemsize)
    pointer = cupy.cuda.alloc(high - low)
    result = cupy.ndarray(host.shape, host.dtype, cupy.cuda.MemoryPointer(pointer.mem, -low), host.strides)
    bits = np.dtype(f"u{host.itemsize}")  # copied as integers, whatever CuPy knows of the dtype
    result.view(bits)[...] = cupy.asarray(np.ascontiguousarray(host).view(bits).reshape(host.shape))
    return result


def to_host(array: Any) -> np.ndarray:
    """NumPy's copy of an array on the GPU."""
    import cupy

    return cupy.asnumpy(cupy.ascontiguousarray(array.view(f"u{array.itemsize}"))).view(array.dtype).reshape(array.shape)
