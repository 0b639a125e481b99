"""Sums of v and v*t, and of t, over a chunk, channel by channel: what the backward and the jvp need of their second
input.

v is dy times the activation's slope; t = fma(x, POWER, -mean*POWER) in float64 is x_hat up to the group's RATIO.
Both are read once; sums are in float64 lanes. The sum of t is taken in float64 calls only: it is the part of the
mean that one float64 does not hold.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .apply import to_compute
from .compile import inner
from .convert import loader, storer
from .moments import add_to
from .simd import LANES, first_lanes, fma, load_f64, reduce_add, rounding, select, splat, store_f64, widen
from .words import MINUS_HIGH, MINUS_LOW, POWER

_ROWS = 4
_STEPS = 8  # additions of float64 lanes before the rounding of their sum is kept
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")


@cache
def sum_kernels(v: str, x: str, compute: str, activation: str | None, v_size: int, x_size: int) -> tuple[Any, Any]:
    """run(...) for one channel's runs, columns(...) for rows with accumulators element by element."""
    load_v, load_v_part = loader(v, compute)
    load_x, load_x_part = loader(x, compute)
    load_c, _ = loader(compute, compute)
    lanes = to_compute(compute)
    slope = activation_kernels(compute, activation)[1]
    double = compute == "float64"
    active = activation is not None
    c_size = 8 if double else 4

    @inner
    def run(
        pv: int, v_step: int, px: int, x_step: int, rows: int, count: int,
        record: int, scale: float, shift: float, out: int, stride: int,
    ) -> None:  # fmt: skip
        power64 = load_f64(record, POWER)
        power = splat(power64)
        minus = splat(load_f64(record, MINUS_HIGH) + load_f64(record, MINUS_LOW))
        p = lanes(power64)
        h = lanes(load_f64(record, MINUS_HIGH))
        m = lanes(load_f64(record, MINUS_LOW))
        a = lanes(scale)
        b = lanes(shift)
        zero = splat(0.0)
        sum_v0 = zero
        sum_v1 = zero
        sum_vt0 = zero
        sum_vt1 = zero
        sum_t = zero
        totals = zero
        totals_lost = zero
        totals_vt = zero
        totals_vt_lost = zero
        totals_t = zero
        totals_t_lost = zero
        steps = 0
        for r in range(rows):
            qv = pv + r * v_step
            qx = px + r * x_step
            left = count
            while left > 0:
                stop = max(left - _STEPS * 2 * LANES, 0) if double else 0
                steps += (left - stop + 2 * LANES - 1) // (2 * LANES)
                while left - stop >= 2 * LANES:
                    x0 = load_x(qx)
                    x1 = load_x(qx + LANES * x_size)
                    v0 = load_v(qv)
                    v1 = load_v(qv + LANES * v_size)
                    if active:
                        v0 = slope(v0, fma(fma(x0, p, h) + m, a, b))
                        v1 = slope(v1, fma(fma(x1, p, h) + m, a, b))
                    w0 = widen(v0)
                    w1 = widen(v1)
                    t0 = fma(widen(x0), power, minus)
                    t1 = fma(widen(x1), power, minus)
                    sum_v0 += w0
                    sum_v1 += w1
                    sum_vt0 = fma(w0, t0, sum_vt0)
                    sum_vt1 = fma(w1, t1, sum_vt1)
                    if double:
                        sum_t += t0 + t1
                    qv += 2 * LANES * v_size
                    qx += 2 * LANES * x_size
                    left -= 2 * LANES
                while left > stop:
                    if left >= LANES:
                        x0 = load_x(qx)
                        v0 = load_v(qv)
                        if active:
                            v0 = slope(v0, fma(fma(x0, p, h) + m, a, b))
                        t0 = fma(widen(x0), power, minus)
                    else:
                        x0 = load_x_part(qx, left)
                        v0 = load_v_part(qv, left)
                        if active:
                            v0 = slope(v0, fma(fma(x0, p, h) + m, a, b))
                        # zeros beyond the end: 0 * t must not bring in an infinite t
                        t0 = select(first_lanes(left), fma(widen(x0), power, minus), zero)
                    w0 = widen(v0)
                    sum_v0 += w0
                    sum_vt0 = fma(w0, t0, sum_vt0)
                    if double:
                        sum_t += t0
                    qv += LANES * v_size
                    qx += LANES * x_size
                    left -= LANES
                if double and steps >= _STEPS:
                    steps = 0
                    part = sum_v0 + sum_v1
                    moved = totals + part
                    totals_lost += rounding(totals, part, moved)
                    totals = moved
                    part = sum_vt0 + sum_vt1
                    moved = totals_vt + part
                    totals_vt_lost += rounding(totals_vt, part, moved)
                    totals_vt = moved
                    moved = totals_t + sum_t
                    totals_t_lost += rounding(totals_t, sum_t, moved)
                    totals_t = moved
                    sum_v0 = zero
                    sum_v1 = zero
                    sum_vt0 = zero
                    sum_vt1 = zero
                    sum_t = zero
        if double:
            sum_v0 += totals_lost
            sum_v1 += totals
            sum_vt0 += totals_vt_lost
            sum_vt1 += totals_vt
            sum_t = (sum_t + totals_t_lost) + totals_t
        store_f64(out, 0, reduce_add(sum_v0 + sum_v1))
        store_f64(out + stride, 0, reduce_add(sum_vt0 + sum_vt1))
        if double:
            store_f64(out + 2 * stride, 0, reduce_add(sum_t))

    @inner
    def some_columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, own: int, each64: int, coefficients: int,
        each: int,
    ) -> None:  # fmt: skip
        # own: float64 arrays power, minus, then the three sums, and in float64 what they lost
        left = cols
        while left > 0:
            power = _load64(own)
            minus = _load64(own + each64)
            sum_v = splat(0.0)
            sum_vt = sum_v
            sum_t = sum_v
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            b = load_c(coefficients + 4 * each)
            for r in range(rows):
                if left >= LANES:
                    xr = load_x(px + r * x_step)
                    vr = load_v(pv + r * v_step)
                else:
                    xr = load_x_part(px + r * x_step, left)
                    vr = load_v_part(pv + r * v_step, left)
                if active:
                    vr = slope(vr, fma(fma(xr, p, h) + m, a, b))
                t = fma(widen(xr), power, minus)
                wide = widen(vr)
                sum_v += wide
                sum_vt = fma(wide, t, sum_vt)
                if double:
                    sum_t += t
            if double:
                add_to(own + 2 * each64, own + 5 * each64, sum_v)
                add_to(own + 3 * each64, own + 6 * each64, sum_vt)
                add_to(own + 4 * each64, own + 7 * each64, sum_t)
            else:
                _store64(own + 2 * each64, _load64(own + 2 * each64) + sum_v)
                _store64(own + 3 * each64, _load64(own + 3 * each64) + sum_vt)
            own += 8 * LANES
            coefficients += LANES * c_size
            px += LANES * x_size
            pv += LANES * v_size
            left -= LANES

    @inner
    def columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, own: int, each64: int, coefficients: int,
        each: int,
    ) -> None:  # fmt: skip
        done = 0
        while done + _ROWS <= rows:
            some_columns(
                pv + done * v_step, v_step, px + done * x_step, x_step, _ROWS, cols, own, each64, coefficients, each
            )
            done += _ROWS
        if done < rows:
            some_columns(
                pv + done * v_step, v_step, px + done * x_step, x_step, rows - done, cols, own, each64, coefficients,
                each,
            )  # fmt: skip

    return run, columns


