"""Promise: the ways that the compiled engine chooses among, by data and shape, keep the accuracy and the bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from libraries import FLOATS, dtype_of, forget_plans, threads

import cugn
from cugn.cpu import geometry, words
from cugn.plan import Plan, Spec

FACTOR = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}
TABLES = [(64, 256, 32), (5, 30, 5), (7, 30, 30), (3, 1000, 1), (100, 513, 3), (300, 96, 2), (2, 4099, 1)]


def check(result: Any, expected: oracle.Backward, dtype: str) -> None:
    """The bounds of the backward, with an ulp of x_hat's mean for channels whose x_hat is next to 0."""
    factor = FACTOR[dtype] * oracle.epsilon(dtype_of(dtype))
    for name, scale in (("dx", expected.group_max), ("dweight", expected.dweight_terms + expected.dbias_terms)):
        error = np.abs(getattr(result, name).astype(np.float64).astype(oracle.LONG) - getattr(expected, name))
        assert (error <= factor * scale).all(), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("samples", "channels", "groups"), TABLES)
def test_tables(dtype: str, samples: int, channels: int, groups: int) -> None:
    """The backward of a table, which is done sample by sample, with the statistics given and not."""
    rng = np.random.default_rng(samples)
    x, dy = ((rng.normal(size=(samples, channels)) + 2).astype(dtype_of(dtype)) for _ in range(2))
    weight = rng.normal(size=channels).astype(dtype_of(dtype))
    expected = oracle.backward(dy, x, groups, weight)
    _, mean, rstd = cugn.group_norm_forward(x, groups, weight)
    for given in ({}, {"mean": mean, "rstd": rstd}):
        with threads(1):
            result = cugn.group_norm_backward(dy, x, groups, weight, **given)
        check(result, expected, dtype)
        if channels == groups:
            assert not np.any(result.dx)
        for count in (2, 5):
            with threads(count):
                again = cugn.group_norm_backward(dy, x, groups, weight, **given)
            assert [a.tobytes() for a in again] == [a.tobytes() for a in result]
        one = cugn.group_norm_backward(
            dy[1:2], x[1:2], groups, weight, **{name: value[1:2] for name, value in given.items()}
        )
        assert one.dx.tobytes() == result.dx[1:2].tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("samples", "channels", "groups"), TABLES)
def test_tables_forward(dtype: str, samples: int, channels: int, groups: int) -> None:
    """y of a table, of its parts, and with the statistics of the forward."""
    rng = np.random.default_rng(samples)
    x = (rng.normal(size=(samples, channels)) + 2).astype(dtype_of(dtype))
    weight, bias = rng.normal(size=(2, channels)).astype(dtype_of(dtype))
    kind = dtype_of(dtype)
    e = oracle.epsilon(kind)
    for activation in (None, "relu"):
        expected = oracle.forward(x, groups, weight, bias, activation=activation)
        if dtype in ("float32", "float64"):
            bound = {"float32": 3, "float64": 4}[dtype] * e * expected.scale
        else:
            bound = oracle.half_ulp(np.abs(expected.y) + 0.01 * e * expected.scale, kind) + 0.01 * e * expected.scale
        y, mean, rstd = cugn.group_norm_forward(x, groups, weight, bias, activation=activation)
        assert (np.abs(y.astype(np.float64).astype(oracle.LONG) - expected.y) <= bound).all()
        for count in (1, 2, 5):
            with threads(count):
                again = cugn.group_norm(x, groups, weight, bias, activation=activation)
            assert again.tobytes() == y.tobytes()
        assert cugn.group_norm(x[1:2], groups, weight, bias, activation=activation).tobytes() == y[1:2].tobytes()
        normalized = cugn.normalize(x, mean, rstd, groups, weight, bias, activation=activation)
        assert (np.abs(normalized.astype(np.float64).astype(oracle.LONG) - expected.y) <= bound).all()


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("shift", [0, 4, 5])
def test_large_tables(groups: int, shift: int) -> None:
    """Stores past the cache, wherever the result lies and its rows begin: the bits of a small table."""
    rng = np.random.default_rng(0)
    for channels in (512, 544):
        samples = (17 << 20) // (4 * channels)
        x = rng.normal(size=(samples, channels)).astype(np.float32)
        weight, bias = rng.normal(size=(2, channels)).astype(np.float32)
        memory = np.zeros(x.size + 32, np.float32)
        start = (-memory.ctypes.data % 64) // 4 + shift
        out = memory[start : start + x.size].reshape(x.shape)
        cugn.group_norm(x, groups, weight, bias, out=out)
        for rows in (slice(0, 40), slice(samples - 40, samples)):
            np.testing.assert_array_equal(out[rows], cugn.group_norm(x[rows], groups, weight, bias))
        assert not memory[:start].any()
        assert not memory[start + x.size :].any()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 8, 33), (3, 48), (2, 6, 9, 50)])
