"""Kernels for count, mean and sum of squared deviations of a block of x, and their merge.

A partial is four float64: count, mean (high part), mean (low part), m2. A block is read from memory once, and once more
from cache where the first way lost too much.

float32 lanes (float16, bfloat16, float32, small integers): float64 sums of x and x*x, 12 Gelem/s; where the mean is
more than 11 standard deviations, of d = x - shift and d*d, where shift is the block's first element, 8.7 Gelem/s. The
variance loses at most a factor `elements of the block` of float64's 2^-53 then, so BLOCK = 4096 keeps 1e-12. float64
lanes: sums of d and d*d about the mean of the block's first elements, and about the mean that this finds where more
than a bit of m2 cancels; compensated every STEPS additions. x is multiplied by a power of two on the way, which is 1
except where squares left float64's range. Merging takes the partials in order: their means relative to the first
one's, then m2 about the common mean.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .adders import add_kept, add_to
from .compile import general, inner
from .convert import loader, loader_up_to, storer
from .memory import bits_float, float_bits, load_f64, store_f64
from .simd import LANES, first_lanes, fma, less, reduce_add, reduce_max, rounding, select, splat, vector_abs, widen
from .touch import touch_rows
from .words import PARTIAL_BYTES

BLOCK = {"float32": 4096, "float64": 2048}
PLAIN = 128.0
"""Sum of squares / m2 up to which both are taken about zero: the values' mean is up to 11 standard deviations."""

_load64, _load64_part = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]
# rows taken together by the column kernel: eight streams, accumulators in L1 read and written once for all of
# them
_ROWS = 8
STEPS = 8  # additions of float64 lanes before the rounding of their sum is kept


@inner
def store_partial(where: int, count: float, high: float, low: float, m2: float) -> None:
    """Write one partial."""
    store_f64(where, 0, count)
    store_f64(where, 1, high)
    store_f64(where, 2, low)
    store_f64(where, 3, m2)


@inner
def copy_partial(source: int, target: int) -> None:
    """Copy one partial."""
    store_partial(target, load_f64(source, 0), load_f64(source, 1), load_f64(source, 2), load_f64(source, 3))


@inner
def two_sum_error(a: float, b: float, total: float) -> float:
    """The rounding error of total = a + b, exactly."""
    kept = total - a
    return (a - (total - kept)) + (b - kept)


@general
def merge(parts: int, count: int, step: int, out: int) -> None:
    """One partial of `count` ones that lie `step` bytes apart."""
    if count == 1:
        copy_partial(parts, out)
        return
    total = 0.0
    reference = 0.0
    for k in range(count):
        n = load_f64(parts + k * step, 0)
        if total == 0.0 and n > 0.0:
            reference = load_f64(parts + k * step, 1)
        total += n
    if total == 0.0:
        store_partial(out, 0.0, load_f64(parts, 1), 0.0, 0.0)
        return
    offset, lost = 0.0, 0.0
    for k in range(count):
        part = parts + k * step
        n = load_f64(part, 0)
        if n > 0.0:
            term = n * ((load_f64(part, 1) - reference) + load_f64(part, 2))
            moved = offset + term
            lost += two_sum_error(offset, term, moved)
            offset = moved
    offset = (offset + lost) / total
    high = reference + offset
    low = two_sum_error(reference, offset, high)
    m2, lost = 0.0, 0.0
    for k in range(count):
        part = parts + k * step
        n = load_f64(part, 0)
        if n > 0.0:
            distance = (load_f64(part, 1) - high) + (load_f64(part, 2) - low)
            term = fma(n * distance, distance, load_f64(part, 3))
            moved = m2 + term
            lost += two_sum_error(m2, term, moved)
            m2 = moved
    store_partial(out, total, high, low, m2 + lost)


@inner
def about(shift: Any, s: Any, square: Any, n: Any) -> Any:
    """Mean in two parts and m2 from the sums of d = x - shift and of d*d."""
    offset = s / n
    high = shift + offset
    m2 = square - s * offset
    return high, rounding(shift, offset, high), select(less(m2, splat(0.0)), splat(0.0), m2)  # so that a NaN stays one


@inner
def about_zero(s: Any, square: Any, n: Any, inverse: Any) -> Any:
    """The same from the sums of x and of x*x. `inverse` is 1/n: a second division would take as long as 16 sums."""
    mean = s / n
    minus = splat(0.0) - mean
    return mean, fma(minus, n, s) * inverse, fma(minus, s, square)