@inner
def add_layers(sums: int, layers: int, layer_bytes: int, width: int, totals: int) -> None:
    """totals[c] = sum over the layers of sums[layer, c], compensated, for `width` channels of padded arrays."""
    for c in range(0, width, LANES):
        total = splat(0.0)
        lost = splat(0.0)
        for layer in range(layers):
            term = _load64(sums + layer * layer_bytes + 8 * c)
            moved = total + term
            kept = moved - total
            lost += (total - (moved - kept)) + (term - kept)
            total = moved
        _store64(totals + 8 * c, total + lost)


@inner
def accumulate(high: int, low: int, term: int, width: int) -> None:
    """high + low += term, element by element, without loss; nothing beyond `width` is touched."""
    for c in range(0, width, LANES):
        left = min(LANES, width - c)
        value = _load64(term + 8 * c)
        total = _load64_part(high + 8 * c, left)
        moved = total + value
        kept = moved - total
        lost = (total - (moved - kept)) + (value - kept)
        _store64_part(high + 8 * c, moved, left)
        _store64_part(low + 8 * c, _load64_part(low + 8 * c, left) + lost, left)


@inner
def dot(a: int, b: int, width: int) -> float:
    """Sum of a[k]*b[k] of two float64 arrays."""
    total = splat(0.0)
    for c in range(0, width, LANES):
        left = min(LANES, width - c)
        total = fma(_load64_part(a + 8 * c, left), _load64_part(b + 8 * c, left), total)
    return reduce_add(total)


@inner
def total_of(a: int, width: int) -> float:
    """Sum of a float64 array."""
    total = splat(0.0)
    for c in range(0, width, LANES):
        total += _load64_part(a + 8 * c, min(LANES, width - c))
    return reduce_add(total)
