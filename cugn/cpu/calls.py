"""From the arrays of a call to a kernel: what a plan needs is prepared once, a call then allocates results and goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import numpy as np

from .. import threads
from ..plan import Plan
from . import cache as disk
from . import geometry

Array = Any
SMALL_GROUP = 32
"""Elements of a group up to which the backward computes in float64: dx of two elements is what is left when dy
cancels.
"""


class _Ready(NamedTuple):
    """What a plan's calls of one operation share."""

    setting: int
    entry: Callable[..., int]
    address: int
    work_bytes: int
    header_bytes: int
    threads: int
    plain: bool
    """Vectors over the channels can be read as they are."""
    kept: Any


@cache
def _kernel(operation: str, *options: Any) -> Callable[..., int]:
    """The kernel of an operation for these dtypes and this kind of layout: from disk, else compiled and kept there."""
    name = repr((operation, *options))
    entry = disk.load(name)
    if entry is None:
        from .compile import compiled

        module = import_module(f".kernel_{operation}", __package__)
        result = compiled(module.kernel(*options), name)
        disk.save(name, result)
        entry = result.entry_point
    return cast("Callable[..., int]", entry)


def _empty_result(plan: Plan, x: Array) -> Array:
    """Array of the result's dtype in x's memory order."""
    if plan.x_dtype == plan.y_dtype:
        return np.empty_like(x)
    return np.empty_like(x, dtype=plan.y_dtype)


def _work(ready: _Ready) -> Array:
    """Memory of a call, its header zero."""
    if ready.work_bytes <= 8192:
        return np.zeros(ready.work_bytes, np.uint8)
    work = np.empty(ready.work_bytes, np.uint8)
    work[: ready.header_bytes] = 0
    return work


def _plain(vector: Array) -> bool:
    return vector is None or (vector.dtype.char in "fd" and vector.strides[0] == vector.itemsize)


def _vector(vector: Array) -> Array:
    """A vector over the channels as a kernel reads it: contiguous, float32 or float64."""
    return (
        None if vector is None else np.ascontiguousarray(vector, np.float64 if vector.dtype.char == "d" else np.float32)
    )


def _kind(vector: Array, otherwise: str) -> int:
    """1 for a float64 vector."""
    return int((otherwise if vector is None else vector.dtype.name) == "float64")


def _id(array: Array) -> int:
    return 0 if array is None else id(array)


def _prepare_forward(plan: Plan, x: Array, weight: Array, bias: Array, out: Array) -> _Ready:
    compute = "float64" if plan.y_dtype == "float64" else "float32"
    shape = geometry.of(
        plan, [x, out], threads.count, compute=compute, phases=2,
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype),
    )  # fmt: skip
    entry = _kernel("forward", plan.x_dtype, plan.y_dtype, compute, plan.activation, shape.by_rows, shape.strided)
    plain = _plain(weight) and _plain(bias)
    return _Ready(
        threads.count, entry, shape.address, shape.work_bytes, shape.header_bytes, shape.threads, plain, shape
    )


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output, mean and rstd."""
    if out is None:
        out = _empty_result(plan, x)
    ready: _Ready | None = plan.__dict__.get("cpu_forward")
    if ready is None or ready.setting != threads.count:
        ready = plan.__dict__["cpu_forward"] = _prepare_forward(plan, x, weight, bias, out)
    if not ready.plain:
        weight, bias = _vector(weight), _vector(bias)
    mean = np.empty(plan.stats_shape)
    rstd = np.empty(plan.stats_shape)
    work = _work(ready)
    arguments = (
        ready.address, id(x), id(out), 0 if weight is None else id(weight), 0 if bias is None else id(bias),
        id(mean), id(rstd), id(work),
    )  # fmt: skip
    if ready.threads == 1:
        ready.entry(*arguments, 1)
    else:
        arrays = (x, out, weight, bias, mean, rstd, work, ready)
        threads.run(ready.entry, arguments, arrays, ready.threads)
    return out, mean, rstd


def _prepare_backward(plan: Plan, dy: Array, x: Array, weight: Array, bias: Array, phases: int, out: Array) -> _Ready:
    elements = plan.C // plan.G * plan.S
    compute = "float64" if plan.y_dtype == "float64" or elements <= SMALL_GROUP else "float32"
    shape = geometry.of(
        plan, [x, dy, out], threads.count, compute=compute, phases=phases, sums=geometry.SUMS, gradients=2,
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype),
    )  # fmt: skip
    entry = _kernel("backward", plan.x_dtype, plan.y_dtype, compute, plan.activation, shape.by_rows, shape.strided)
    plain = _plain(weight) and _plain(bias)
    return _Ready(
        threads.count, entry, shape.address, shape.work_bytes, shape.header_bytes, shape.threads, plain, shape
    )


def _statistics(plan: Plan, values: Array) -> Array:
    """Statistics that the caller gave, one by one, as float64."""
    return np.ascontiguousarray(np.broadcast_to(values, plan.stats_shape), np.float64)


def backward(
    plan: Plan, dy: Array, x: Array, weight: Array, bias: Array, mean: Array, rstd: Array, where: Array, out: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias."""
    if out is None:
        out = _empty_result(plan, x)
    first = 0 if mean is None else 1
    name = "cpu_backward" if mean is None else "cpu_backward_given"
    ready: _Ready | None = plan.__dict__.get(name)
    if ready is None or ready.setting != threads.count:
        ready = plan.__dict__[name] = _prepare_backward(plan, dy, x, weight, bias, 3 - first, out)
    if not ready.plain:
        weight, bias = _vector(weight), _vector(bias)
    if mean is None:
        mean = np.empty(plan.stats_shape)
        rstd = np.empty(plan.stats_shape)
    elif not (mean.shape == rstd.shape == plan.stats_shape and mean.dtype.char == rstd.dtype.char == "d"
              and mean.flags.c_contiguous and rstd.flags.c_contiguous):  # fmt: skip
        mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
    double = plan.weight_dtype == "float64"
    dweight = np.empty(plan.C, np.float64 if double else np.float32)
    dbias = np.empty(plan.C, np.float64 if double else np.float32)
    work = _work(ready)
    arguments = (
        ready.address, id(x), id(dy), id(out), 0 if weight is None else id(weight), 0 if bias is None else id(bias),
        id(mean), id(rstd), id(dweight), id(dbias), id(work), first,
    )  # fmt: skip
    if ready.threads == 1:
        ready.entry(*arguments, 1)
    else:
        arrays = (x, dy, out, weight, bias, mean, rstd, dweight, dbias, work, ready)
        threads.run(ready.entry, arguments, arrays, ready.threads)
    if plan.weight_dtype in ("float16", "bfloat16"):
        kind = _dtype(plan.weight_dtype)
        dweight, dbias = dweight.astype(kind), dbias.astype(kind)
    return out, dweight, dbias


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
