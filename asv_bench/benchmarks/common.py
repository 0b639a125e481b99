"""The parameters that all benchmarks share, and the arrays that they stand for."""

from __future__ import annotations

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
        (1, 8, 32),
        ("float32", "float64", "float16", "bfloat16"),
        ("channels_first", "channels_last"),
        ("cpu", "cuda"),
    )
    offset = 0.0

    def setup(self, shape: tuple[int, ...], groups: int, dtype: str, layout: str, engine: str) -> None:
        self.xp, self.wait = library(engine)
        self.groups = groups
        self.channel_axis = 1 if layout == "channels_first" else -1
        numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        rng = np.random.default_rng(0)
        in_memory = shape if self.channel_axis == 1 else (shape[0], *shape[2:], shape[1])
        drawn = {
            "x": self.offset + rng.standard_normal(in_memory, dtype=np.float32),
            "dy": rng.standard_normal(in_memory, dtype=np.float32),
            "weight": rng.uniform(0.5, 2, shape[1]),
            "bias": rng.uniform(-1, 1, shape[1]),
        }
        arrays = {name: self.xp.asarray(array.astype(numpy_dtype)) for name, array in drawn.items()}
        self.x, self.dy, self.weight, self.bias = arrays.values()
        self.out = self.xp.zeros_like(self.x)
        _, self.mean, self.rstd = self.forward()
        self.backward()  # the first call compiles: not the benchmark's time
        self.wait()

    def forward(self, out: Array = None) -> cugn.GroupNormForward:
        affine = (self.weight, self.bias)
        return cugn.group_norm_forward(self.x, self.groups, *affine, channel_axis=self.channel_axis, out=out)

    def backward(self, out: Array = None) -> cugn.GroupNormGrads:
        known = {"mean": self.mean, "rstd": self.rstd, "channel_axis": self.channel_axis}
        return cugn.group_norm_backward(self.dy, self.x, self.groups, self.weight, self.bias, **known, out=out)


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
