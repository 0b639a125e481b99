"""Tables (S = 1) whose groups are small, labelled or masked: sixteen samples at a time, one in each lane.

A group of eight values side by side fills half a vector, and its sums then go across lanes; labels put its values
anywhere. With a sample in each lane both are nothing: sums stay in their lanes, and a channel is one address. What it
costs is the way there and back (`transpose.py`), half a cycle an element.

A sample's bits are those of its own lane, whatever the other lanes hold. Arithmetic is that of float64. Sums over the
channels of a label group are of terms in units of one number: integers, so that the channels' order is nothing.

`real` is the dtype of the channels in lanes: float32, or float64 where x or y is that. Then there is more to be done:
x_hat = (x*scale - mean - rest) * root, with a power of two that keeps squares in range, a mean of two float64,
and sums whose roundings are added as well.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import words as w
from .access import array_word, word
from .activate import activation_kernels
from .block_moments import add_to
from .chunks import Place, sample_at
from .compile import inner
from .convert import loader, mask_loader, storer, to_compute
from .labelled import group_sums
from .masked import copy_mask, open_mask
from .memory import bits_float, load_f64, load_i64, store_f64, store_i64
from .simd import (
    LANES,
    both,
    fill_bytes,
    first_lanes,
    fma,
    folded_sums,
    from_units,
    in_units,
    less,
    narrow,
    no_units,
    power_below,
    rounding,
    select,
    splat,
    square_in_units,
    store_folded,
    vector_abs,
    vector_sqrt,
    widen,
)
from .statistics import exponent, itemsize, power_of_two
from .transpose import transpose_bytes, transpose_doubles, transpose_floats
from .words import FOLDED

_X, _OUT = 0, 1  # positions among the arrays of the forward's geometry
_DY, _DX = 1, 2  # and of the backward's
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")
_load_mask, _ = mask_loader()


def real_of(x: str, y: str) -> str:
    """dtype of the channels in lanes."""
    return "float64" if "float64" in (x, y) else "float32"


@inner
def place_rows(geometry: int, array: int, base: int, n0: int, count: int, rows: int) -> int:
    """Addresses of a block's samples; the distance between them if there are sixteen of one distance, else 0."""
    for r in range(count):
        store_i64(rows, r, sample_at(geometry, array, base, n0 + r))
    return array_word(geometry, array, w.SN) if count == LANES else 0


