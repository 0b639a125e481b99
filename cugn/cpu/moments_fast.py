"""Moments of a block in float32 lanes where that is good enough, which the result itself tells.

float64 lanes cost 8 operations for 16 elements, these 3: statistics of a group in cache take half the time.

d = x - shift with a shift near the mean is exact where mean/std is large, and rounded by u|d| elsewhere. Sums of at
most 8 values a lane go on to float64, so that no sum is off by more than 1u of itself. The block is taken again in
float64 where the shift was far from the mean (an outlier among the first values: the sums would hold more of it
than of the variance), or where squares left float32's range (1e20, 1e-25, 3e38, NaN) or are zero (constant).
"""

from __future__ import annotations

from functools import cache
from typing import Any

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
    narrow_scalar,
    reduce_add,
    select,
    splat,
    store_f64,
    widen,
    widen_scalar,
)

_STEPS = 8
_FIRST = 64  # values whose mean is the shift
_LEAST, _MOST = 2.0**-60, 2.0**100  # mean squares between which no float32 square that matters under- or overflows
_load64, _ = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]
_load32, _ = loader("float32", "float32")
_store32 = storer("float32", "float32")[0]


@cache
def fast_kernels(dtype: str, itemsize: int) -> tuple[Any, Any]:
    """block(p, rows, row_bytes, cols, out) and columns(p, rows, row_bytes, cols, scratch): whether they were good
    enough.
    """
    load, load_part = loader(dtype, "float32")
    step = LANES * itemsize

    @inner
    def block(p: int, rows: int, row_bytes: int, cols: int, out: int) -> bool:
        zero = splat(narrow_scalar(0.0))
        first = min(cols, _FIRST)
        share = splat(narrow_scalar(1.0 / first))
        start = zero
        for j in range(0, first, LANES):
            start = fma(load_part(p + j * itemsize, min(first - j, LANES)), share, start)
        shift32 = reduce_add(start)
        shift = splat(shift32)
        total = splat(0.0)
        square = splat(0.0)
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
            q = p + r * row_bytes
            left = cols
            while left > 0:
                stop = max(left - _STEPS * 4 * LANES, 0)
                while left - stop >= 4 * LANES:
                    d0 = load(q) - shift
                    d1 = load(q + step) - shift
                    d2 = load(q + 2 * step) - shift
                    d3 = load(q + 3 * step) - shift
                    s0 += d0
                    s1 += d1
                    s2 += d2
                    s3 += d3
                    q0 = fma(d0, d0, q0)
                    q1 = fma(d1, d1, q1)
                    q2 = fma(d2, d2, q2)
                    q3 = fma(d3, d3, q3)
                    q += 4 * step
                    left -= 4 * LANES
                    steps += 1
                if left - stop >= 2 * LANES:
                    d2 = load(q) - shift
                    d3 = load(q + step) - shift
                    s2 += d2
                    s3 += d3
                    q2 = fma(d2, d2, q2)
                    q3 = fma(d3, d3, q3)
                    q += 2 * step
                    left -= 2 * LANES
                if left - stop >= LANES:
                    d1 = load(q) - shift
                    s1 += d1
                    q1 = fma(d1, d1, q1)
                    q += step
                    left -= LANES
                if left > stop:
                    d0 = select(first_lanes(left), load_part(q, left) - shift, zero)
                    s0 += d0
                    q0 = fma(d0, d0, q0)
                    left = stop
                steps += 1
                if steps >= _STEPS:
                    steps = 0
                    total += widen(s0 + s1) + widen(s2 + s3)
                    square += widen(q0 + q1) + widen(q2 + q3)
                    s0 = zero
                    s1 = zero
                    s2 = zero
                    s3 = zero
                    q0 = zero
                    q1 = zero
                    q2 = zero
                    q3 = zero
        total += widen(s0 + s1) + widen(s2 + s3)
        square += widen(q0 + q1) + widen(q2 + q3)
        n = float(rows * cols)
        all_d = reduce_add(total)
        all_squares = reduce_add(square)
        offset = all_d / n
        m2 = all_squares - all_d * offset
        if not (5.0 * m2 >= all_squares and _LEAST * n < all_squares < _MOST * n):
            return False
        base = widen_scalar(shift32)
        high = base + offset
        kept = high - base
        store_f64(out, 0, n)
        store_f64(out, 1, high)
        store_f64(out, 2, (base - (high - kept)) + (offset - kept))
        store_f64(out, 3, m2)
        return True

    @inner
    def columns(p: int, rows: int, row_bytes: int, cols: int, scratch: int) -> bool:
        # scratch: means and their low parts (the shifts and sums, on the way) and m2 of each column, in float64
        padded = (cols + LANES - 1) // LANES * LANES
        shifts = scratch
        sums = shifts + 8 * padded
        squares = sums + 8 * padded
        first = min(rows, _STEPS)
        share = splat(narrow_scalar(1.0 / first))
        zero = splat(narrow_scalar(0.0))
        for j in range(0, cols, LANES):
            left = min(cols - j, LANES)
            start = zero
            for r in range(first):
                start = fma(load_part(p + r * row_bytes + j * itemsize, left), share, start)
            _store32(shifts + 4 * j, start)
            _store64(sums + 8 * j, splat(0.0))
            _store64(squares + 8 * j, splat(0.0))
        for r0 in range(0, rows, _STEPS):
            here = min(_STEPS, rows - r0)
            q = p + r0 * row_bytes
            for j in range(0, cols, LANES):
                shift = _load32(shifts + 4 * j)
                s0 = zero
                q0 = zero
                at = q + j * itemsize
                if cols - j >= LANES:
                    if here == _STEPS:
                        for r in range(_STEPS):
                            d = load(at + r * row_bytes) - shift
                            s0 += d
                            q0 = fma(d, d, q0)
                    else:
                        for r in range(here):
                            d = load(at + r * row_bytes) - shift
                            s0 += d
                            q0 = fma(d, d, q0)
                else:
                    for r in range(here):
                        d = load_part(at + r * row_bytes, cols - j) - shift
                        s0 += d
                        q0 = fma(d, d, q0)
                _store64(sums + 8 * j, _load64(sums + 8 * j) + widen(s0))
                _store64(squares + 8 * j, _load64(squares + 8 * j) + widen(q0))
        n = splat(float(rows))
        least = splat(_LEAST * rows)
        most = splat(_MOST * rows)
        five = splat(5.0)
        good = True
        for j in range(0, cols, LANES):
            s = _load64(sums + 8 * j)
            square = _load64(squares + 8 * j)
            m2 = square - s * (s / n)
            fine = both(less_equal(square, five * m2), both(less(least, square), less(square, most)))
            if cols - j < LANES:
                fine = either(fine, less(n, widen_lane_numbers(j, cols, n)))
            good = good and all_lanes(fine)
        if not good:
            return False
        # from the end: a float64 mean takes the place of two float32 shifts
        j = (cols - 1) // LANES * LANES
        while j >= 0:
            shift64 = widen(_load32(shifts + 4 * j))
            s = _load64(sums + 8 * j)
            offset = s / n
            high = shift64 + offset
            kept = high - shift64
            _store64(shifts + 8 * j, high)
            _store64(sums + 8 * j, (shift64 - (high - kept)) + (offset - kept))
            _store64(squares + 8 * j, _load64(squares + 8 * j) - s * offset)
            j -= LANES
        return True

    return block, columns


@inner
def widen_lane_numbers(j: int, cols: int, n: Any) -> Any:
    """Lanes larger than n beyond the last column, zero before it."""
    return select(first_lanes(cols - j), n - n, n + n)
