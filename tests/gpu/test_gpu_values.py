"""Promise: on a GPU the kernels give what the formulas in float64 give, and what they promise beside the values."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from libraries import FLOATS, dtype_of
from test_accuracy import check_gradients, check_y

import cugn

SHAPES = {
    "tiny groups": ((33, 64), 32),
    "odd sizes": ((5, 12, 49), 4),
    "resident": ((3, 32, 1000), 8),
    "split": ((1, 8, 300_000), 2),
    "one element a group": ((4, 16), 16),
}


def arrays(shape: tuple[int, ...], dtype: str, mean: float = 0.0) -> tuple[np.ndarray, ...]:
    """x, dy, weight and bias."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(mean, 1, shape), rng.normal(size=shape)
    return tuple(a.astype(dtype_of(dtype)) for a in (x, dy, rng.normal(size=shape[1]), rng.normal(size=shape[1])))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SHAPES)
def test_values(case: str, dtype: str, last: bool) -> None:
    """The bounds of the forward and the backward, in both layouts."""
    import cupy

    shape, groups = SHAPES[case]
    x, dy, weight, bias = arrays(shape, dtype)
    axis = -1 if last else 1

    def device(a: np.ndarray) -> Any:
        return cupy.asarray(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if last else a)

    def host(a: Any) -> np.ndarray:
        a = cupy.asnumpy(a)
        return np.moveaxis(a, -1, 1) if last else a

    w, b = cupy.asarray(weight), cupy.asarray(bias)
    check_y(
        host(cugn.group_norm(device(x), groups, w, b, channel_axis=axis)),
        oracle.forward(x, groups, weight, bias),
        dtype,
        case,
    )
    result = cugn.group_norm_backward(device(dy), device(x), groups, w, channel_axis=axis)
    result = result._replace(dx=host(result.dx), dweight=cupy.asnumpy(result.dweight), dbias=cupy.asnumpy(result.dbias))
    expected = oracle.backward(dy, x, groups, weight)
    if (case, dtype) == ("tiny groups", "float64"):  # the terms are those of float64
        expected = expected._replace(group_max=expected.group_max + expected.terms_left)
    check_gradients(result, expected, dtype, case)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_large_means(dtype: str, mean: float) -> None:
    import cupy

    x, _, weight, bias = arrays((2, 16, 4000), dtype, mean)
    y = cugn.group_norm(*map(cupy.asarray, (x,)), 4, cupy.asarray(weight), cupy.asarray(bias))
    check_y(cupy.asnumpy(y), oracle.forward(x, 4, weight, bias), dtype, f"mean {mean}")


def test_float16_conversions() -> None:
    """All 65,536 values through the hardware's conversion and back: the identity of a group with mean 0 and rstd 1."""
    import cupy

    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 256)
        y = cugn.normalize(cupy.asarray(x), cupy.zeros((256, 1)), cupy.ones((256, 1)), 1)
        back = cupy.asnumpy(y)
        keep = ~np.isnan(x.astype(np.float32))
        if dtype is not np.float16:  # float32 arithmetic flushes the subnormals that bfloat16 shares with it
            keep &= (np.abs(x.astype(np.float32)) >= 2.0**-126) | (x.view(np.uint16) == 0)
        np.testing.assert_array_equal(back[keep].astype(np.float32), x[keep].astype(np.float32))
        assert np.isnan(back[np.isnan(x.astype(np.float32))].astype(np.float32)).all()


def test_graph_capture() -> None:
    """A captured call replays on new values."""
    import cupy

    x, dy, weight, bias = map(cupy.asarray, arrays((4, 32, 5000), "float32"))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cugn.group_norm(x, 8, weight, bias, activation="silu")  # compiles
        cugn.group_norm_backward(dy, x, 8, weight)
        stream.begin_capture()
        y = cugn.group_norm(x, 8, weight, bias, activation="silu")
        gradients = cugn.group_norm_backward(dy, x, 8, weight)
        graph = stream.end_capture()
        x += 3 * dy
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(y.get(), cugn.group_norm(x, 8, weight, bias, activation="silu").get())
    np.testing.assert_array_equal(gradients.dx.get(), cugn.group_norm_backward(dy, x, 8, weight).dx.get())


def test_current_stream() -> None:
    """Work follows what was queued before it on the current stream, and only that."""
    import cupy

    x = cupy.asarray(arrays((8, 64, 20_000), "float32")[0])
    expected = cugn.group_norm(2 * x, 8)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(20):
            y = cugn.group_norm(x + x, 8)
    stream.synchronize()
    np.testing.assert_array_equal(y.get(), expected.get())


def test_two_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one CUDA device only")
    h = arrays((2, 8, 100), "float32")[0]
    with cupy.cuda.Device(1):
        x = cupy.asarray(h)
    y = cugn.group_norm(x, 2)
    assert y.device.id == 1
    np.testing.assert_allclose(cupy.asnumpy(y), cugn.group_norm(h, 2), atol=1e-5)
    with pytest.raises(ValueError, match="weight is on device 0"):
        cugn.group_norm(x, 2, cupy.ones(8, "float32"))


def test_same_bits() -> None:
    """Whatever the batch, the run, in place or not."""
    import cupy

    for dtype, last in itertools.product(FLOATS, (False, True)):
        h = arrays((9, 24, 777), dtype)[0]
        x = cupy.asarray(np.ascontiguousarray(np.moveaxis(h, 1, -1)) if last else h)
        axis = -1 if last else 1
        y = cugn.group_norm(x, 6, channel_axis=axis).get().view(np.uint8)
        for _ in range(3):
            np.testing.assert_array_equal(cugn.group_norm(x, 6, channel_axis=axis).get().view(np.uint8), y)
        one = cugn.group_norm(x[4:5], 6, channel_axis=axis).get().view(np.uint8)
        np.testing.assert_array_equal(one[0], y[4])
        cugn.group_norm(x, 6, channel_axis=axis, out=x)
        np.testing.assert_array_equal(x.get().view(np.uint8), y)


def test_more_than_two_to_the_31_elements() -> None:
    import cupy

    if cupy.cuda.runtime.memGetInfo()[0] < 6 * 2**31:
        pytest.skip("less than 12 GiB of device memory are free")
    x = cupy.zeros((1, 2, 2**30 + 64), cupy.float16)
    x[0, 1, -64:] = 1
    cugn.group_norm(x, 2, out=x)
    tail = x[0, 1, -64:].get().astype(np.float64)
    n = 2**30 + 64
    mean = 64 / n
    expected = (1 - mean) / np.sqrt(mean * (1 - mean) + 1e-5)
    assert np.abs(tail - expected).max() <= 2.0**-10 * expected