@pytest.mark.parametrize("last", [False, True])
def test_sums_that_float32_cannot_hold(shape: tuple[int, ...], last: bool, activation: str | None) -> None:
    """dy next to the end of float32's range: two terms of a chain overflow, the sums and dx do not."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=shape).astype(np.float32)
    dy = (rng.choice([-1, 1], size=shape) * rng.uniform(2e38, 3e38, size=shape)).astype(np.float32)
    x[1], dy[1], dy[2:] = x[0], -dy[0], 0  # what dweight and dbias sum over the batch is in range again
    weight = np.full(shape[1], 1e-3, np.float32)
    if last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(v, 1, -1)), -1, 1) for v in (x, dy))
    result = cugn.group_norm_backward(dy, x, 2, weight, activation=activation)
    expected = oracle.backward(dy, x, 2, weight, activation=activation)
    error = np.abs(result.dx.astype(oracle.LONG) - expected.dx)
    assert (error <= 4 * oracle.epsilon(np.float32) * expected.terms).all()
    for name in ("dweight", "dbias"):
        error = np.abs(getattr(result, name).astype(oracle.LONG) - getattr(expected, name))
        assert (error <= 4 * oracle.epsilon(np.float32) * getattr(expected, f"{name}_terms")).all(), name


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_statistics_on_both_sides_of_the_limits(dtype: Any, last: bool) -> None:
    """Mean/std where sums about zero give way to sums about a shift, block by block: none may lose digits."""
    rng = np.random.default_rng(7)
    wide_range = (1e3, 1e5) if np.dtype(dtype).itemsize > 2 else ()
    for ratio in (0.0, 0.9, 1.1, 10.0, 11.3, 11.4, 12.0, 40.0, *wide_range):
        x = (rng.normal(size=(1, 4, 40, 70)) + ratio).astype(dtype)
        x[:, 1] = dtype(ratio)  # a channel of one value, which is a block of its own
        if last:
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        _, mean, rstd = cugn.group_norm_forward(x, 2, eps=0)
        wide = x.astype(oracle.LONG).reshape(1, 2, -1)
        expected = wide.mean(-1)
        std = wide.std(-1)
        tolerance = 2.0**-44
        assert (np.abs(mean - expected) <= tolerance * (np.abs(expected) + std)).all(), ratio
        assert (np.abs(rstd * std - 1) <= 130 * tolerance).all(), ratio


def test_a_second_caller_does_not_wait_for_helpers() -> None:
    """While one call has the helpers, another one does its work alone: same bits, and neither waits for the other."""
    from cugn import threads as pool
    from cugn.cpu import words

    x = np.random.default_rng(0).normal(size=(8, 32, 64, 64)).astype(np.float32)
    with threads(3):
        expected = cugn.group_norm(x, 8)
        claimed = (pool._pool.address + words.POOL_CALL - pool._pool.memory.ctypes.data) // 8
        assert pool._pool.memory[claimed] == 0
        pool._pool.memory[claimed] = 1  # as if a call were being offered
        try:
            assert cugn.group_norm(x, 8).tobytes() == expected.tobytes()
        finally:
            pool._pool.memory[claimed] = 0


class Guarded:
    """An uninitialized array so many bytes after the start of a cache line, between bytes that have to stay.

    Within its page it lies a little after the place of another array in its own page, or not: one is gone over
    downwards (`walk.descends`), the other upwards.
    """

    def __init__(self, like: np.ndarray, offset: int, after: bool = False) -> None:
        self.memory = np.full(like.nbytes + 8448, 77, np.uint8)
        first = -self.memory.ctypes.data % 64 + 64 + offset
        ahead = self.memory.ctypes.data - like.ctypes.data
        start = next(s for s in range(first, first + 4096, 64) if (0 < (ahead + s) % 4096 < 400) == after)
        self.array = self.memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
        self.around = np.r_[0:start, start + like.nbytes : len(self.memory)]

    def is_safe(self) -> bool:
        return bool((self.memory[self.around] == 77).all())


def test_streaming_goes_by_all_arrays() -> None:
    """A backward of 3 x 12 MB leaves the caches, which hold its forward's 2 x 12 MB from call to call."""
    x = np.empty((2, 64, 24, 1024), np.float32)
    for arrays, streams in (([x, x], False), ([x, x, x], True)):
        plan = Plan.of(Spec(np.ndarray, x.shape, x.dtype, x.strides), 8, [])
        made = geometry.of(plan, arrays, 2, compute="float32", phases=2)
        assert bool(made.words[words.STREAM]) == streams


