"""Sums and merges whose bits do not depend on the order of their terms: those over the channels of a label group.

Each term is split into a multiple of a power of two that is large enough for all of them to be added exactly, and a
rest, which is split and added in the same way [1]_. Nothing but the largest term decides where they are split.

References
----------
.. [1] Demmel, Nguyen, "Fast reproducible floating-point summation", ARITH 2013.
"""

from __future__ import annotations

import math
from typing import Any

from .block_moments import store_partial, two_sum_error
from .compile import inner
from .convert import loader
from .memory import bits_float, float_bits, load_f64
from .simd import LANES, fma, less, reduce_add, reduce_max, select, splat, vector_abs, vector_max

_load64, _load64_part = loader("float64", "float64")


@inner
def array_at(address: int, left: int) -> Any:
    """The next 16 of an array, zeros beyond its end."""
    if left >= LANES:
        return _load64(address)
    return _load64_part(address, left)


@inner
def bits_of_count(terms: int) -> int:
    """The least k with 2**k >= terms: the exponent of 2*terms - 1."""
    return (float_bits(float(2 * terms - 1)) >> 52) - 1023


@inner
def splitter(largest: float, terms: int) -> float:
    """1.5 * 2^k: adding it to terms up to `largest` and taking it away rounds them to what can be added exactly."""
    k = ((float_bits(largest) >> 52) & 2047) - 1023 + 2 + bits_of_count(terms)
    return 1.5 * bits_float((max(k, -900) + 1023) << 52)


@inner
def rest_splitter(first: float, terms: int) -> float:
    """The splitter of what is left by another one: half of its last digit at most."""
    return first * bits_float((bits_of_count(terms) - 52 + 1023) << 52)


@inner
def rounded_to(value: Any, large: Any) -> Any:
    """Lanes rounded to the last digit of `large`."""
    return (value + large) - large


@inner
def exact_sum(values: int, width: int) -> float:
    """Sum of a float64 array, in any order of it the same bits."""
    largest = splat(0.0)
    plain = splat(0.0)
    for j in range(0, width, LANES):
        v = array_at(values + 8 * j, width - j)
        largest = vector_max(largest, vector_abs(v))
        plain += v
    total = reduce_add(plain)
    most = reduce_max(largest)
    if not (most < 2.0**960 and total - total == 0.0):  # beyond which no splitter is a number; NaN
        return total
    large = splitter(most, width)
    small = splat(rest_splitter(large, width))
    vector = splat(large)
    high = splat(0.0)
    low = splat(0.0)
    for j in range(0, width, LANES):
        v = array_at(values + 8 * j, width - j)
        q = rounded_to(v, vector)
        high += q
        low += rounded_to(v - q, small)
    return reduce_add(high) + reduce_add(low)


@inner
def merge_arrays(counts: int, means: int, lows: int, squares: int, width: int, out: int) -> None:
    """One partial of `width` ones whose fields are float64 arrays; those without elements are neutral."""
    if width == 1:
        store_partial(out, load_f64(counts, 0), load_f64(means, 0), load_f64(lows, 0), load_f64(squares, 0))
        return
    zero = splat(0.0)
    infinite = splat(-math.inf)
    total = zero
    most = zero
    top = infinite
    minus_bottom = infinite
    largest_low = zero
    largest_square = zero
    for j in range(0, width, LANES):
        left = width - j
        n = array_at(counts + 8 * j, left)
        mean = array_at(means + 8 * j, left)
        filled = less(zero, n)
        total += n
        most = vector_max(most, n)
        top = vector_max(top, select(filled, mean, infinite))
        minus_bottom = vector_max(minus_bottom, select(filled, zero - mean, infinite))
        largest_low = vector_max(largest_low, select(filled, vector_abs(array_at(lows + 8 * j, left)), zero))
        largest_square = vector_max(largest_square, select(filled, array_at(squares + 8 * j, left), zero))
    count = reduce_add(total)
    if count == 0.0:
        store_partial(out, 0.0, 0.0, 0.0, 0.0)
        return
    reference = reduce_max(top)
    span = (reference + reduce_max(minus_bottom)) + reduce_max(largest_low)
    # no term is larger, rounding included; NaN and infinity make the means of the whole what they are without splitting
    largest = reduce_max(most) * span
    splits = largest < 2.0**960
    first = splitter(largest, width) if splits else 0.0
    large = splat(first)
    small = splat(rest_splitter(first, width))
    shift = splat(reference)
    high_sum = zero
    low_sum = zero
    for j in range(0, width, LANES):
        left = width - j
        n = array_at(counts + 8 * j, left)
        d = (array_at(means + 8 * j, left) - shift) + array_at(lows + 8 * j, left)
        term = select(less(zero, n), n * d, zero)
        q = rounded_to(term, large)
        high_sum += q
        low_sum += rounded_to(term - q, small)
    offset = (reduce_add(high_sum) + reduce_add(low_sum)) / count
    high = reference + offset
    low = two_sum_error(reference, offset, high)
    # the common mean is at most a rounding outside of the means
    largest = reduce_max(largest_square) + reduce_max(most) * (16.0 * span * span)
    splits = largest < 2.0**960
    first = splitter(largest, width) if splits else 0.0
    large = splat(first)
    small = splat(rest_splitter(first, width))
    shift = splat(high)
    rest = splat(low)
    high_sum = zero
    low_sum = zero
    for j in range(0, width, LANES):
        left = width - j
        n = array_at(counts + 8 * j, left)
        d = (array_at(means + 8 * j, left) - shift) + (array_at(lows + 8 * j, left) - rest)
        term = select(less(zero, n), fma(n * d, d, array_at(squares + 8 * j, left)), zero)
        q = rounded_to(term, large)
        high_sum += q
        low_sum += rounded_to(term - q, small)
    store_partial(out, count, high, low, reduce_add(high_sum) + reduce_add(low_sum))
