"""Sums of v and v*t, and of t, over a chunk, channel by channel: what the backward and the jvp need of their second
input.

v is dy times the activation's slope; t = x*POWER - mean*POWER is x_hat up to the group's RATIO. Both are read once. In
float32 lanes at most four terms are added, and two such sums before float64 takes them: that loses at most 7u of the
sum of all |terms|, of the 8u that a gradient may be off, and runs at the speed of the memory (11 Gelem/s, 7 in
float64). Sums that are not finite that way are taken again in float64. The sum of t is taken in float64 calls only: it
is the part of the mean that one float64 does not hold.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .adders import add_kept, add_to
from .compile import inner
from .convert import itemsize, loader, storer, to_compute
from .memory import store_f64
from .simd import LANES, equal, first_lanes, fma, folded_sums, reduce_add, select, splat, store_folded, widen
from .touch import prefetch, touch_rows
from .words import FOLDED_SUM, SUMS

_CHAIN = 4
"""float32 terms of a lane that are added before float64 takes over."""
_STEPS = 8
"""The same of float64, before the rounding of their sum is kept; of columns that costs as much as four rows do."""
_AHEAD = 1024
"""Bytes ahead of which x and dy are asked for where a gate's operations, waiting for each other, leave no room to look
further: silu's backward takes 0.88 to 0.93 of the time from L3 and memory, 0.99 to 1.03 from L2."""
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")


