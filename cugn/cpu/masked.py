"""Loops under a mask: moments of the elements that are kept, their count. The others may be NaN."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from .adders import add_kept, add_to
from .block_moments import BLOCK, about, merge, store_partial, two_sum_error
from .compile import inner
from .convert import loader, loader_up_to, storer, to_compute
from .exact import array_at
from .mask_memory import mask_at
from .memory import store_f64
from .simd import (
    LANES,
    add_bytes,
    as_float64,
    both,
    count_lanes,
    first_lanes,
    fma,
    less,
    narrow,
    no_bytes,
    reduce_add,
    reduce_max,
    select,
    splat,
    vector_max,
    widen,
    without,
)
from .touch import touch_rows
from .words import PARTIAL_BYTES

_ROWS = 8
SHORT = 256
"""Elements of a channel up to which channels are taken one after another, and finished 16 at a time."""
_STEPS = 16  # additions of float64 lanes before the rounding of their sum is kept
_load64, _ = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]


@inner
def count_kept(pm: int, m_step: int, rows: int, cols: int) -> int:
    """Number of elements that are kept."""
    count = 0
    for r in range(rows):
        for j in range(0, cols, LANES):
            count += count_lanes(mask_at(pm + r * m_step + j, cols - j))
    return count


@inner
def count_columns(pm: int, m_step: int, rows: int, cols: int, out: int) -> None:
    """Number of elements that are kept in each column, as float64; in bytes as far as they go."""
    for j in range(0, cols, LANES):
        total = splat(0.0)
        for first in range(0, rows, 255):
            count = no_bytes()
            for r in range(first, min(first + 255, rows)):
                count = add_bytes(count, mask_at(pm + r * m_step + j, cols - j))
            total += as_float64(count)
        _store64(out + 8 * j, total)


@inner
def finish_columns(scratch: int, cols: int) -> None:
    """Shift, sum and square of each column into its mean in two parts and m2; the counts are the fourth array."""
    padded = 8 * ((cols + LANES - 1) // LANES * LANES)
    for j in range(scratch, scratch + 8 * cols, 8 * LANES):
        shift = _load64(j)
        s = _load64(j + padded)
        n = _load64(j + 3 * padded)
        high, low, m2 = about(shift, s, _load64(j + 2 * padded), vector_max(n, splat(1.0)))  # s is 0 where n is
        _store64(j, high)
        _store64(j + padded, low)
        _store64(j + 2 * padded, m2)


@inner
def merge_columns(counts: int, means: int, lows: int, squares: int, width: int, out: int) -> None:
    """One partial of `width` columns whose fields are float64 arrays; some may have nothing that is kept."""
    zero = splat(0.0)
    infinite = splat(-math.inf)
    total = zero
    top = infinite
    for j in range(0, width, LANES):
        n = array_at(counts + 8 * j, width - j)
        total += n
        top = vector_max(top, select(less(zero, n), array_at(means + 8 * j, width - j), infinite))
    count = reduce_add(total)
    if count == 0.0:
        store_partial(out, 0.0, 0.0, 0.0, 0.0)
        return
    reference = reduce_max(top)
    shift = splat(reference)
    total = zero
    for j in range(0, width, LANES):
        n = array_at(counts + 8 * j, width - j)
        d = (array_at(means + 8 * j, width - j) - shift) + array_at(lows + 8 * j, width - j)
        total += select(less(zero, n), n * d, zero)
    offset = reduce_add(total) / count
    high = reference + offset
    low = two_sum_error(reference, offset, high)
    shift = splat(high)
    rest = splat(low)
    total = zero
    for j in range(0, width, LANES):
        n = array_at(counts + 8 * j, width - j)
        d = (array_at(means + 8 * j, width - j) - shift) + (array_at(lows + 8 * j, width - j) - rest)
        total += select(less(zero, n), fma(n * d, d, array_at(squares + 8 * j, width - j)), zero)
    store_partial(out, count, high, low, reduce_add(total))


@cache
def masked_kernels(dtype: str, compute: str, itemsize: int) -> tuple[Any, Any, Any, Any]:
    """Moments under a mask, which is a pair (address, bytes between rows) after x.

    rect(p, rows, row_bytes, pm, m_step, cols, scale, scratch, out) -> one partial; columns(... without out ...) ->
    float64 arrays of mean, its low part, m2 and count of each column; runs(p, pm, channels, count, scratch) -> the
    same of short channels; largest(p, rows, row_bytes, pm, m_step, cols).
    """
    load = loader_up_to(dtype, compute)
    double = compute == "float64"
    lanes = to_compute(compute)
    block = BLOCK[compute]
    step = LANES * itemsize

    @inner
    def load_shift(address: int) -> Any:
        if double:
            return _load64(address)
        return narrow(_load64(address))

    @inner
    def lanes_at(p: int, left: int) -> Any:
        return widen(load(p, left))

    @inner
    def deviation(p: int, left: int, mask: Any, factor: Any, minus: Any, shift: Any) -> Any:
        # x - shift, 0 where the mask is false; in float32 lanes, where shift is one of the values, before they are wide
        if double:
            return select(mask, fma(lanes_at(p, left), factor, minus), splat(0.0))
        return widen(select(mask, load(p, left), shift)) + minus

    @inner
    def first_kept(p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int) -> float:
        for r in range(rows):
            for j in range(0, cols, LANES):
                mask = mask_at(pm + r * m_step + j, cols - j)
                if count_lanes(mask) > 0:
                    return reduce_max(
                        select(mask, lanes_at(p + r * row_bytes + j * itemsize, cols - j), splat(-math.inf))
                    )
        return 0.0

    @inner
    def mean_estimate(p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, scale: float) -> float:
        factor = splat(scale)
        zero = splat(0.0)
        total = zero
        count = 0
        for r in range(rows):
            for j in range(0, cols, LANES):
                mask = mask_at(pm + r * m_step + j, cols - j)
                x = lanes_at(p + r * row_bytes + j * itemsize, cols - j)
                total += select(mask, x * factor, zero)
                count += count_lanes(mask)
        return reduce_add(total) / max(count, 1)

    @inner
    def block_moments(
        p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, scale: float, out: int
    ) -> None:
        if double:
            shift = mean_estimate(p, rows, row_bytes, pm, m_step, cols, scale)
        else:
            shift = first_kept(p, rows, row_bytes, pm, m_step, cols)
        factor = splat(scale)
        minus = splat(-shift)
        fill = lanes(shift)
        zero = splat(0.0)
        total = zero
        square = zero
        kept_total = zero
        lost_total = zero
        kept_square = zero
        lost_square = zero
        count = 0
        steps = 0
        for r in range(rows):
            q = p + r * row_bytes
            qm = pm + r * m_step
            left = cols
            while left > 0:
                mask = mask_at(qm, left)
                d = deviation(q, left, mask, factor, minus, fill)
                count += count_lanes(mask)
                total += d
                square = fma(d, d, square)
                q += step
                qm += LANES
                left -= LANES
                if double:
                    steps += 1
                    if steps == _STEPS:
                        steps = 0
                        kept_total, lost_total = add_kept(kept_total, lost_total, total)
                        kept_square, lost_square = add_kept(kept_square, lost_square, square)
                        total = zero
                        square = zero
        if count == 0:
            store_partial(out, 0.0, 0.0, 0.0, 0.0)
            return
        if double:
            total = (total + lost_total) + kept_total
            square = (square + lost_square) + kept_square
        n = float(count)
        s = reduce_add(total)
        offset = s / n
        high = shift + offset
        m2 = reduce_add(square) - s * offset
        if m2 < 0.0:
            m2 = 0.0
        store_partial(out, n, high, two_sum_error(shift, offset, high), m2)

    @inner
    def rect(
        p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, scale: float, scratch: int, out: int
    ) -> None:
        # blocks of whole rows, or of parts of one
        width = min(cols, block)
        together = max(block // cols, 1)
        count = 0
        for r in range(0, rows, together):
            height = min(together, rows - r)
            for start in range(0, cols, width):
                here = min(width, cols - start)
                q = p + r * row_bytes + start * itemsize
                qm = pm + r * m_step + start
                block_moments(q, height, row_bytes, qm, m_step, here, scale, scratch + count * PARTIAL_BYTES)
                count += 1
        merge(scratch, count, PARTIAL_BYTES, out)

    @inner
    def shift_columns(p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, shifts: int) -> None:
        # the first element of each column that is kept, 0 where there is none
        for j in range(0, cols, LANES):
            shift = splat(0.0)
            missing = first_lanes(min(LANES, cols - j))
            for r in range(rows):
                mask = both(mask_at(pm + r * m_step + j, cols - j), missing)
                if count_lanes(mask) > 0:
                    shift = select(mask, lanes_at(p + r * row_bytes + j * itemsize, cols - j), shift)
                    missing = without(missing, mask)
                    if count_lanes(missing) == 0:
                        break
            _store64(shifts + 8 * j, shift)

    @inner
    def mean_columns(
        p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, factor: Any, counts: int, shifts: int,
        touched: int,
    ) -> None:  # fmt: skip
        touch_rows(p, row_bytes, rows, cols * itemsize, touched * rows)  # a chunk stays in L2
        for j in range(0, cols, LANES):
            total = splat(0.0)
            for r in range(rows):
                mask = mask_at(pm + r * m_step + j, cols - j)
                x = lanes_at(p + r * row_bytes + j * itemsize, cols - j)
                total += select(mask, x * factor, splat(0.0))
            _store64(shifts + 8 * j, total / vector_max(_load64(counts + 8 * j), splat(1.0)))

    @inner
    def columns(
        p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int, scale: float, scratch: int, touched: int
    ) -> None:
        # scratch: float64 arrays of shift (then mean), sum (then its low part), square, count; what the sums lost
        padded = 8 * ((cols + LANES - 1) // LANES * LANES)
        shifts = scratch
        sums = shifts + padded
        squares = sums + padded
        counts = squares + padded
        lost = counts + padded
        factor = splat(scale)
        zero = splat(0.0)
        count_columns(pm, m_step, rows, cols, counts)
        if double:
            mean_columns(p, rows, row_bytes, pm, m_step, cols, factor, counts, shifts, touched)
        else:
            shift_columns(p, rows, row_bytes, pm, m_step, cols, shifts)
        for j in range(0, cols, LANES):
            _store64(sums + 8 * j, zero)
            _store64(squares + 8 * j, zero)
            if double:
                _store64(lost + 8 * j, zero)
                _store64(lost + padded + 8 * j, zero)
        for r0 in range(0, rows, _ROWS):
            here = min(_ROWS, rows - r0)
            touch_rows(p + r0 * row_bytes, row_bytes, here, cols * itemsize, touched)
            q = p + r0 * row_bytes
            qm = pm + r0 * m_step
            left = cols
            j = 0
            while left > 0:
                s = zero
                square = zero
                minus = zero - _load64(shifts + j)
                fill = load_shift(shifts + j)
                for r in range(here):
                    mask = mask_at(qm + r * m_step, left)
                    d = deviation(q + r * row_bytes, left, mask, factor, minus, fill)
                    s += d
                    square = fma(d, d, square)
                if double:
                    add_to(sums + j, lost + j, s)
                    add_to(squares + j, lost + padded + j, square)
                else:
                    _store64(sums + j, _load64(sums + j) + s)
                    _store64(squares + j, _load64(squares + j) + square)
                q += step
                qm += LANES
                j += 8 * LANES
                left -= LANES
        if double:
            for j in range(0, 8 * cols, 8 * LANES):
                _store64(sums + j, _load64(sums + j) + _load64(lost + j))
                _store64(squares + j, _load64(squares + j) + _load64(lost + padded + j))
        finish_columns(scratch, cols)

    @inner
    def runs(p: int, pm: int, channels: int, count: int, scratch: int) -> None:
        # each channel a run of at most SHORT elements, one after another; scratch and results as those of columns
        padded = 8 * ((channels + LANES - 1) // LANES * LANES)
        shifts = scratch
        sums = shifts + padded
        squares = sums + padded
        counts = squares + padded
        zero = splat(0.0)
        for c in range(channels):
            q = p + c * count * itemsize
            qm = pm + c * count
            if double:
                shift = mean_estimate(q, 1, 0, qm, 0, count, 1.0)
            else:
                shift = first_kept(q, 1, 0, qm, 0, count)
            minus = splat(-shift)
            fill = lanes(shift)
            total = zero
            square = zero
            kept = 0
            for j in range(0, count, LANES):
                mask = mask_at(qm + j, count - j)
                d = deviation(q + j * itemsize, count - j, mask, splat(1.0), minus, fill)
                total += d
                square = fma(d, d, square)
                kept += count_lanes(mask)
            store_f64(shifts, c, shift)
            store_f64(sums, c, reduce_add(total))
            store_f64(squares, c, reduce_add(square))
            store_f64(counts, c, float(kept))
        finish_columns(scratch, channels)

    @inner
    def largest(p: int, rows: int, row_bytes: int, pm: int, m_step: int, cols: int) -> float:
        best = splat(0.0)
        for r in range(rows):
            for j in range(0, cols, LANES):
                x = lanes_at(p + r * row_bytes + j * itemsize, cols - j)
                kept = select(mask_at(pm + r * m_step + j, cols - j), x, splat(0.0))
                best = vector_max(best, vector_max(kept, splat(0.0) - kept))
        return reduce_max(best)

    return rect, columns, runs, largest


@cache
def kept_sums(x: str, compute: str, itemsize: int) -> tuple[Any, Any]:
    """Count of the kept elements, and the sum of their t: run(...) for one channel, columns(...).

    t = fma(x, POWER, -mean*POWER) as in `sums.py`. Needed in float64 calls, and where the mean was given: it may be
    that of other elements than the mask keeps.
    """
    load = loader_up_to(x, compute)
    load_c, _ = loader(compute, compute)
    c_size = 8 if compute == "float64" else 4

    @inner
    def t_at(p: int, pm: int, left: int, power: Any, high: Any, low: Any) -> Any:
        return select(mask_at(pm, left), fma(widen(load(p, left)), power, high) + low, splat(0.0))

    @inner
    def run(
        px: int, x_step: int, pm: int, m_step: int, rows: int, count: int, p: Any, h: Any, m: Any, out: int, stride: int
    ) -> None:
        store_f64(out + 3 * stride, 0, float(count_kept(pm, m_step, rows, count)))
        power = widen(p)
        high = widen(h)
        low = widen(m)
        total = splat(0.0)
        kept = splat(0.0)
        lost = splat(0.0)
        steps = 0
        for r in range(rows):
            for j in range(0, count, LANES):
                total += t_at(px + r * x_step + j * itemsize, pm + r * m_step + j, count - j, power, high, low)
                steps += 1
                if steps == _STEPS:
                    steps = 0
                    kept, lost = add_kept(kept, lost, total)
                    total = splat(0.0)
        store_f64(out + 2 * stride, 0, reduce_add((total + lost) + kept))

    @inner
    def columns(
        px: int, x_step: int, pm: int, m_step: int, rows: int, cols: int, own: int, each64: int, coefficients: int,
        each: int,
    ) -> None:  # fmt: skip
        # own: float64 arrays of counts, sums of t, and what these lost
        count_columns(pm, m_step, rows, cols, own)
        for j in range(0, cols, LANES):
            power = widen(load_c(coefficients + j * c_size))
            high = widen(load_c(coefficients + each + j * c_size))
            low = widen(load_c(coefficients + 2 * each + j * c_size))
            sums = own + each64 + 8 * j
            lost = own + 2 * each64 + 8 * j
            _store64(sums, splat(0.0))
            _store64(lost, splat(0.0))
            for r0 in range(0, rows, _ROWS):
                total = splat(0.0)
                for r in range(r0, min(r0 + _ROWS, rows)):
                    at = px + r * x_step + j * itemsize
                    total += t_at(at, pm + r * m_step + j, cols - j, power, high, low)
                add_to(sums, lost, total)

    return run, columns
