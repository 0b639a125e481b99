"""Promise: what the CUDA engine cannot do is said, naming the argument or what is missing, before any launch."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import NEEDED, emulated
from simt import host_cupy

import cugn
from cugn.cuda import compile as cuda_compile
from cugn.cuda import launches

pytestmark = NEEDED
TWO = (host_cupy.Properties(), host_cupy.Properties())


def test_arrays_on_two_devices() -> None:
    x = np.ones((2, 4, 8), np.float32)
    with emulated(*TWO):
        there = host_cupy.to_device(x[0, :, 0].copy(), device=1)
        with pytest.raises(ValueError, match=r"weight is on device 1 and x on device 0"):
            cugn.group_norm(host_cupy.to_device(x), 2, there)
        with pytest.raises(ValueError, match=r"out is on device 0 and x on device 1"):
            cugn.group_norm(host_cupy.to_device(x, device=1), 2, out=host_cupy.to_device(x))


def test_runs_where_x_lives() -> None:
    """The current device stays what it was, and the results are on x's."""
    import cupy

    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    with emulated(*TWO):
        y, mean, rstd = cugn.group_norm_forward(host_cupy.to_device(x, device=1), 2)
        assert {a.device.id for a in (y, mean, rstd)} == {1}
        assert cupy.cuda.runtime.getDevice() == 0
        assert np.allclose(host_cupy.to_host(y), cugn.group_norm(x, 2), atol=1e-5)


def test_mixed_libraries() -> None:
    x = np.ones((2, 4, 8), np.float32)
    with emulated() as library, pytest.raises(TypeError, match="weight is from numpy and x from cupy"):
        cugn.group_norm(library.array(x), 2, x[0, :, 0])


@pytest.mark.parametrize("error", [RuntimeError("CuPy failed to load libnvrtc.so.13"), ImportError("libnvrtc.so.13")])
def test_no_nvrtc(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(**_: Any) -> Any:
        raise error

    x = np.ones((2, 4, 8), np.float32)
    with emulated() as library:
        monkeypatch.setattr(sys.modules["cupy"], "RawModule", module)
        monkeypatch.setattr(cuda_compile, "_kernels", {})
        launches.program.cache_clear()
        with pytest.raises(RuntimeError, match=r"NVRTC.*cugn\[cuda13\]"):
            cugn.group_norm(library.array(x), 2)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has CuPy and no driver is told by CuPy at the array already; the engine's own properties say it too."""
    import cupy

    def attributes(_: int) -> Any:
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    monkeypatch.setattr(cupy.cuda, "Device", attributes)
    cuda_compile.device_properties.cache_clear()
    with pytest.raises(RuntimeError, match="driver"):
        cuda_compile.device_properties(0)


def test_results_are_the_same_where_a_block_has_less_shared_memory() -> None:
    """On a device whose blocks hold less the group is split: other bits perhaps, not another result."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 5000)).astype(np.float32)
    results = []
    for device in (host_cupy.Properties(), host_cupy.Properties(shared_opt_in=48 << 10)):
        cuda_compile.device_properties.cache_clear()
        with emulated(device, mode="fast"):
            results.append(host_cupy.to_host(cugn.group_norm(host_cupy.to_device(x), 1)).copy())
    cuda_compile.device_properties.cache_clear()
    assert np.abs(results[0] - results[1]).max() < 1e-5