@cache
def sum_kernels(v: str, x: str, compute: str, activation: str | None, keeps: bool) -> tuple[Any, ...]:
    """run(...) for one channel's runs, columns(...) for rows with accumulators element by element.

    With `keeps` run keeps float32 v, if it is told where: the last phase would make it again (0.78 of the backward's
    time for silu on arrays in cache, 0.83 for gelu; AVX-512).

    run leaves its sums folded, and unfold adds up those of 16 channels at once (a channel of 64 elements took 15 ns,
    half of them for that); careful takes those again that are not finite.
    """
    load_v, load_v_part = loader(v, compute)
    load_x, load_x_part = loader(x, compute)
    load_c, _ = loader(compute, compute)
    lanes = to_compute(compute)
    store_c, store_part_c, _ = storer(compute, compute)
    slope = activation_kernels(compute, activation)[1]
    double = compute == "float64"
    active = activation is not None
    waits = activation in ("silu", "gelu_tanh")
    v_size, x_size = itemsize(v), itemsize(x)
    c_size = 8 if double else 4
    together = _STEPS if double else _CHAIN  # rows of columns

    @inner
    def run_careful(
        pv: int, v_step: int, px: int, x_step: int, rows: int, count: int,
        p: Any, h: Any, m: Any, scale: float, shift: float, out: int, stride: int,
    ) -> None:  # fmt: skip
        # in float64, for sums that are not finite in float32
        power = widen(p)
        minus = widen(h) + widen(m)
        a = lanes(scale)
        b = lanes(shift)
        none = splat(0.0)
        sum_v = none
        sum_vt = none
        for r in range(rows):
            for j in range(0, count, LANES):
                here = min(LANES, count - j)
                x0 = load_x_part(px + r * x_step + j * x_size, here)
                v0 = load_v_part(pv + r * v_step + j * v_size, here)
                if active:
                    v0 = slope(v0, fma(fma(x0, p, h) + m, a, b))
                wide = select(first_lanes(here), widen(v0), none)
                sum_v += wide
                sum_vt = fma(wide, select(first_lanes(here), fma(widen(x0), power, minus), none), sum_vt)
        store_f64(out, 0, reduce_add(sum_v))
        store_f64(out + stride, 0, reduce_add(sum_vt))

    @inner
    def whole_terms(qv: int, qx: int, p: Any, h: Any, m: Any, a: Any, b: Any, kept: int) -> Any:
        # v and t of a vector
        t = fma(load_x(qx), p, h) + m
        v = load_v(qv)
        if active:
            if waits:
                prefetch(qx + _AHEAD)
                prefetch(qv + _AHEAD)
            v = slope(v, fma(t, a, b))
            if keeps and kept != 0:
                store_c(kept, v)
        return v, t

    @inner
    def last_terms(qv: int, qx: int, left: int, p: Any, h: Any, m: Any, a: Any, b: Any, kept: int) -> Any:
        # the same of less than a vector; zeros beyond the end: 0 * t must not bring in an infinite t
        t = select(first_lanes(left), fma(load_x_part(qx, left), p, h) + m, lanes(0.0))
        v = load_v_part(qv, left)
        if active:
            v = select(first_lanes(left), slope(v, fma(t, a, b)), lanes(0.0))
            if keeps and kept != 0:
                store_part_c(kept, v, left)
        return v, t

    @inner
    def run_single(
        pv: int, v_step: int, px: int, x_step: int, rows: int, count: int,
        p: Any, h: Any, m: Any, scale: float, shift: float, out: int, kept: int, k_step: int,
    ) -> None:  # fmt: skip
        a = lanes(scale)
        b = lanes(shift)
        none = lanes(0.0)
        if rows == 1 and count <= _CHAIN * LANES:  # 0.9 of a backward's time at 49 elements, beside what follows
            s = none
            u = none
            whole = count // LANES * LANES
            for j in range(0, whole, LANES):
                v0, t0 = whole_terms(pv + j * v_size, px + j * x_size, p, h, m, a, b, kept and kept + j * c_size)
                s += v0
                u = fma(v0, t0, u)
            if whole < count:
                at = kept and kept + whole * c_size
                v0, t0 = last_terms(pv + whole * v_size, px + whole * x_size, count - whole, p, h, m, a, b, at)
                s += v0
                u = fma(v0, t0, u)
            store_folded(out, widen(s))
            store_folded(out + FOLDED_SUM, widen(u))
            return
        sum_v = splat(0.0)
        sum_vt = sum_v
        for r in range(rows):
            qv = pv + r * v_step
            qx = px + r * x_step
            qk = kept and kept + r * k_step
            left = count
            while left > 0:
                s0 = none
                s1 = none
                u0 = none
                u1 = none
                pairs = min(left // (2 * LANES), _CHAIN)
                for _ in range(pairs):
                    v0, t0 = whole_terms(qv, qx, p, h, m, a, b, qk)
                    v1, t1 = whole_terms(
                        qv + LANES * v_size, qx + LANES * x_size, p, h, m, a, b, qk and qk + LANES * c_size
                    )
                    s0 += v0
                    s1 += v1
                    u0 = fma(v0, t0, u0)
                    u1 = fma(v1, t1, u1)
                    qv += 2 * LANES * v_size
                    qx += 2 * LANES * x_size
                    qk = qk and qk + 2 * LANES * c_size
                left -= 2 * LANES * pairs
                if pairs < _CHAIN:
                    while left > 0:
                        if left >= LANES:
                            v0, t0 = whole_terms(qv, qx, p, h, m, a, b, qk)
                        else:
                            v0, t0 = last_terms(qv, qx, left, p, h, m, a, b, qk)
                        # in turn: at most _CHAIN terms in each
                        s0, s1 = s1 + v0, s0
                        u0, u1 = fma(v0, t0, u1), u0
                        qv += LANES * v_size
                        qx += LANES * x_size
                        qk = qk and qk + LANES * c_size
                        left -= LANES
                sum_v += widen(s0 + s1)
                sum_vt += widen(u0 + u1)
        store_folded(out, sum_v)
        store_folded(out + FOLDED_SUM, sum_vt)

    @inner
    def run_double(
        pv: int, v_step: int, px: int, x_step: int, rows: int, count: int,
        p: Any, h: Any, m: Any, scale: float, shift: float, out: int, kept: int, k_step: int,
    ) -> None:  # fmt: skip
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
                stop = max(left - _STEPS * 2 * LANES, 0)
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
                    t0 = fma(x0, p, h) + m
                    t1 = fma(x1, p, h) + m
                    sum_v0 += w0
                    sum_v1 += w1
                    sum_vt0 = fma(w0, t0, sum_vt0)
                    sum_vt1 = fma(w1, t1, sum_vt1)
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
                        t0 = fma(x0, p, h) + m
                    else:
                        x0 = load_x_part(qx, left)
                        v0 = load_v_part(qv, left)
                        if active:
                            v0 = slope(v0, fma(fma(x0, p, h) + m, a, b))
                        # zeros beyond the end: 0 * t must not bring in an infinite t
                        t0 = select(first_lanes(left), fma(x0, p, h) + m, zero)
                    w0 = widen(v0)
                    sum_v0 += w0
                    sum_vt0 = fma(w0, t0, sum_vt0)
                    sum_t += t0
                    qv += LANES * v_size
                    qx += LANES * x_size
                    left -= LANES
                if steps >= _STEPS:
                    steps = 0
                    part = sum_v0 + sum_v1
                    totals, totals_lost = add_kept(totals, totals_lost, part)
                    part = sum_vt0 + sum_vt1
                    totals_vt, totals_vt_lost = add_kept(totals_vt, totals_vt_lost, part)
                    totals_t, totals_t_lost = add_kept(totals_t, totals_t_lost, sum_t)
                    sum_v0 = zero
                    sum_v1 = zero
                    sum_vt0 = zero
                    sum_vt1 = zero
                    sum_t = zero
        sum_v0 += totals_lost
        sum_v1 += totals
        sum_vt0 += totals_vt_lost
        sum_vt1 += totals_vt
        sum_t = (sum_t + totals_t_lost) + totals_t
        store_folded(out, sum_v0 + sum_v1)
        store_folded(out + FOLDED_SUM, sum_vt0 + sum_vt1)
        store_folded(out + 2 * FOLDED_SUM, sum_t)

    @inner
    def unfold(folded: int, channels: int, out: int, stride: int) -> bool:
        # sums of up to 16 channels; whether all are finite, of which float64 ones need no account
        for k in range(SUMS if double else SUMS - 1):
            _store64_part(out + k * stride, folded_sums(folded + k * FOLDED_SUM), channels)
        if double:
            return True
        s = _load64_part(out, channels)
        t = _load64_part(out + stride, channels)
        return reduce_add((s - s) + (t - t)) == 0.0

    @inner
    def some_columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, own: int, each64: int, coefficients: int,
        each: int,
    ) -> None:  # fmt: skip
        # own: float64 arrays of the three sums, and in float64 what they lost
        left = cols
        while left > 0:
            sum_v = lanes(0.0)
            sum_vt = sum_v
            sum_t = sum_v
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = p
            b = p
            if active:
                a = load_c(coefficients + 3 * each)
                b = load_c(coefficients + 4 * each)
            for r in range(rows):
                if left >= LANES:
                    xr = load_x(px + r * x_step)
                    vr = load_v(pv + r * v_step)
                else:
                    xr = load_x_part(px + r * x_step, left)
                    vr = load_v_part(pv + r * v_step, left)
                t = fma(xr, p, h) + m
                if active:
                    vr = slope(vr, fma(fma(xr, p, h) + m, a, b))
                sum_v += vr
                sum_vt = fma(vr, t, sum_vt)
                if double:
                    sum_t += t
            if double:
                add_to(own, own + 3 * each64, sum_v)
                add_to(own + each64, own + 4 * each64, sum_vt)
                add_to(own + 2 * each64, own + 5 * each64, sum_t)
            else:
                _store64(own, _load64(own) + widen(sum_v))
                _store64(own + each64, _load64(own + each64) + widen(sum_vt))
            own += 8 * LANES
            coefficients += LANES * c_size
            px += LANES * x_size
            pv += LANES * v_size
            left -= LANES

    @inner
    def careful_columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, again: int, each64: int, coefficients: int,
        each: int,
    ) -> None:  # fmt: skip
        for r in range(rows):
            for j in range(0, cols, LANES):
                here = min(LANES, cols - j)
                x0 = load_x_part(px + r * x_step + j * x_size, here)
                v0 = load_v_part(pv + r * v_step + j * v_size, here)
                at = coefficients + j * c_size
                p = load_c(at)
                h = load_c(at + each)
                m = load_c(at + 2 * each)
                if active:
                    v0 = slope(v0, fma(fma(x0, p, h) + m, load_c(at + 3 * each), load_c(at + 4 * each)))
                wide = widen(v0)
                t = fma(widen(x0), widen(p), widen(h) + widen(m))
                _store64(again + 8 * j, _load64(again + 8 * j) + wide)
                _store64(again + each64 + 8 * j, fma(wide, t, _load64(again + each64 + 8 * j)))

    @inner
    def columns(
        pv: int, v_step: int, px: int, x_step: int, rows: int, cols: int, own: int, each64: int, coefficients: int,
        each: int, touched: int,
    ) -> None:  # fmt: skip
        for k in range(2 * SUMS if double else 2):
            for j in range(0, cols, LANES):
                _store64(own + k * each64 + 8 * j, splat(0.0))
        done = 0
        while done < rows:
            here = min(together, rows - done)
            pv_here = pv + done * v_step
            px_here = px + done * x_step
            touch_rows(pv_here, v_step, here, cols * v_size, touched // 2)
            touch_rows(px_here, x_step, here, cols * x_size, touched // 2)
            if here == together:
                some_columns(pv_here, v_step, px_here, x_step, together, cols, own, each64, coefficients, each)
            else:
                some_columns(pv_here, v_step, px_here, x_step, here, cols, own, each64, coefficients, each)
            done += here
        if not double:
            top = splat(0.0)
            for j in range(0, cols, LANES):
                # what is not finite becomes a NaN, which stays one
                s = _load64_part(own + 8 * j, min(LANES, cols - j))
                t = _load64_part(own + each64 + 8 * j, min(LANES, cols - j))
                top += (s - s) + (t - t)
            if reduce_add(top) != 0.0:
                # in float64, for those that are not finite: the others keep their bits, one may be of another group
                again = own + 2 * each64
                for k in range(2):
                    for j in range(0, cols, LANES):
                        _store64(again + k * each64 + 8 * j, splat(0.0))
                careful_columns(pv, v_step, px, x_step, rows, cols, again, each64, coefficients, each)
                for j in range(0, cols, LANES):
                    s = _load64(own + 8 * j)
                    t = _load64(own + each64 + 8 * j)
                    finite = equal((s - s) + (t - t), splat(0.0))
                    _store64(own + 8 * j, select(finite, s, _load64(again + 8 * j)))
                    _store64(own + each64 + 8 * j, select(finite, t, _load64(again + each64 + 8 * j)))

    return run_double if double else run_single, run_careful, unfold, columns


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