@pytest.mark.rare(when=lambda dtype, options: dtype in ("bfloat16", "float64") and options in ("relu", "labels"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ["first", "last", "table"])
@pytest.mark.parametrize("options", ["plain", "far", "mask", "relu", "labels"])
@pytest.mark.parametrize("size", [6, 24, 32, 144, 160, 300])
def test_large_arrays(size: int, options: str, form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done otherwise for large ones (streaming, rows one by one, as one, downwards) is the same to the bit."""
    rng = np.random.default_rng(0)
    kind = dtype_of(dtype)
    shape = {"first": (2, 4, 1024 + size), "last": (2, 40, size), "table": (40, size)}[form]
    axis = -1 if form == "last" else 1
    channels = shape[axis]
    x, u, dy = ((rng.normal(size=shape) + (20 if options == "far" else 0)).astype(kind) for _ in range(3))
    weight, bias = rng.normal(size=(2, channels)).astype(kind)
    where = rng.random(shape) < 0.7 if options == "mask" else None
    groups: Any = np.arange(channels) % 2 if options == "labels" else 2
    arguments = (x, groups, weight, bias)
    keywords: dict[str, Any] = {"channel_axis": axis, "where": where}

    def results(offset: int, after: bool = False) -> list[bytes]:
        forget_plans()  # they know how their calls are done
        y, dx, ty = outputs = [Guarded(a, offset, after) for a in (x, dy, u)]
        active = {**keywords, "activation": "relu" if options == "relu" else None}
        cugn.group_norm(*arguments, out=y.array, **active)
        grads = cugn.group_norm_backward(dy, *arguments, out=dx.array, **active)
        cugn.group_norm_jvp(u, *arguments, out=ty.array, **active)
        second = cugn.group_norm_double_backward(u, dy, *arguments, **active)
        assert all(output.is_safe() for output in outputs)
        moments = cugn.moments(x, groups, **keywords)
        return [np.ascontiguousarray(a).tobytes() for a in (y.array, ty.array, *grads, *moments, *second)]

    usual = results(0)
    assert results(48, True) == usual
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "TOUCHED_FROM", 0)
        assert results(16) == usual
        patch.setattr(geometry, "STREAM_FROM", 0)
        for offset in (0, 2, 16, 30, 34, 48, 62) if kind.itemsize == 2 else (0, 8, 16, 56):
            assert results(offset) == usual, offset
            assert results(offset, True) == usual, f"{offset}, downwards"
    forget_plans()


@pytest.mark.parametrize("far", [0.0, 5.0])
def test_groups_of_two_rows(far: float) -> None:
    """Channels-last, float64, two positions a channel: dx = +-w a eps rstd^3, a half the difference of dy.

    Near zero coefficients are of x itself, in which what makes such a dx exact has no place.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 24)) * 1e-2 + far
    dy, weight = rng.normal(size=x.shape), rng.uniform(0.5, 2, 24)
    dx = cugn.group_norm_backward(dy, x, 24, weight, channel_axis=-1).dx
    half, a = (np.diff(values.astype(np.longdouble), axis=1) / -2 for values in (x, dy))
    rstd = 1 / np.sqrt(half**2 + 1e-5)
    expected = weight * a * 1e-5 * rstd**3
    error = np.abs(dx - np.concatenate([expected, -expected], axis=1))
    assert error.max() <= 8 * np.finfo(float).eps * np.abs(expected).max()
