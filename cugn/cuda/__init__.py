"""The CUDA engine: CuPy arrays through hand-written kernels, on the current stream of x's device.

Nothing here waits for the device or reads its memory, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..plan import FLOATS, Plan
from .launches import run
from .pieces import Statistics, Sums, pieces
from .strided import contiguous, dtype_of, float64

__all__ = ["backward", "double_backward", "forward", "jvp", "moments", "normalize", "serves"]

Array = Any


def serves(plan: Plan, operation: str) -> bool:
    """Everything: CuPy's arrays tell their strides."""
    return plan.layout is not None


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output and statistics of each group."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out), *(_constant(plan.stats_shape, math.nan) for _ in range(2))
        if _dense(plan):
            call = run("forward", plan, {"x": x, "weight": weight, "bias": bias, "y": out}, where)
            return call["y"], call["mean"], call["rstd"]
        out, statistics = _out(plan, x, out), Statistics(plan, np.float64, np.float64)
        for piece in pieces(plan, {"x": x}, where):
            w, b = piece.of(weight), piece.of(bias)
            y, *of_piece = forward(piece.plan, piece.arrays["x"], w, b, piece.where, None)
            piece.store(y, out)
            statistics.store(piece, of_piece)
        return out, *statistics.results()


def backward(
    plan: Plan,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    mean: Array,
    rstd: Array,
    where: Array,
    out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias. The mean is taken anew: with x at hand that is free, and exact."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out), *_zero_gradients(plan)
        given = None if rstd is None else _statistics(plan, rstd)
        if _dense_floats(plan):
            arrays = {"x": x, "v": dy, "weight": weight, "bias": bias, "rstd": given, "y": out}
            call = run("backward", plan, arrays, where)
            return call["y"], call["dweight"], call["dbias"]
        out, sums = _out(plan, x, out), Sums(plan)
        for piece in pieces(plan, {"x": x, "v": dy}, where):
            arrays = {**piece.arrays, "weight": piece.of(weight), "bias": piece.of(bias), "y": piece.arrays["v"]}
            if given is not None:
                arrays["rstd"] = contiguous(given.reshape(plan.N, plan.G)[piece.samples, piece.groups])
            call = run("backward_of_piece", piece.plan, arrays, piece.where)
            piece.store(call["y"], out)
            sums.store(piece, call)
        return out, *sums.results()


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
    """Tangent of the output along tangents of x, weight and bias."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out)
        if _dense_floats(plan):
            parameters = {"weight": weight, "bias": bias, "tweight": tweight, "tbias": tbias}
            return run("jvp", plan, {"x": x, "v": tx, **parameters, "y": out}, where)["y"]
        out = _out(plan, x, out)
        for piece in pieces(plan, {"x": x, "v": tx}, where):
            w, b, tw, tb = (piece.of(p) for p in (weight, bias, tweight, tbias))
            ty = jvp(piece.plan, piece.arrays["v"], piece.arrays["x"], w, b, tw, tb, piece.where, None)
            piece.store(ty, out)
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
    """Gradients of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias> with respect to dy, x, weight and bias."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, None), _out(plan, x, None), *_zero_gradients(plan)
        parameters = {"weight": weight, "bias": bias, "ddweight": ddweight, "ddbias": ddbias}
        if _dense_floats(plan):
            call = run("double_backward", plan, {"x": x, "u": ddx, "v": dy, **parameters}, where)
            return call["y"], call["gx"], call["dweight"], call["dbias"]
        gdy, gx, sums = _out(plan, x, None), _out(plan, x, None), Sums(plan)
        for piece in pieces(plan, {"x": x, "u": ddx, "v": dy}, where):
            arrays = {**piece.arrays, **{name: piece.of(parameter) for name, parameter in parameters.items()}}
            call = run("double_backward_of_piece", piece.plan, arrays, piece.where)
            piece.store(call["y"], gdy)
            piece.store(call["gx"], gx)
            sums.store(piece, call)
        return gdy, gx, *sums.results()


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group, in float64 throughout."""
    with x.device:
        if plan.size == 0:
            count, m2 = (_constant(plan.stats_shape, 0, dtype) for dtype in (np.int64, np.float64))
            return count, _constant(plan.stats_shape, math.nan), m2
        if _dense(plan):
            call = run("moments", plan, {"x": x}, where)
            return call["count"], call["mean"], call["m2"]
        statistics = Statistics(plan, np.int64, np.float64, np.float64)
        for piece in pieces(plan, {"x": x}, where):
            statistics.store(piece, moments(piece.plan, piece.arrays["x"], piece.where))
        return statistics.results()


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out)
        mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
        if _dense(plan):
            arrays = {"x": x, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "y": out}
            return run("normalize", plan, arrays)["y"]
        out = _out(plan, x, out)
        for piece in pieces(plan, {"x": x}, None):
            m, r = (s.reshape(plan.N, plan.G)[piece.samples, piece.groups] for s in (mean, rstd))
            y = normalize(piece.plan, piece.arrays["x"], m, r, piece.of(weight), piece.of(bias), None)
            piece.store(y, out)
        return out


def _dense(plan: Plan) -> bool:
    return plan.layout is not None and plan.layout.kind == "dense"


def _dense_floats(plan: Plan) -> bool:
    """Whether the kernels of the gradients take the arrays as they are: x has the dtype of its gradient."""
    return _dense(plan) and plan.x_dtype in FLOATS


def _constant(shape: tuple[int, ...], value: float, dtype: Any = np.float64) -> Array:
    """A new array of one value."""
    import cupy

    array = cupy.empty(shape, dtype)
    array.fill(value)
    return array


def _zero_gradients(plan: Plan) -> tuple[Array, Array]:
    """dweight and dbias of no elements."""
    dtype = dtype_of(plan.weight_dtype)
    return _constant((plan.C,), 0, dtype), _constant((plan.C,), 0, dtype)


def _out(plan: Plan, x: Array, out: Array) -> Array:
    """`out`, or a new array in x's memory order."""
    import cupy

    return cupy.empty_like(x, dtype=dtype_of(plan.y_dtype)) if out is None else out


def _statistics(plan: Plan, given: Array) -> Array:
    """Statistics that the caller supplies as the kernels read them: C-contiguous float64, one for each group."""
    import cupy

    return float64(given if given.shape == plan.stats_shape else cupy.broadcast_to(given, plan.stats_shape))
