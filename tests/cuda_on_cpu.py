"""The CUDA engine without a GPU: CuPy's arrays in host memory, the kernels on the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import simt
from libraries import Library
from simt import host_cupy

from cugn.cuda import compile as compile_

REASON = host_cupy.missing() or simt.missing_tools()
NEEDED = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@contextmanager
def emulated(*devices: host_cupy.Properties, **settings: Any) -> Iterator[Library]:
    """The library `cupy`, on these devices (an H100 by default), under these settings of the emulator."""
    with host_cupy.installed(*devices), simt.using(**settings):
        forget_devices()
        try:
            yield Library("cupy on the emulator", host_cupy.to_device, host_cupy.to_host)
        finally:
            forget_devices()


def forget_devices() -> None:
    """The engine asks a device once for what it can; here another one may come under the same number."""
    compile_.device_properties.cache_clear()