@cache
def reader(dtype: str, real: str) -> Any:
    """read(geometry, call, array, n0, count, target, scratch): a block's samples into lanes, zeros beyond them."""
    load, load_part = loader(dtype, real)
    store = storer(real, real)[0]
    transpose = transpose_doubles if real == "float64" else transpose_floats
    size, line, same = itemsize(dtype), LANES * itemsize(real), dtype == real

    @inner
    def read(geometry: int, call: int, array: int, n0: int, count: int, target: int, scratch: int) -> None:
        tile = scratch + word(geometry, w.BLOCKS_AT)
        rows = tile + LANES * line
        step = place_rows(geometry, array, load_i64(call, array), n0, count, rows)
        channels = word(geometry, w.C)
        for k in range(line // 8 * count, line // 8 * LANES):
            store_i64(tile, k, 0)
        for c in range(0, channels, LANES):
            left = channels - c
            if same:  # noqa: SIM102 - known when the kernel is compiled
                if step != 0 and left >= LANES:
                    transpose(load_i64(rows, 0) + c * size, step, target + c * line, line)
                    continue
            for r in range(count):
                p = load_i64(rows, r) + c * size
                if left >= LANES:
                    store(tile + r * line, load(p))
                else:
                    store(tile + r * line, load_part(p, left))
            transpose(tile, line, target + c * line, line)

    return read


@cache
def writer(dtype: str, real: str) -> Any:
    """write(geometry, call, array, n0, count, source, scratch): a block's samples out of the lanes."""
    load = loader(real, real)[0]
    store, store_part, store_stream = storer(dtype, real)
    transpose = transpose_doubles if real == "float64" else transpose_floats
    size, line, same = itemsize(dtype), LANES * itemsize(real), dtype == real
    alignment = min(64, LANES * size)

    @inner
    def write(geometry: int, call: int, array: int, n0: int, count: int, source: int, scratch: int) -> None:
        tile = scratch + word(geometry, w.BLOCKS_AT)
        rows = tile + LANES * line
        step = place_rows(geometry, array, load_i64(call, array), n0, count, rows)
        channels = word(geometry, w.C)
        stream = word(geometry, w.STREAM) != 0
        for c in range(0, channels, LANES):
            left = channels - c
            if same:  # noqa: SIM102 - known when the kernel is compiled
                if step != 0 and left >= LANES and not stream:
                    transpose(source + c * line, line, load_i64(rows, 0) + c * size, step)
                    continue
            transpose(source + c * line, line, tile, line)
            for r in range(count):
                p = load_i64(rows, r) + c * size
                value = load(tile + r * line)
                if left < LANES:
                    store_part(p, value, left)
                elif stream and p & (alignment - 1) == 0:
                    store_stream(p, value)
                else:
                    store(p, value)

    return write


@inner
def read_mask(geometry: int, call: int, n0: int, count: int, scratch: int) -> int:
    """Address of a block's booleans, sixteen of each channel."""
    channels = word(geometry, w.C)
    padded = (channels + LANES - 1) // LANES * LANES
    target = scratch + word(geometry, w.TURNED_MASK_AT)
    rows = target + LANES * padded
    for r in range(LANES):
        row = rows + r * padded
        if r < count:
            source, _ = open_mask(geometry, call, Place(n0 + r, 0, 1, 0, 0, channels, 0, 1, 0), scratch)
            copy_mask(row, source, 1, channels)
        else:
            for c in range(0, padded, LANES):
                fill_bytes(row + c, 0)
    for c in range(0, padded, LANES):
        transpose_bytes(rows + c, padded, target + c * LANES)
    return target


@inner
def move_statistics(geometry: int, call: int, n0: int, count: int, means: int, rstds: int, given: bool) -> None:
    """mean and rstd of a block, sixteen of each group, from the arrays that the caller gave, or to those."""
    groups = word(geometry, w.GROUPS)
    for r in range(count):
        mean = load_i64(call, w.CALL_MEAN) + 8 * (n0 + r) * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * (n0 + r) * groups
        for g in range(groups):
            if given:
                store_f64(means, g * LANES + r, load_f64(mean, g))
                store_f64(rstds, g * LANES + r, load_f64(rstd, g))
            else:
                store_f64(mean, g, load_f64(means, g * LANES + r))
                store_f64(rstd, g, load_f64(rstds, g * LANES + r))


@inner
def rest_in_units(value: Any, large: Any) -> Any:
    """What `in_units` rounds away, in units of its own: those of large * 2^-52."""
    return in_units(value - ((value + large) - large), large * splat(2.0**-52))


@inner
def rest_from_units(total: Any, count: int, large: Any) -> Any:
    """The sum of `count` such rests."""
    return from_units(total, count, large * splat(2.0**-52))


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
    mean that a first pass found.
    """
    channels_of, channel_at, _ = group_sums(labelled)
    load, line = loader(real, real)[0], LANES * itemsize(real)
    lanes = to_compute(real)
    exact = real == "float64"

    @inner
    def moments(geometry: int, group: int, turned: int, mask: int, eps: float) -> Any:
        first, size = channels_of(geometry, group)
        zero = splat(0.0)
        one = splat(1.0)
        count = zero if masked else splat(float(size))
        span = zero
        scale = one
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
            units = no_units()
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                d = fma(load(turned + c * line), scale, zero - reference)
                if masked:
                    d = select(_load_mask(mask + c * LANES), d, zero)
                units += in_units(d, large)
            reference += from_units(units, size, large) / count
        total = zero
        total_rest = zero
        square = zero
        square_rest = zero
        units = no_units()
        units_rest = no_units()
        square_units = no_units()
        square_units_rest = no_units()
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x = widen(load(turned + c * line))
            d = fma(x, scale, zero - reference) if exact else x - reference
            if masked:
                d = select(_load_mask(mask + c * LANES), d, zero)
            if labelled:
                units += in_units(d, large)
                if exact:
                    units_rest += rest_in_units(d, large)
                    square_units += in_units(d * d, large_square)
                    square_units_rest += rest_in_units(d * d, large_square)
                else:
                    square_units += square_in_units(d, large_square)
            elif exact:
                moved = total + d
                total_rest += rounding(total, d, moved)
                total = moved
                d = d * d
                moved = square + d
                square_rest += rounding(square, d, moved)
                square = moved
            else:
                total += d
                square = fma(d, d, square)
        if labelled:
            total = from_units(units, size, large)
            square = from_units(square_units, size, large_square)
            if exact:
                total_rest = rest_from_units(units_rest, size, large)
                square_rest = rest_from_units(square_units_rest, size, large_square)
        if exact:
            total += total_rest
            square += square_rest
        offset = total / count
        m2 = square - total * offset
        m2 = select(less(m2, zero), zero, m2)
        if exact:
            return reference, offset, m2, count, scale
        return reference + offset, zero, m2, count, scale

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
        # of numbers far above 1 the scaled eps may be 0, while it is all there is of a constant group's
        unscaled = variance / scale / scale
        near = splat(one) / vector_sqrt(unscaled + splat(eps))
        finite = less(near, splat(math.inf))  # else of a constant group without eps, whose x_hat is NaN
        near = near / scale
        near = select(both(finite, less(splat(largest), near)), splat(largest), near)
        near = select(less(unscaled, splat(2.0**1000)), near, root)
        return select(less(scale, splat(one)), near, root)

    return root_of


@cache
def elements(real: str) -> Any:
    """x_hat(address, mean, rest, root, scale) of a channel."""
    load = loader(real, real)[0]
    exact = real == "float64"

    @inner
    def x_hat(address: int, mean: Any, rest: Any, root: Any, scale: Any) -> Any:
        if exact:
            return (fma(load(address), scale, splat(0.0) - mean) - rest) * root
        return (widen(load(address)) - mean) * root

    return x_hat


@cache
def moments_block(x: str, y: str, labelled: bool, masked: bool) -> Any:
    """Kernel: mean and m2 of sixteen samples, under a mask the counts behind m2."""
    real = real_of(x, y)
    read, moments = reader(x, real), group_moments(real, labelled, masked)

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        samples, groups = word(geometry, w.SAMPLES), word(geometry, w.GROUPS)
        count = min(LANES, samples - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        squares = means + 8 * LANES * groups
        counts = scratch + word(geometry, w.BLOCKS_AT)
        for g in range(groups):
            mean, rest, m2, values, scale = moments(geometry, g, turned, mask, 0.0)
            m2 = select(less(splat(0.0), values), m2, splat(0.0))  # of nothing it is 0, and the mean NaN
            _store64(means + 8 * LANES * g, (mean + rest) / scale)
            _store64(squares + 8 * LANES * g, m2 / scale / scale)
            if masked:
                _store64(counts, values)
                for r in range(count):
                    store_f64(load_i64(call, w.CALL_RSTD), (samples + n0 + r) * groups + g, load_f64(counts, r))
        move_statistics(geometry, call, n0, count, means, squares, False)

    return block


@cache
def group_results(x: str, y: str, compute: str, activation: str | None, labelled: bool) -> Any:
    """apply(geometry, group, turned, scratch, mean, rest, root, scale): y in the place of x."""
    real = real_of(x, y)
    line = LANES * itemsize(real)
    channels_of, channel_at, _ = group_sums(labelled)
    normal = elements(real)
    act = activation_kernels(compute, activation)[0]
    wide = compute == "float64" or activation is None
    store = storer(real, "float64" if wide else compute)[0]

    @inner
    def apply(
        geometry: int, group: int, turned: int, scratch: int, mean: Any, rest: Any, root: Any, scale: Any
    ) -> None:
        weight, bias = scratch + word(geometry, w.WEIGHT_AT), scratch + word(geometry, w.BIAS_AT)
        first, size = channels_of(geometry, group)
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x_hat = normal(turned + c * line, mean, rest, root, scale)
            z = fma(x_hat, splat(load_f64(weight, c)), splat(load_f64(bias, c)))
            if wide:
                store(turned + c * line, act(z))
            else:
                store(turned + c * line, act(narrow(z)))

    return apply


@cache
def forward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: y of sixteen samples, with mean and rstd."""
    real = real_of(x, y)
    read, write = reader(x, real), writer(y, real)
    moments, root_of = group_moments(real, labelled, masked), inverse_deviation(real)
    apply = group_results(x, y, compute, activation, labelled)

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        eps = bits_float(word(geometry, w.EPS))
        for g in range(word(geometry, w.GROUPS)):
            mean, rest, m2, values, scale = moments(geometry, g, turned, mask, eps)
            root = root_of(m2, values, scale, eps)
            _store64(means + 8 * LANES * g, (mean + rest) / scale)
            _store64(rstds + 8 * LANES * g, root * scale)
            apply(geometry, g, turned, scratch, mean, rest, root, scale)
        move_statistics(geometry, call, n0, count, means, rstds, False)
        write(geometry, call, _OUT, n0, count, turned, scratch)

    return block


@cache
def normalize_block(x: str, y: str, compute: str, activation: str | None, labelled: bool) -> Any:
    """Kernel: y of sixteen samples under statistics that the caller gave."""
    real = real_of(x, y)
    read, write = reader(x, real), writer(y, real)
    apply = group_results(x, y, compute, activation, labelled)
    exact = real == "float64"

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        move_statistics(geometry, call, n0, count, means, rstds, True)
        one = splat(1.0)
        for g in range(word(geometry, w.GROUPS)):
            scale, root = one, _load64(rstds + 8 * LANES * g)
            if exact:  # x - mean may be out of range where x_hat is not
                scale = select(less(root, one), splat(0.5), one)
                root = root / scale
            mean = _load64(means + 8 * LANES * g) * scale
            apply(geometry, g, turned, scratch, mean, splat(0.0), root, scale)
        write(geometry, call, _OUT, n0, count, turned, scratch)

    return block


@cache
def add_channels(exact: bool) -> Any:
    """add(folded, channels, target, rests): sums over the lanes of each channel to those of the samples before."""

    @inner
    def add(folded: int, channels: int, target: int, rests: int) -> None:
        for c in range(0, channels, LANES):
            term = folded_sums(folded + c * FOLDED)
            at = target + 8 * c
            left = channels - c
            if left >= LANES:
                if exact:
                    add_to(at, rests + 8 * c, term)
                else:
                    _store64(at, _load64(at) + term)
            else:  # nothing beyond `left` is touched: it may be another participant's
                before = _load64_part(at, left)
                moved = before + term
                if exact:
                    lost = _load64_part(rests + 8 * c, left) + rounding(before, term, moved)
                    _store64_part(rests + 8 * c, lost, left)
                _store64_part(at, moved, left)

    return add


@cache
def backward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: dx of sixteen samples, and what they add to dweight and dbias."""
    real = real_of(x, y)
    line = LANES * itemsize(real)
    read_x, read_dy, write = reader(x, real), reader(y, real), writer(y, real)
    load, store = loader(real, real)[0], storer(real, real)[0]
    store_wide = storer(real, "float64")[0]
    channels_of, channel_at, _ = group_sums(labelled)
    moments = group_moments(real, labelled, masked)
    normal, root_of = elements(real), inverse_deviation(real)
    slope = activation_kernels(compute, activation)[1]
    exact, double, active = real == "float64", compute == "float64", activation is not None
    add = add_channels(exact)
    kept = active and not double
    """dy*act'(z) takes the place of dy; in float64 it has more digits than that has."""

    @inner
    def slope_of(dy: Any, z: Any) -> Any:
        if double:
            return slope(widen(dy), z)
        return slope(dy, narrow(z))

    @inner
    def again(dy: Any, x_hat: Any, weight: float, bias: float) -> Any:
        # dz, once more
        if active and not kept:
            return slope_of(dy, fma(x_hat, splat(weight), splat(bias)))
        return widen(dy)

    @inner
    def exact_sums(
        geometry: int, first: int, size: int, turned: int, turned_dy: int, weight: int, bias: int,
        mean: Any, rest: Any, root: Any, scale: Any, most_v: Any, most_vx: Any, sum_v: Any, sum_vx: Any,
    ) -> Any:  # fmt: skip
        # the same sums in any order; NaN where the plain ones are not finite, which are taken next to the end of range
        large = power_below(most_v) * splat(6.0)
        large_x = power_below(most_vx) * splat(6.0)
        units = no_units()
        units_x = no_units()
        units_rest = no_units()
        units_x_rest = no_units()
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x_hat = normal(turned + c * line, mean, rest, root, scale)
            a = load_f64(weight, c)
            v = again(load(turned_dy + c * line), x_hat, a, load_f64(bias, c)) * splat(a)
            units += in_units(v, large)
            units_x += in_units(v * x_hat, large_x)
            if exact:
                units_rest += rest_in_units(v, large)
                units_x_rest += rest_in_units(v * x_hat, large_x)
        total = from_units(units, size, large)
        total_x = from_units(units_x, size, large_x)
        if exact:
            total += rest_from_units(units_rest, size, large)
            total_x += rest_from_units(units_x_rest, size, large_x)
        most = splat(2.0**1000)
        total = select(less(most_v, most), total + (sum_v - sum_v), sum_v)
        return total, select(less(most_vx, most), total_x + (sum_vx - sum_vx), sum_vx)

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        channels = word(geometry, w.C)
        turned = scratch + word(geometry, w.TURNED_AT)
        turned_dy = turned + word(geometry, w.TURNED_BYTES)
        folded = turned_dy + word(geometry, w.TURNED_BYTES)
        folded_x = folded + FOLDED * word(geometry, w.PADDED_WIDTH)
        read_x(geometry, call, _X, n0, count, turned, scratch)
        read_dy(geometry, call, _DY, n0, count, turned_dy, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        given = load_i64(call, w.CALL_GIVEN) == 1
        if given:
            move_statistics(geometry, call, n0, count, means, rstds, True)
        weight, bias = scratch + word(geometry, w.WEIGHT_AT), scratch + word(geometry, w.BIAS_AT)
        eps = bits_float(word(geometry, w.EPS))
        zero = splat(0.0)
        there = first_lanes(count)
        for g in range(word(geometry, w.GROUPS)):
            first, size = channels_of(geometry, g)
            if exact or masked or not given:
                mean, rest, m2, values, scale = moments(geometry, g, turned, mask, eps)
                if given:
                    # of the mean alone one float64 is not enough, or it may be that of other elements than a mask keeps
                    root = _load64(rstds + 8 * LANES * g) / scale
                else:
                    root = root_of(m2, values, scale, eps)
                    _store64(means + 8 * LANES * g, (mean + rest) / scale)
                    _store64(rstds + 8 * LANES * g, root * scale)
            else:
                mean, rest, scale = _load64(means + 8 * LANES * g), zero, splat(1.0)
                root = _load64(rstds + 8 * LANES * g)
                values = splat(float(size))
            # x_hat of a lane without a sample is 0, and so is its dy
            mean = select(there, mean, zero)
            rest = select(there, rest, zero)
            root = select(there, root, zero)
            sum_v = zero
            sum_vx = zero
            lost_v = zero
            lost_vx = zero
            most_v = zero
            most_vx = zero
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                a = load_f64(weight, c)
                x_hat = normal(turned + c * line, mean, rest, root, scale)
                dy = load(turned_dy + c * line)
                if active:
                    dz = slope_of(dy, fma(x_hat, splat(a), splat(load_f64(bias, c))))
                    v = widen(dz)
                    if kept:
                        store(turned_dy + c * line, dz)
                else:
                    v = widen(dy)
                store_folded(folded + c * FOLDED, v)
                store_folded(folded_x + c * FOLDED, v * x_hat)
                v = v * splat(a)
                if labelled:
                    absolute = vector_abs(v)
                    most_v = select(less(most_v, absolute), absolute, most_v)
                    absolute = vector_abs(v * x_hat)
                    most_vx = select(less(most_vx, absolute), absolute, most_vx)
                if exact and not labelled:
                    moved = sum_v + v
                    lost_v += rounding(sum_v, v, moved)
                    sum_v = moved
                    v = v * x_hat
                    moved = sum_vx + v
                    lost_vx += rounding(sum_vx, v, moved)
                    sum_vx = moved
                else:
                    sum_v += v
                    sum_vx = fma(v, x_hat, sum_vx)
            if labelled:
                sum_v, sum_vx = exact_sums(
                    geometry, first, size, turned, turned_dy, weight, bias, mean, rest, root, scale,
                    most_v, most_vx, sum_v, sum_vx,
                )  # fmt: skip
            elif exact:
                sum_v += lost_v
                sum_vx += lost_vx
            factor = root
            mean_v = zero - sum_v / values
            mean_vx = zero - sum_vx / values
            if not masked:
                if size == 1:  # dx is exactly 0
                    root = zero
                    factor = zero
                    mean_vx = zero
                elif size == 2 and not given:
                    # what is left when both sums cancel (`statistics.pair`)
                    rstd = root * scale
                    factor = root * (splat(eps) * (rstd * rstd) if eps > 0.0 else zero)
                    mean_vx = zero
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                a = load_f64(weight, c)
                x_hat = normal(turned + c * line, mean, rest, root, scale)
                v = again(load(turned_dy + c * line), x_hat, a, load_f64(bias, c))
                means_here = fma(mean_vx, x_hat, mean_v)
                if masked:
                    means_here = select(_load_mask(mask + c * LANES), means_here, zero)
                dx = fma(splat(a), v, means_here) * factor
                if exact:
                    dx = dx * scale
                store_wide(turned_dy + c * line, dx)
        if not given:
            move_statistics(geometry, call, n0, count, means, rstds, False)
        part = word(geometry, w.GRADIENT_BYTES)
        sums = load_i64(call, w.CALL_WORK) + word(geometry, w.GRADIENTS_AT)
        sums += task // word(geometry, w.PART_SAMPLES) * part
        add(folded, channels, sums, sums + part // 4)
        add(folded_x, channels, sums + part // 2, sums + part // 4 * 3)
        write(geometry, call, _DX, n0, count, turned_dy, scratch)

    return block
