"""The parameters that all benchmarks share, and the arrays that they stand for."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from asv_runner.benchmarks.mark import SkipNotImplemented

import cugn

Array = Any


class GroupNorm:
    """Base of all benchmarks: one group norm, its shape given as channels-first."""

    param_names = ("shape", "groups", "dtype", "layout", "engine")
    params: tuple[tuple[Any, ...], ...] = (
        ((1, 32, 64), (8, 1024, 14, 14), (2, 256, 56, 56), (1, 32, 96, 96, 96)),
        (1, 32),
        ("float32", "float64", "float16", "bfloat16"),
        ("channels_first", "channels_last"),
        ("cpu", "cuda"),
    )
    offset = 0.0

    def setup(self, *parameters: Any) -> None:
        self.draw(*parameters)
        _, self.mean, self.rstd = self.forward()
        for out in (None, self.out):  # the first call plans and compiles: not the benchmark's time
            self.forward(out)
            self.backward(out)
        self.wait()

    def draw(self, shape: tuple[int, ...], groups: int, dtype: str, layout: str, engine: str) -> None:
        """Make the arrays, with hardly more memory than they take themselves."""
        self.xp, self.wait = library(engine)
        self.groups = groups
        self.channel_axis = 1 if layout == "channels_first" else -1
        in_memory = shape if self.channel_axis == 1 else (shape[0], *shape[2:], shape[1])
        numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        rng = np.random.default_rng(0)

        def there(values: np.ndarray, shape: tuple[int, ...]) -> Array:
            return self.xp.asarray(np.resize(values.astype(numpy_dtype), shape))

        drawn = min(math.prod(shape), 1_000_003)
        self.x = there(self.offset + rng.standard_normal(drawn, dtype=np.float32), in_memory)
        self.dy = there(rng.standard_normal(drawn, dtype=np.float32), in_memory)
        self.weight = there(rng.uniform(0.5, 2, shape[1]), (shape[1],))
        self.bias = there(rng.uniform(-1, 1, shape[1]), (shape[1],))
        self.out = self.xp.zeros_like(self.x)
        self.mean = self.rstd = None

    def forward(self, out: Array = None) -> cugn.GroupNormForward:
        affine = (self.weight, self.bias)
        return cugn.group_norm_forward(self.x, self.groups, *affine, channel_axis=self.channel_axis, out=out)

    def backward(self, out: Array = None) -> cugn.GroupNormGrads:
        known = {"mean": self.mean, "rstd": self.rstd, "channel_axis": self.channel_axis}
        return cugn.group_norm_backward(self.dy, self.x, self.groups, self.weight, self.bias, **known, out=out)

    def jvp(self, out: Array = None) -> Array:
        tangents = {"tweight": self.bias, "tbias": self.weight, "channel_axis": self.channel_axis}
        return cugn.group_norm_jvp(self.dy, self.x, self.groups, self.weight, self.bias, **tangents, out=out)

    def double_backward(self) -> cugn.GroupNormDoubleGrads:
        given = {"ddweight": self.bias, "ddbias": self.weight, "channel_axis": self.channel_axis}
        # dy once more in the place of ddx: one array less to hold
        return cugn.group_norm_double_backward(self.dy, self.dy, self.x, self.groups, self.weight, self.bias, **given)


def library(engine: str) -> tuple[Any, Any]:
    """The array library of an engine, and what waits for its results; tells asv to skip where it cannot run."""
    if engine == "cpu":
        return np, lambda: None
    try:
        import cupy
    except ImportError as error:
        raise SkipNotImplemented("CuPy is not installed") from error
    if not cupy.is_available():
        raise SkipNotImplemented("CuPy finds no GPU")
    return cupy, cupy.cuda.Device().synchronize


def load(dtypes: tuple[str, ...]) -> None:
    """Make the first call of each dtype, so that its compiled code is there.

    asv imports the benchmarks in one process and forks a new one from it for each set of parameters: 784 of them, 0.5 s
    each without this.
    """
    benchmark = GroupNorm()
    for dtype in dtypes:
        benchmark.setup((1, 32, 3, 3), 1, dtype, "channels_first", "cpu")


load(GroupNorm.params[2])