@cache
def column_sums(dtype: str, compute: str) -> tuple[Any, Any]:
    """lanes_at(p, left): 16 columns of a row, or what is left of it.

    sums_about(p, rows, row_bytes, left, factor, shift): of such columns the sums of d = x*factor - shift and of d*d,
    with what is lost by adding every STEPS rows.
    """
    load = loader_up_to(dtype, compute)

    @inner
    def lanes_at(p: int, left: int) -> Any:
        return widen(load(p, left))

    @inner
    def sums_about(p: int, rows: int, row_bytes: int, left: int, factor: Any, shift: Any) -> Any:
        zero = splat(0.0)
        minus = zero - shift
        sums = zero
        squares = zero
        lost = zero
        squares_lost = zero
        for done in range(0, rows, STEPS):
            s = zero
            square = zero
            for r in range(done, min(done + STEPS, rows)):
                d = fma(lanes_at(p + r * row_bytes, left), factor, minus)
                s += d
                square = fma(d, d, square)
            sums, lost = add_kept(sums, lost, s)
            squares, squares_lost = add_kept(squares, squares_lost, square)
        return sums + lost, squares + squares_lost

    return lanes_at, sums_about


@cache
def block_kernels(dtype: str, compute: str, itemsize: int) -> tuple[Any, Any]:
    """rect(p, rows, row_bytes, cols, scale, scratch, out) -> one partial; columns(...) -> mean and m2 of each."""
    load, load_part = loader(dtype, compute)
    lanes_at, sums_about = column_sums(dtype, compute)
    double = compute == "float64"
    block = BLOCK[compute]
    step = LANES * itemsize

    @inner
    def head_mean(p: int, cols: int, scale: float) -> float:
        # of the first elements: near enough to the mean that little cancels
        count = min(cols, 4 * LANES)
        total = splat(0.0)
        for j in range(0, count, LANES):
            total = fma(widen(load_part(p + j * itemsize, min(LANES, count - j))), splat(scale), total)
        # in 37 bits: differences of integers from it are exact, so that their mean is what it is, and z = 0 is 0
        return bits_float(float_bits(reduce_add(total) / count) & -65536)

    @inner
    def plain_moments(p: int, rows: int, row_bytes: int, cols: int, out: int) -> bool:
        # sums of x and x*x as they are; False where the variance would lose more than 7 of their bits
        sum0 = splat(0.0)
        sum1 = sum0
        square0 = sum0
        square1 = sum0
        for r in range(rows):
            q = p + r * row_bytes
            left = cols
            while left >= 2 * LANES:
                x0 = widen(load(q))
                x1 = widen(load(q + step))
                sum0 += x0
                sum1 += x1
                square0 = fma(x0, x0, square0)
                square1 = fma(x1, x1, square1)
                q += 2 * step
                left -= 2 * LANES
            while left > 0:
                x0 = widen(load(q)) if left >= LANES else widen(load_part(q, left))
                sum0 += x0
                square0 = fma(x0, x0, square0)
                q += step
                left -= LANES
        n = float(rows * cols)
        total = reduce_add(sum0 + sum1)
        mean = total / n
        squares = reduce_add(square0 + square1)
        m2 = fma(-total, mean, squares)
        store_partial(out, n, mean, fma(-mean, n, total) / n, m2)
        return not (m2 * PLAIN < squares)

    @inner
    def shifted_moments(p: int, rows: int, row_bytes: int, cols: int, scale: float, shift: float, out: int) -> bool:
        # sums of d = x - shift and d*d; False where more than a bit of m2 cancels
        factor = splat(scale)
        minus = splat(-shift)
        zero = splat(0.0)
        sum0 = zero
        sum1 = zero
        square0 = zero
        square1 = zero
        total_sum = zero
        lost_sum = zero
        total_square = zero
        lost_square = zero
        steps = 0
        for r in range(rows):
            q = p + r * row_bytes
            left = cols
            while left > 0:
                stop = max(left - STEPS * 2 * LANES, 0) if double else 0
                steps += (left - stop + 2 * LANES - 1) // (2 * LANES)
                while left - stop >= 2 * LANES:
                    if double:
                        d0 = fma(widen(load(q)), factor, minus)
                        d1 = fma(widen(load(q + step)), factor, minus)
                    else:
                        d0 = widen(load(q)) + minus
                        d1 = widen(load(q + step)) + minus
                    sum0 += d0
                    sum1 += d1
                    square0 = fma(d0, d0, square0)
                    square1 = fma(d1, d1, square1)
                    q += 2 * step
                    left -= 2 * LANES
                if left - stop >= LANES:
                    d0 = fma(widen(load(q)), factor, minus)
                    sum0 += d0
                    square0 = fma(d0, d0, square0)
                    q += step
                    left -= LANES
                if left > stop:
                    d1 = select(first_lanes(left), fma(widen(load_part(q, left)), factor, minus), zero)
                    sum1 += d1
                    square1 = fma(d1, d1, square1)
                    left = stop
                if double and steps >= STEPS:
                    # values of one magnitude (two-valued images) round the same way again and again: 16u in 64 steps
                    steps = 0
                    part = sum0 + sum1
                    total_sum, lost_sum = add_kept(total_sum, lost_sum, part)
                    part = square0 + square1
                    total_square, lost_square = add_kept(total_square, lost_square, part)
                    sum0 = zero
                    sum1 = zero
                    square0 = zero
                    square1 = zero
        if double:
            sum0 += lost_sum
            sum1 += total_sum
            square0 += lost_square
            square1 += total_square
        n = float(rows * cols)
        total = reduce_add(sum0 + sum1)
        offset = total / n
        high = shift + offset
        squares = reduce_add(square0 + square1)
        m2 = squares - total * offset
        if m2 < 0.0:
            m2 = 0.0
        store_partial(out, n, high, two_sum_error(shift, offset, high), m2)
        return not (2.0 * m2 < squares)

    @inner
    def block_moments(p: int, rows: int, row_bytes: int, cols: int, scale: float, out: int) -> None:
        if double:
            shift = head_mean(p, cols, scale)
            if not shifted_moments(p, rows, row_bytes, cols, scale, shift, out):
                shifted_moments(p, rows, row_bytes, cols, scale, load_f64(out, 1), out)
        elif not plain_moments(p, rows, row_bytes, cols, out):
            shifted_moments(p, rows, row_bytes, cols, 1.0, reduce_add(widen(load_part(p, 1))), out)

    @inner
    def rect(p: int, rows: int, row_bytes: int, cols: int, scale: float, scratch: int, out: int) -> None:
        width = min(block, cols)
        height = max(block // cols, 1)
        if cols <= block and rows <= height:
            block_moments(p, rows, row_bytes, cols, scale, out)
            return
        count = 0
        for row in range(0, rows, height):
            for start in range(0, cols, width):
                where = p + row * row_bytes + start * itemsize
                part = scratch + count * PARTIAL_BYTES
                block_moments(where, min(height, rows - row), row_bytes, min(width, cols - start), scale, part)
                count += 1
        merge(scratch, count, PARTIAL_BYTES, out)

    @inner
    def add_columns(
        p: int, rows: int, row_bytes: int, cols: int, factor: Any, shifts: int, sums: int, squares: int, lost: int,
        plain: bool, touched: int,
    ) -> None:  # fmt: skip
        # sums of d = x - shift (plain: of x) and of d*d, column by column
        padded = (cols + LANES - 1) // LANES * LANES
        zero = splat(0.0)
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            q = p + done * row_bytes
            touch_rows(q, row_bytes, here, cols * itemsize, touched)
            left = cols
            j = 0
            while left > 0:
                s = zero
                square = zero
                minus = zero - _load64(shifts + 8 * j)
                if here == _ROWS and left >= LANES:
                    for r in range(_ROWS):
                        d = widen(load(q + r * row_bytes))
                        if not plain:
                            d = fma(d, factor, minus)
                        s += d
                        square = fma(d, d, square)
                else:
                    for r in range(here):
                        d = lanes_at(q + r * row_bytes, left)
                        if not plain:
                            d = fma(d, factor, minus)
                        s += d
                        square = fma(d, d, square)
                if double:
                    add_to(sums + 8 * j, lost + 8 * j, s)
                    add_to(squares + 8 * j, lost + 8 * (padded + j), square)
                else:
                    _store64(sums + 8 * j, _load64(sums + 8 * j) + s)
                    _store64(squares + 8 * j, _load64(squares + 8 * j) + square)
                q += step
                j += LANES
                left -= LANES
            done += here

    @inner
    def column_moments(
        p: int, rows: int, row_bytes: int, cols: int, factor: Any, shifts: int, sums: int, squares: int, lost: int
    ) -> None:
        # mean in two parts (shifts, sums) and m2 (squares) of each column; about the mean that was found where too much
        # cancelled, which depends on the column alone
        padded = (cols + LANES - 1) // LANES * LANES
        n = splat(float(rows))
        for j in range(0, cols, LANES):
            shift = _load64(shifts + 8 * j)
            s = _load64(sums + 8 * j)
            square = _load64(squares + 8 * j)
            if double:
                s += _load64(lost + 8 * j)
                square += _load64(lost + 8 * (padded + j))
            high, low, m2 = about(shift, s, square, n)
            cancelled = less(m2 * splat(2.0 if double else PLAIN), square)
            if reduce_max(select(cancelled, splat(1.0), splat(0.0))) != 0.0:
                s, square = sums_about(p + j * itemsize, rows, row_bytes, cols - j, factor, high)
                mean, rest, square = about(high, s, square, n)
                high = select(cancelled, mean, high)
                low = select(cancelled, rest, low)
                m2 = select(cancelled, square, m2)
            _store64(shifts + 8 * j, high)
            _store64(sums + 8 * j, low)
            _store64(squares + 8 * j, m2)

    @inner
    def first_shift(p: int, rows: int, row_bytes: int, left: int, factor: Any) -> Any:
        # the mean of 16 columns' first rows; in float32 0 where sums about zero lose too little to care
        s = splat(0.0)
        square = s
        for r in range(min(rows, _ROWS)):
            x = lanes_at(p + r * row_bytes, left)
            s = fma(x, factor, s)
            square = fma(x, x, square)
        mean = s / splat(float(min(rows, _ROWS)))
        if double:
            return mean
        return select(less((square - s * mean) * splat(PLAIN), square), mean, splat(0.0))

    @inner
    def clear(where: int, cols: int) -> None:
        for j in range(0, cols, LANES):
            _store64(where + 8 * j, splat(0.0))

    @inner
    def columns(p: int, rows: int, row_bytes: int, cols: int, scale: float, scratch: int, touched: int) -> None:
        # scratch: three float64 arrays of `padded` columns (five in float64), then mean, its low part and m2 of each
        padded = (cols + LANES - 1) // LANES * LANES
        shifts = scratch
        sums = shifts + 8 * padded
        squares = sums + 8 * padded
        lost = squares + 8 * padded  # of the sums, then of the squares: float64 only
        factor = splat(scale)
        clear(scratch, (5 if double else 3) * padded)
        # if the first columns need no shift, others that do are taken once more
        shift = first_shift(p, rows, row_bytes, cols, factor)
        if not double and reduce_max(vector_abs(shift)) == 0.0:
            add_columns(p, rows, row_bytes, cols, factor, shifts, sums, squares, lost, True, touched)
        else:
            for j in range(0, cols, LANES):
                _store64(shifts + 8 * j, first_shift(p + j * itemsize, rows, row_bytes, cols - j, factor))
            add_columns(p, rows, row_bytes, cols, factor, shifts, sums, squares, lost, False, touched)
        column_moments(p, rows, row_bytes, cols, factor, shifts, sums, squares, lost)

    return rect, columns


@inner
def segment_partial(means: int, lows: int, squares: int, width: int, rows: float, out: int) -> None:
    """One partial of `width` columns, each with its mean in two parts and its m2 over `rows` rows."""
    if width == 1:
        store_partial(out, rows, load_f64(means, 0), load_f64(lows, 0), load_f64(squares, 0))
        return
    reference = load_f64(means, 0)
    minus = splat(-reference)
    total = splat(0.0)
    zero = splat(0.0)
    for j in range(0, width, LANES):
        left = width - j
        if left >= LANES:
            total += (_load64(means + 8 * j) + minus) + _load64(lows + 8 * j)
        else:
            high = _load64_part(means + 8 * j, left) + minus
            total += select(first_lanes(left), high + _load64_part(lows + 8 * j, left), zero)
    offset = reduce_add(total) / width
    high = reference + offset
    low = two_sum_error(reference, offset, high)
    minus = splat(-high)
    less = splat(-low)
    between = zero
    within = zero
    for j in range(0, width, LANES):
        left = width - j
        if left >= LANES:
            d = (_load64(means + 8 * j) + minus) + (_load64(lows + 8 * j) + less)
            within += _load64(squares + 8 * j)
        else:
            d = (_load64_part(means + 8 * j, left) + minus) + (_load64_part(lows + 8 * j, left) + less)
            d = select(first_lanes(left), d, zero)
            within += _load64_part(squares + 8 * j, left)
        between = fma(d, d, between)
    store_partial(out, rows * width, high, low, fma(rows, reduce_add(between), reduce_add(within)))
