"""Calls for arrays in parts: moments, normalize, and the two passes of the backward by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import threads
from ..plan import Plan
from . import geometry
from .calls import (
    SMALL_GROUP,
    _empty_result,
    _kernel,
    _kind,
    _kind_of_work,
    _Ready,
    _ready,
    _smallest,
    _statistics,
    _vector,
    enter,
)

Array = Any


def _prepared(plan: Plan, operation: str, arrays: list[Any], weight: Array, bias: Array, **options: Any) -> _Ready:
    """What the calls of an operation under this plan share; arrays of x's shape, what is written last."""
    ready: _Ready | None = plan.__dict__.get(f"cpu_{operation}")
    if ready is not None and ready.setting == threads.count:
        return ready
    small = operation.startswith("backward") and _smallest(plan) <= SMALL_GROUP
    # sums are given in float64, and are
    wide = plan.y_dtype == "float64" or small or operation == "backward_sums"
    compute = "float64" if wide else "float32"
    shape = geometry.of(
        plan, arrays, threads.count, compute=compute, phases=2,
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype), **options,
    )  # fmt: skip
    kind = _kind_of_work(plan, shape, compute)._replace(dense=False, table=shape.table and operation == "normalize")
    ready = plan.__dict__[f"cpu_{operation}"] = _ready(_kernel("parts", operation, kind), shape, weight, bias)
    return ready


def _run(ready: _Ready, *arrays: Array) -> None:
    """Call the kernel with the arrays by their ids."""
    enter(ready, *[0 if array is None else id(array) for array in arrays])


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group."""
    ready = _prepared(plan, "moments", [x], None, None, where=where, writes=0)
    mean, m2 = np.empty(plan.stats_shape), np.empty(plan.stats_shape)
    kept = None if where is None else np.empty(plan.stats_shape)
    _run(ready, x, mean, m2, kept, where)
    if kept is not None:
        return kept.astype(np.int64), mean, m2
    return np.broadcast_to(np.diff(plan.group_bounds) * plan.S, plan.stats_shape).astype(np.int64), mean, m2


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    if out is None:
        out = _empty_result(plan, x)
    ready = _prepared(plan, "normalize", [x, out], weight, bias)
    _run(ready, x, out, _vector(weight), _vector(bias), _statistics(plan, mean), _statistics(plan, rstd))
    return out


def backward_sums(
    plan: Plan, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array
) -> tuple[Array, Array, Array, Array]:
    """Sums over groups and over samples, all in float64."""
    weight = np.ones(plan.C) if weight is None else weight.astype(np.float64)  # dweight and dbias come in its dtype
    ready = _prepared(plan, "backward_sums", [x, dy], weight, bias, sums=geometry.SUMS, gradients=2, writes=0)
    sums = np.empty(plan.stats_shape), np.empty(plan.stats_shape)
    gradients = np.empty(plan.C), np.empty(plan.C)
    _run(ready, x, dy, weight, _vector(bias), _statistics(plan, mean), _statistics(plan, rstd), *sums, *gradients)
    return (*sums, *gradients)


def backward_apply(
    plan: Plan,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    mean_wdy: Array,
    mean_wdy_xhat: Array,
    weight: Array,
    bias: Array,
    where: Array,
    out: Array,
) -> Array:
    """Gradient with respect to x from means that the caller supplies."""
    if out is None:
        out = _empty_result(plan, x)
    ready = _prepared(plan, "backward_apply", [x, dy, out], weight, bias, where=where, sums=geometry.SUMS)
    statistics = [_statistics(plan, values) for values in (mean, rstd, mean_wdy, mean_wdy_xhat)]
    _run(ready, x, dy, out, _vector(weight), _vector(bias), *statistics, where)
    return out
