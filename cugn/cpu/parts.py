"""Calls for arrays in parts: moments, normalize, and the two passes of the backward by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import threads
from ..plan import Plan
from . import geometry, phases
from .calls import (
    SMALL_GROUP,
    _empty_result,
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


def _prepared(
    plan: Plan, operation: str, entry: str, arrays: list[Any], weight: Array, bias: Array, **options: Any
) -> _Ready:
    """What the calls of an operation under this plan share; arrays of x's shape, what is written last."""
    ready: _Ready | None = plan.__dict__.get(f"cpu_{operation}")
    if ready is not None and ready.setting == threads.setting():
        return ready
    small = entry == "backward" and _smallest(plan) <= SMALL_GROUP
    # sums are given in float64, and are
    wide = plan.y_dtype == "float64" or small or operation == "backward_sums"
    compute = "float64" if wide else "float32"
    # a backward in parts keeps its sums from one phase to the next
    shape = geometry.of(
        plan, arrays, threads.setting(), compute=compute, in_lanes=entry == "forward",
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype), **options,
    )  # fmt: skip
    # a backward's rows group by group have their sums and dx in one phase
    kind = _kind_of_work(plan, shape, compute)._replace(table=shape.table and entry == "forward", lanes=shape.lanes)
    if "where" not in options:
        kind = kind._replace(masked=False)
    steps = getattr(phases, operation)(kind)
    ready = plan.__dict__[f"cpu_{operation}"] = _ready(entry, steps, shape, weight, bias)
    return ready


def run(ready: _Ready, *arguments: Array | int) -> None:
    """Call the entry with the arrays by their ids, and numbers as they are."""
    enter(ready, *[0 if a is None else a if isinstance(a, int) else id(a) for a in arguments])


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group."""
    ready = _prepared(plan, "moments", "forward", [x], None, None, where=where, phases=1, writes=0)
    mean, m2 = np.empty(plan.stats_shape), np.empty((1 if where is None else 2, *plan.stats_shape))
    run(ready, x, None, None, None, mean, m2, where)
    if where is not None:
        return m2[1].astype(np.int64), mean, m2[0]
    return np.broadcast_to(np.diff(plan.group_bounds) * plan.S, plan.stats_shape).astype(np.int64), mean, m2[0]


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    if out is None:
        out = _empty_result(plan, x)
    ready = _prepared(plan, "normalize", "forward", [x, out], weight, bias, phases=2)
    run(ready, x, out, _vector(weight), _vector(bias), _statistics(plan, mean), _statistics(plan, rstd), None)
    return out


def backward_sums(
    plan: Plan, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array
) -> tuple[Array, Array, Array, Array]:
    """Sums over groups and over samples, all in float64."""
    weight = np.ones(plan.C) if weight is None else weight.astype(np.float64)  # dweight and dbias come in its dtype
    ready = _prepared(
        plan, "backward_sums", "backward", [x, dy], weight, bias, sums=geometry.SUMS, gradients=2, phases=1, writes=0
    )
    mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
    sums = np.empty((2, *plan.stats_shape))
    dweight, dbias = np.empty(plan.C), np.empty(plan.C)
    run(ready, x, dy, None, weight, _vector(bias), mean, rstd, dweight, dbias, None, 1, sums)
    return sums[0], sums[1], dweight, dbias


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
    ready = _prepared(
        plan, "backward_apply", "backward", [x, dy, out], weight, bias, where=where, phases=2, sums=geometry.SUMS
    )
    mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
    means = np.stack([_statistics(plan, mean_wdy), _statistics(plan, mean_wdy_xhat)])
    run(ready, x, dy, out, _vector(weight), _vector(bias), mean, rstd, None, None, where, 1, means)
    return out
