"""CuPy's own arrays in host memory: what a library's wrapper does with them works, and nothing it does goes unseen."""

from __future__ import annotations

import numpy as np
import pytest
import simt
from simt import host_cupy

pytestmark = pytest.mark.skipif(
    (host_cupy.missing() or simt.missing_tools()) is not None, reason=str(host_cupy.missing() or simt.missing_tools())
)
cupy = host_cupy.cupy

ADD_ONE = """
extern "C" __global__ void add_one(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + 1;
}"""


@pytest.fixture(autouse=True)
def emulated():
    with host_cupy.installed():
        yield


def add_one(x, y=None):
    y = cupy.empty_like(x) if y is None else y
    kernel = cupy.RawModule(code=ADD_ONE).get_function("add_one")
    kernel((-(-x.size // 64),), (64,), (x, y, np.int32(x.size)))
    return y


def test_a_wrapper_runs_unmodified():
    x = np.arange(100, dtype=np.float32).reshape(10, 10)
    y = add_one(host_cupy.to_device(x))
    assert type(y) is cupy.ndarray
    np.testing.assert_array_equal(host_cupy.to_host(y), x + 1)


def test_raw_kernel():
    x, y = host_cupy.to_device(np.zeros(3, np.float32)), cupy.empty(3, np.float32)
    cupy.RawKernel(ADD_ONE, "add_one")((1,), (32,), (x, y, np.int32(3)))
    assert host_cupy.to_host(y).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "view",
    [
        np.s_[:, :],
        np.s_[::-1, :],
        np.s_[:, ::2],
        np.s_[3:, ::-3],
        np.s_[2:2, :],
    ],
)
def test_strides_are_kept(view):
    base = np.arange(60.0).reshape(6, 10)
    for host in (base[view], base[view].T, np.asfortranarray(base[view])):
        device = host_cupy.to_device(host)
        assert (device.shape, device.strides, device.dtype) == (host.shape, host.strides, host.dtype)
        np.testing.assert_array_equal(host_cupy.to_host(device), host)


def test_broadcast_arrays_take_no_memory():
    device = host_cupy.to_device(np.broadcast_to(np.float32(3), (1000, 1000)))
    assert device.strides == (0, 0)
    assert host_cupy.to_host(device).sum() == 3e6


def test_views_share_memory():
    x = host_cupy.to_device(np.zeros((4, 5), np.float32))
    add_one(x[1], x[2])
    assert host_cupy.to_host(x).tolist() == [[0] * 5, [0] * 5, [1] * 5, [0] * 5]
    assert cupy.moveaxis(x, 0, 1).strides == (4, 20)
    assert x.reshape(20).data.ptr == x.data.ptr


def test_out_of_bounds_of_a_view():
    x, y = host_cupy.to_device(np.zeros(20, np.float32)), cupy.empty(20, np.float32)
    kernel = cupy.RawModule(code=ADD_ONE).get_function("add_one")
    with pytest.raises(simt.SimtFault, match="out-of-bounds"):
        kernel((1,), (32,), (x[:10], y, np.int32(11)))


def test_gaps_of_a_view_are_not_initialised():
    base = host_cupy.to_device(np.zeros((4, 8), np.float32))
    fresh = cupy.empty((4, 8), np.float32)
    fresh[:, ::2] = base[:, ::2]
    with pytest.raises(simt.SimtFault) as caught:
        add_one(fresh)
    assert [(f.kind, f.count) for f in caught.value.faults] == [("uninitialised-global", 16)]


@pytest.mark.parametrize("make", ["empty", "zeros", "full", "ones", "empty_like", "zeros_like"])
def test_what_cupy_initialises(make):
    like = host_cupy.to_device(np.zeros(8, np.float32))
    argument = like if make.endswith("like") else 8
    with simt.recorded() as launches:
        x = getattr(cupy, make)(argument, *([7] if make == "full" else []), dtype=np.float32)
    if make.startswith("empty"):
        assert launches == []
        with pytest.raises(simt.SimtFault, match="uninitialised-global"):
            add_one(x)
    else:
        assert [launch.write.bytes for launch in launches] == [32]
        assert host_cupy.to_host(add_one(x)).tolist() == [{"zeros": 1, "zeros_like": 1, "full": 8, "ones": 2}[make]] * 8


def test_copies_are_recorded():
    x = host_cupy.to_device(np.arange(12, dtype=np.float32).reshape(3, 4))
    with simt.recorded() as launches, host_cupy.allocations() as sizes:
        copies = [x.copy(), x.T.copy(), x.astype(np.float64), cupy.ascontiguousarray(x.T)]
        same = [x.astype(np.float32, copy=False), cupy.ascontiguousarray(x)]
    for copy, expected in zip(copies, (x, x.T, x, x.T), strict=True):
        np.testing.assert_array_equal(host_cupy.to_host(copy), host_cupy.to_host(expected))
    assert all(s is x for s in same)
    assert [(launch.read.bytes, launch.write.bytes) for launch in launches] == [(48, 48), (48, 48), (48, 96), (48, 48)]
    assert sizes == [48, 48, 96, 48]


def test_devices_and_streams():
    with host_cupy.installed(host_cupy.H100, host_cupy.Properties("small", multiprocessors=20, major=7, minor=5)):
        x = host_cupy.to_device(np.zeros(4, np.float32), device=1)
        assert x.device == cupy.cuda.Device(1)
        assert cupy.cuda.Device() == cupy.cuda.Device(0)
        with x.device:
            assert cupy.cuda.runtime.getDevice() == 1
            assert cupy.empty(3).device.id == 1
        assert cupy.empty(3).device.id == 0
        assert cupy.cuda.runtime.getDeviceCount() == 2
        assert x.device.attributes["MultiProcessorCount"] == 20
        assert cupy.cuda.runtime.getDeviceProperties(1)["multiProcessorCount"] == 20
        assert cupy.cuda.runtime.deviceGetAttribute(97, 0) == 227 << 10
        assert x.device.compute_capability == "75"
        assert cupy.cuda.get_current_stream().ptr == 0
    for waits in (cupy.cuda.Device(0).synchronize, cupy.cuda.get_current_stream().synchronize, cupy.zeros(3).get):
        with pytest.raises(AssertionError, match="waits"):
            waits()
    with pytest.raises(AssertionError, match="waits"):
        float(cupy.zeros(()))


def test_arrays_beyond_memory():
    # 2^33 bytes of address space, three pages of memory
    stride = 2**33
    x = host_cupy.sparse((2, 3), np.float32, (stride, 4))
    host_cupy.to_host(x)[...] = [[1, 2, 3], [4, 5, 6]]
    code = """
    extern "C" __global__ void k(const float* x, float* y, long long stride) {
      y[blockIdx.x * 3 + threadIdx.x] = x[blockIdx.x * stride + threadIdx.x];
    }"""
    y = cupy.empty((2, 3), np.float32)
    with simt.using(mode="fast"):
        cupy.RawModule(code=code).get_function("k")((2,), (3,), (x, y, np.int64(stride // 4)))
    assert host_cupy.to_host(y).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_shared_memory_is_the_devices():
    with host_cupy.installed(host_cupy.Properties(shared_opt_in=64 << 10)):
        kernel = cupy.RawModule(code=ADD_ONE).get_function("add_one")
        kernel.max_dynamic_shared_size_bytes = 64 << 10
        with pytest.raises(simt.SimtFault, match="the device has 65536"):
            kernel.max_dynamic_shared_size_bytes = 65 << 10


def test_everything_is_put_back():
    with host_cupy.installed():
        inside = cupy.RawModule
    assert inside is simt.RawModule  # the fixture's
    with pytest.raises(ZeroDivisionError), host_cupy.installed():
        raise ZeroDivisionError
    assert cupy.is_available()


def test_outside_cupy_is_itself():
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import cupy, simt.host_cupy as h\n"
        "before = cupy.RawModule, cupy.cuda.Device, cupy.ndarray.fill, cupy.ndarray.device, cupy.cuda.get_allocator()\n"
        "with h.installed(): assert cupy.RawModule is not before[0]\n"
        "after = cupy.RawModule, cupy.cuda.Device, cupy.ndarray.fill, cupy.ndarray.device, cupy.cuda.get_allocator()\n"
        "assert before == after, (before, after)\n"
        "assert 'fill' not in vars(cupy.ndarray)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
