"""Calls of jvp and double backward."""

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
    _vector,
    channel_gradients,
)
from .parts import run
from .phases import GATES

Array = Any


def _prepared(plan: Plan, operation: str, arrays: list[Any], weight: Array, bias: Array, where: Array) -> _Ready:
    """What the calls of an operation under this plan share; x, then what is read, then what is written."""
    ready: _Ready | None = plan.__dict__.get(f"cpu_{operation}")
    if ready is not None and ready.setting == threads.setting():
        return ready
    from .tangent_loops import coefficients_of
    from .tangent_phases import totals_of

    second = operation == "double_backward"
    small = _smallest(plan) <= SMALL_GROUP
    compute = "float64" if plan.y_dtype == "float64" or small else "float32"
    shape = geometry.of(
        plan, arrays, threads.setting(), compute=compute, where=where, phases=3,
        sums=totals_of(second, plan.activation in GATES),
        gradients=2 if second else 0, writes=2 if second else 1, vectors=4, coefficients=coefficients_of(second),
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype),
    )  # fmt: skip
    kind = _kind_of_work(plan, shape, compute)
    ready = plan.__dict__[f"cpu_{operation}"] = _ready(operation, phases.tangent(kind, second), shape, weight, bias)
    return ready


def _tangent(vector: Array) -> Array:
    return None if vector is None else np.ascontiguousarray(vector, np.float64)


def jvp(
    plan: Plan,
    tx: Array,
    x: Array,
    weight: Array,
    bias: Array,
    tweight: Array,
    tbias: Array,
    where: Array,
    out: Array,
) -> Array:
    """Tangent of the output."""
    if out is None:
        out = _empty_result(plan, x)
    ready = _prepared(plan, "jvp", [x, tx, out], weight, bias, where)
    statistics = np.empty(plan.stats_shape), np.empty(plan.stats_shape)
    run(ready, x, tx, out, _vector(weight), _vector(bias), _tangent(tweight), _tangent(tbias), *statistics, where)
    return out


def double_backward(
    plan: Plan,
    ddx: Array,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    ddweight: Array,
    ddbias: Array,
    where: Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients with respect to dy, x, weight and bias."""
    gdy, gx = _empty_result(plan, x), _empty_result(plan, x)
    ready = _prepared(plan, "double_backward", [x, ddx, dy, gdy, gx], weight, bias, where)
    gweight, gbias = channel_gradients(plan)
    statistics = np.empty(plan.stats_shape), np.empty(plan.stats_shape)
    vectors = (_vector(weight), _vector(bias), _tangent(ddweight), _tangent(ddbias))
    run(ready, x, ddx, dy, gdy, gx, *vectors, *statistics, gweight, gbias, where)
    return gdy, gx, gweight, gbias
