"""Moments of a table's groups with a sample in each lane, and what they mean for the elements."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from .adders import adder
from .block_moments import column_sums
from .compile import inner
from .convert import itemsize, loader, mask_loader, to_compute
from .labelled import group_sums
from .powers import inverse_of_power, power_below
from .simd import (
    LANES,
    both,
    count_lanes,
    either,
    equal,
    fma,
    less,
    rounding,
    select,
    splat,
    vector_abs,
    vector_max,
    vector_sqrt,
    widen,
)
from .statistics import exponent, power_of_two

_load_mask, _ = mask_loader()


@inner
def scale_of(largest: Any, eps: float) -> Any:
    """A power of two that keeps the squares of numbers up to `largest` in range, and eps * scale^2; mostly 1."""
    most = 600
    if eps > 0.0:  # beyond that the variance is nothing beside eps
        most = min(most, (1000 - exponent(eps)) // 2)
    one = splat(1.0)
    scale = select(less(largest, splat(2.0**-400)), splat(power_of_two(most)), one)
    return select(both(less(splat(2.0**400), largest), less(largest, splat(math.inf))), splat(2.0**-520), scale)


@cache
def group_moments(real: str, labelled: bool, masked: bool) -> Any:
    """moments(geometry, group, turned, mask, eps) -> mean, its rest, m2, number of values and scale, in lanes.

    The first three are of x*scale. Sums are of x - reference and of its square: one of the values, so that float64
    has digits enough for what cancels (up to 2^-52 times the number of values, of m2). For results in float64 it is the
    mean that a first pass found; squares that leave the range are seen by m2, and only then is there another scale than
    1. Looking for it first, dividing by it, and keeping what each addition loses took 0.4 of a forward's time.
    """
    channels_of, channel_at, _ = group_sums(labelled)
    load, line = loader(real, real)[0], LANES * itemsize(real)
    lanes = to_compute(real)
    exact = real == "float64"
    plain = exact and not labelled and not masked
    begin, add, total_of = adder(exact, ordered=not labelled)
    begin_rough, add_rough, rough = adder(False, ordered=False)
    _, sums_about = column_sums(real, real)

    @inner
    def straight(turned: int, size: int) -> Any:
        # mean, its rest and m2 of channels side by side; the lanes where x needs no scale
        zero = splat(0.0)
        start = load(turned)
        total = zero
        for k in range(1, size):
            total += load(turned + k * line) - start
        reference = fma(total, splat(1.0 / size), start)
        total, squares = sums_about(turned, size, line, LANES, splat(1.0), reference)
        offset = total / splat(float(size))
        m2 = squares - total * offset
        m2 = select(less(m2, zero), zero, m2)
        fits = both(less(splat(2.0**-900), m2), less(m2, splat(2.0**1000)))
        if count_lanes(fits) < LANES:
            most = zero
            for k in range(1, size):
                most = vector_max(most, vector_abs(load(turned + k * line) - start))
            fits = either(fits, equal(most, zero))  # equal values, or such that nothing is a number
        return reference, offset, m2, fits

    @inner
    def moments(geometry: int, group: int, turned: int, mask: int, eps: float) -> Any:
        first, size = channels_of(geometry, group)
        zero = splat(0.0)
        one = splat(1.0)
        count = zero if masked else splat(float(size))
        span = zero
        scale = one
        if plain:
            mean, rest, m2_of_mean, fits = straight(turned + first * line, size)
            if count_lanes(fits) == LANES:
                return mean, rest, m2_of_mean, count, one
        if exact or labelled or masked:
            # the largest, which does not depend on the order, and is one that is kept
            top = lanes(-math.inf)
            bottom = lanes(math.inf)
            spoiled = lanes(0.0)  # NaN by a NaN or an infinity
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                low = x = load(turned + c * line)
                zeroed = x
                if masked:
                    keep = _load_mask(mask + c * LANES)
                    low = select(keep, x, lanes(math.inf))
                    zeroed = select(keep, x, lanes(0.0))
                    x = select(keep, x, lanes(-math.inf))
                    count += select(keep, one, zero)
                top = select(less(top, x), x, top)
                if exact or labelled:
                    bottom = select(less(low, bottom), low, bottom)
                    spoiled = fma(zeroed, lanes(0.0), spoiled)
            reference = widen(top)
            if exact:
                largest = select(less(zero - bottom, top), top, zero - bottom)
                scale = scale_of(largest, eps)
                reference = reference * scale
            if exact or labelled:
                span = power_below(reference - widen(bottom) * scale + widen(spoiled))
        else:
            reference = widen(load(turned + channel_at(geometry, first) * line))
        # |x - reference| is below twice the power of two, and so is |x - mean|
        large = span * splat(6.0)
        large_square = span * span * splat(12.0)
        if exact:
            first_sum = begin_rough()
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                d = fma(load(turned + c * line), scale, zero - reference)
                if masked:
                    d = select(_load_mask(mask + c * LANES), d, zero)
                first_sum = add_rough(first_sum, d, one, large)
            reference += rough(first_sum, size, large) / count
        sums = begin()
        squares = begin()
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x = widen(load(turned + c * line))
            d = fma(x, scale, zero - reference) if exact else x - reference
            if masked:
                d = select(_load_mask(mask + c * LANES), d, zero)
            sums = add(sums, d, one, large)
            squares = add(squares, d, d, large_square)
        total = total_of(sums, size, large)
        offset = total / count
        m2 = total_of(squares, size, large_square) - total * offset
        m2 = select(less(m2, zero), zero, m2)
        if plain:
            scale = select(fits, one, scale)
            return select(fits, mean, reference), select(fits, rest, offset), select(fits, m2_of_mean, m2), count, scale
        if exact:
            return reference, offset, m2, count, scale
        mean = reference + offset
        return mean, rounding(reference, offset, mean), m2, count, scale

    return moments


@cache
def inverse_deviation(real: str) -> Any:
    """root_of(m2, count, scale, eps): rstd / scale, in lanes."""
    exact = real == "float64"
    one, largest = 1.0, 1.5 * 2.0**1023

    @inner
    def root_of(m2: Any, count: Any, scale: Any, eps: float) -> Any:
        variance = m2 / count
        if not exact:
            return splat(one) / vector_sqrt(variance + splat(eps))
        root = splat(one) / vector_sqrt(variance + splat(eps) * scale * scale)
        if count_lanes(equal(scale, splat(one))) == LANES:
            return root
        # of numbers far above 1 the scaled eps may be 0, while it is all there is of a constant group's
        own = variance / scale / scale
        near = splat(one) / vector_sqrt(own + splat(eps))
        finite = less(near, splat(math.inf))  # else of a constant group without eps, whose x_hat is NaN
        near = near / scale
        near = select(both(finite, less(splat(largest), near)), splat(largest), near)
        near = select(less(own, splat(2.0**1000)), near, root)
        return select(less(scale, splat(one)), near, root)

    return root_of


@inner
def unscaled(value: Any, scale: Any) -> Any:
    """value / scale."""
    return value * inverse_of_power(scale)


@cache
def elements(real: str) -> Any:
    """x_hat(address, mean, rest, root, scale) of a channel."""
    load = loader(real, real)[0]
    exact = real == "float64"

    @inner
    def x_hat(address: int, mean: Any, rest: Any, root: Any, scale: Any) -> Any:
        if exact:
            return (fma(load(address), scale, splat(0.0) - mean) - rest) * root
        return (widen(load(address)) - mean - rest) * root

    return x_hat
