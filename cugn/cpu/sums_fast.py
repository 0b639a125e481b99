"""Sums of v and v*t in float32 lanes where that is good enough, which the result itself tells.

Sums of at most 8 values a lane go on to float64, so that no sum is off by more than 2u of the sum of its terms'
absolute values; float64 lanes cost twice the time. A sum that is not finite, or so small that float32 products may
have underflowed, is taken again in float64 by the caller.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .compile import inner
from .convert import loader, storer
from .simd import (
    LANES,
    all_lanes,
    both,
    either,
    first_lanes,
    fma,
    less,
    less_equal,
    load_f64,
    narrow_scalar,
    reduce_add,
    select,
    splat,
    store_f64,
    vector_abs,
    vector_max,
    widen,
)
from .words import MINUS_HIGH, MINUS_LOW, POWER

_STEPS = 8
_LEAST, _MOST = 2.0**-80, 2.0**126
_load64, _ = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]
_load32, _ = loader("float32", "float32")


@inner
def _trusted(sum_v: float, sum_vt: float, count: float) -> bool:
    """Whether the larger sum is finite and far from underflow, or both are exactly zero."""
    larger = max(abs(sum_v), abs(sum_vt))
    return larger == 0.0 or _LEAST * count < larger < _MOST


@cache
def fast_sum_kernels(v: str, x: str, activation: str | None, v_size: int, x_size: int) -> tuple[Any, Any]:
    """run(...) for one channel's runs and columns(...) for rows: whether they were good enough."""
    load_v, load_v_part = loader(v, "float32")
    load_x, load_x_part = loader(x, "float32")
    slope = activation_kernels("float32", activation)[1]
    active = activation is not None

    @inner
    def t_of(xv: Any, p: Any, h: Any, m: Any) -> Any:
        return fma(xv, p, h) + m

    @inner
    def run(
        pv: int, v_step: int, px: int, x_step: int, rows: int, count: int,
        record: int, scale: float, shift: float, out: int, stride: int,
    ) -> bool:  # fmt: skip
        p = splat(narrow_scalar(load_f64(record, POWER)))
        h = splat(narrow_scalar(load_f64(record, MINUS_HIGH)))
        m = splat(narrow_scalar(load_f64(record, MINUS_LOW)))
        a = splat(narrow_scalar(scale))
        b = splat(narrow_scalar(shift))
        zero = p - p
        total_v = splat(0.0)
        total_vt = splat(0.0)
        s0 = zero
        s1 = zero
        s2 = zero
        s3 = zero
        q0 = zero
        q1 = zero
        q2 = zero
        q3 = zero
        steps = 0
        for r in range(rows):
            qv = pv + r * v_step
            qx = px + r * x_step
            left = count
            while left > 0:
                stop = max(left - _STEPS * 4 * LANES, 0)
                while left - stop >= 4 * LANES:
                    t0 = t_of(load_x(qx), p, h, m)
                    t1 = t_of(load_x(qx + LANES * x_size), p, h, m)
                    t2 = t_of(load_x(qx + 2 * LANES * x_size), p, h, m)
                    t3 = t_of(load_x(qx + 3 * LANES * x_size), p, h, m)
                    v0 = load_v(qv)
                    v1 = load_v(qv + LANES * v_size)
                    v2 = load_v(qv + 2 * LANES * v_size)
                    v3 = load_v(qv + 3 * LANES * v_size)
                    if active:
                        v0 = slope(v0, fma(t0, a, b))
                        v1 = slope(v1, fma(t1, a, b))
                        v2 = slope(v2, fma(t2, a, b))
                        v3 = slope(v3, fma(t3, a, b))
                    s0 += v0
                    s1 += v1
                    s2 += v2
                    s3 += v3
                    q0 = fma(v0, t0, q0)
                    q1 = fma(v1, t1, q1)
                    q2 = fma(v2, t2, q2)
                    q3 = fma(v3, t3, q3)
                    qv += 4 * LANES * v_size
                    qx += 4 * LANES * x_size
                    left -= 4 * LANES
                    steps += 1
                while left - stop >= LANES:
                    t0 = t_of(load_x(qx), p, h, m)
                    v0 = load_v(qv)
                    if active:
                        v0 = slope(v0, fma(t0, a, b))
                    s0 += v0
                    q0 = fma(v0, t0, q0)
                    qv += LANES * v_size
                    qx += LANES * x_size
                    left -= LANES
                    steps += 1
                if left > stop:
                    # zeros beyond the end: 0 * t must not bring in an infinite t
                    t1 = select(first_lanes(left), t_of(load_x_part(qx, left), p, h, m), zero)
                    v1 = load_v_part(qv, left)
                    if active:
                        v1 = slope(v1, fma(t1, a, b))
                    s1 += v1
                    q1 = fma(v1, t1, q1)
                    left = stop
                    steps += 1
                if steps >= _STEPS:
                    steps = 0
                    total_v += widen(s0 + s1) + widen(s2 + s3)
                    total_vt += widen(q0 + q1) + widen(q2 + q3)
                    s0 = zero
                    s1 = zero
                    s2 = zero
                    s3 = zero
                    q0 = zero
                    q1 = zero
                    q2 = zero
                    q3 = zero
        total_v += widen(s0 + s1) + widen(s2 + s3)
        total_vt += widen(q0 + q1) + widen(q2 + q3)
        sum_v = reduce_add(total_v)
        sum_vt = reduce_add(total_vt)
        store_f64(out, 0, sum_v)
        store_f64(out + stride, 0, sum_vt)
        return _trusted(sum_v, sum_vt, float(rows * count))

    @inner
    def columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, sums: int, each64: int, coefficients: int,
        each: int,
    ) -> bool:  # fmt: skip
        for j in range(0, cols, LANES):
            _store64(sums + 8 * j, splat(0.0))
            _store64(sums + each64 + 8 * j, splat(0.0))
        for r0 in range(0, rows, _STEPS):
            here = min(_STEPS, rows - r0)
            for j in range(0, cols, LANES):
                at = coefficients + 4 * j
                p = _load32(at)
                h = _load32(at + each)
                m = _load32(at + 2 * each)
                a = _load32(at + 3 * each)
                b = _load32(at + 4 * each)
                s0 = p - p
                q0 = p - p
                qx = px + r0 * x_step + j * x_size
                qv = pv + r0 * v_step + j * v_size
                if cols - j >= LANES:
                    for r in range(here):
                        t = t_of(load_x(qx + r * x_step), p, h, m)
                        g = load_v(qv + r * v_step)
                        if active:
                            g = slope(g, fma(t, a, b))
                        s0 += g
                        q0 = fma(g, t, q0)
                else:
                    for r in range(here):
                        t = t_of(load_x_part(qx + r * x_step, cols - j), p, h, m)
                        g = load_v_part(qv + r * v_step, cols - j)
                        if active:
                            g = slope(g, fma(t, a, b))
                        s0 += g
                        q0 = fma(g, t, q0)
                _store64(sums + 8 * j, _load64(sums + 8 * j) + widen(s0))
                _store64(sums + each64 + 8 * j, _load64(sums + each64 + 8 * j) + widen(q0))
        least = splat(_LEAST * rows)
        most = splat(_MOST)
        zero = splat(0.0)
        good = True
        for j in range(0, cols, LANES):
            larger = vector_max(vector_abs(_load64(sums + 8 * j)), vector_abs(_load64(sums + each64 + 8 * j)))
            fine = either(less_equal(larger, zero), both(less(least, larger), less(larger, most)))
            if cols - j < LANES:
                larger = select(first_lanes(cols - j), larger, zero)
                fine = either(less_equal(larger, zero), both(less(least, larger), less(larger, most)))
            good = good and all_lanes(fine)
        return good

    return run, columns
