"""Tables (S = 1) whose groups are small, labelled or masked: sixteen samples at a time, one in each lane.

A group of eight values side by side fills half a vector, and its sums then go across lanes; labels put its values
anywhere. With a sample in each lane both are nothing: sums stay in their lanes, and a channel is one address. What it
costs is the way there and back (`transpose.py`), half a cycle an element.

A sample's bits are those of its own lane, whatever the other lanes hold. Sums are float64 lanes. Those over the
channels of a label group are of terms rounded to what can be added exactly, so that the channels' order is nothing.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import words as w
from .access import array_word, word
from .activate import activation_kernels
from .chunks import Place, sample_at
from .compile import inner
from .convert import loader, mask_loader, storer, to_compute
from .labelled import group_sums
from .masked import copy_mask, open_mask
from .memory import bits_float, load_f64, load_i64, store_f64, store_i64
from .simd import (
    LANES,
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
    select,
    splat,
    square_in_units,
    store_folded,
    vector_abs,
    vector_sqrt,
    widen,
)
from .statistics import itemsize
from .transpose import transpose_bytes, transpose_floats
from .words import FOLDED

_X, _OUT = 0, 1  # positions among the arrays of the forward's geometry
_DY, _DX = 1, 2  # and of the backward's
_LINE = 64  # a channel: sixteen float32
_load32, _ = loader("float32", "float32")
_store32, _, _ = storer("float32", "float32")
_store32_wide, _, _ = storer("float32", "float64")
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")
_lanes32 = to_compute("float32")
_load_mask, _ = mask_loader()


@inner
def place_rows(geometry: int, array: int, base: int, n0: int, count: int, rows: int) -> int:
    """Addresses of a block's samples; the distance between them if there are sixteen of one distance, else 0."""
    for r in range(count):
        store_i64(rows, r, sample_at(geometry, array, base, n0 + r))
    if count < LANES or array_word(geometry, array, w.APART) != 0:
        return 0
    return array_word(geometry, array, w.SN)


@cache
def reader(dtype: str) -> Any:
    """read(geometry, call, array, n0, count, target, scratch): a block's samples into lanes, zeros beyond them."""
    load, load_part = loader(dtype, "float32")
    size, single = itemsize(dtype), dtype == "float32"

    @inner
    def read(geometry: int, call: int, array: int, n0: int, count: int, target: int, scratch: int) -> None:
        tile = scratch + word(geometry, w.BLOCKS_AT)
        rows = tile + LANES * _LINE
        step = place_rows(geometry, array, load_i64(call, array), n0, count, rows)
        channels = word(geometry, w.C)
        for k in range(8 * count, 8 * LANES):
            store_i64(tile, k, 0)
        for c in range(0, channels, LANES):
            left = channels - c
            if single:  # noqa: SIM102 - known when the kernel is compiled
                if step != 0 and left >= LANES:
                    transpose_floats(load_i64(rows, 0) + c * size, step, target + c * _LINE, _LINE)
                    continue
            for r in range(count):
                p = load_i64(rows, r) + c * size
                if left >= LANES:
                    _store32(tile + r * _LINE, load(p))
                else:
                    _store32(tile + r * _LINE, load_part(p, left))
            transpose_floats(tile, _LINE, target + c * _LINE, _LINE)

    return read


@cache
def writer(dtype: str) -> Any:
    """write(geometry, call, array, n0, count, source, scratch): a block's samples out of the lanes."""
    store, store_part, store_stream = storer(dtype, "float32")
    size, single = itemsize(dtype), dtype == "float32"
    alignment = min(64, LANES * size)

    @inner
    def write(geometry: int, call: int, array: int, n0: int, count: int, source: int, scratch: int) -> None:
        tile = scratch + word(geometry, w.BLOCKS_AT)
        rows = tile + LANES * _LINE
        step = place_rows(geometry, array, load_i64(call, array), n0, count, rows)
        channels = word(geometry, w.C)
        stream = word(geometry, w.STREAM) != 0
        for c in range(0, channels, LANES):
            left = channels - c
            if single:  # noqa: SIM102 - known when the kernel is compiled
                if step != 0 and left >= LANES and not stream:
                    transpose_floats(source + c * _LINE, _LINE, load_i64(rows, 0) + c * size, step)
                    continue
            transpose_floats(source + c * _LINE, _LINE, tile, _LINE)
            for r in range(count):
                p = load_i64(rows, r) + c * size
                value = _load32(tile + r * _LINE)
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


@cache
def group_moments(labelled: bool, masked: bool) -> Any:
    """moments(geometry, group, turned, mask) -> mean, m2 and the number of values, in lanes.

    Sums of x - reference and of its square: one of the values, so that float64 has digits enough for what cancels
    (up to 2^-52 times the number of values, of m2).
    """
    channels_of, channel_at, _ = group_sums(labelled)

    @inner
    def moments(geometry: int, group: int, turned: int, mask: int) -> Any:
        first, size = channels_of(geometry, group)
        zero = splat(0.0)
        count = zero
        span = zero
        if labelled or masked:
            # the largest, which does not depend on the order, and is one that is kept
            top = _lanes32(-math.inf)
            bottom = _lanes32(math.inf)
            spoiled = _lanes32(0.0)  # NaN by a NaN or an infinity
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                low = x = _load32(turned + c * _LINE)
                zeroed = x
                if masked:
                    keep = _load_mask(mask + c * LANES)
                    low = select(keep, x, _lanes32(math.inf))
                    zeroed = select(keep, x, _lanes32(0.0))
                    x = select(keep, x, _lanes32(-math.inf))
                top = select(less(top, x), x, top)
                if labelled:
                    bottom = select(less(low, bottom), low, bottom)
                    spoiled = fma(zeroed, _lanes32(0.0), spoiled)
            reference = widen(top)
            if labelled:
                span = power_below(reference - widen(bottom) + widen(spoiled))
        else:
            reference = widen(_load32(turned + channel_at(geometry, first) * _LINE))
        if not masked:
            count = splat(float(size))
        total = zero
        square = zero
        # |x - reference| is below twice the power of two
        large = span * splat(6.0)
        large_square = span * span * splat(12.0)
        units = no_units()
        square_units = no_units()
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            d = widen(_load32(turned + c * _LINE)) - reference
            if masked:
                keep = _load_mask(mask + c * LANES)
                d = select(keep, d, zero)
                count += select(keep, splat(1.0), zero)
            if labelled:
                units += in_units(d, large)
                square_units += square_in_units(d, large_square)
            else:
                total += d
                square = fma(d, d, square)
        if labelled:
            total = from_units(units, size, large)
            square = from_units(square_units, size, large_square)
        offset = total / count
        m2 = square - total * offset
        return reference + offset, select(less(m2, zero), zero, m2), count

    return moments


@inner
def inverse_deviation(m2: Any, count: Any, eps: float) -> Any:
    """rstd in lanes; squares of float32 are far from the ends of float64's range."""
    return splat(1.0) / vector_sqrt(m2 / count + splat(eps))


@cache
def forward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: y of sixteen samples, with mean and rstd."""
    read, write = reader(x), writer(y)
    channels_of, channel_at, _ = group_sums(labelled)
    moments = group_moments(labelled, masked)
    act = activation_kernels(compute, activation)[0]
    double, active = compute == "float64", activation is not None
    store_lanes = _store32_wide if double or not active else _store32

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        turned = scratch + word(geometry, w.TURNED_AT)
        read(geometry, call, _X, n0, count, turned, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        weight, bias = scratch + word(geometry, w.WEIGHT_AT), scratch + word(geometry, w.BIAS_AT)
        eps = bits_float(word(geometry, w.EPS))
        for g in range(word(geometry, w.GROUPS)):
            mean, m2, values = moments(geometry, g, turned, mask)
            rstd = inverse_deviation(m2, values, eps)
            _store64(means + 8 * LANES * g, mean)
            _store64(rstds + 8 * LANES * g, rstd)
            first, size = channels_of(geometry, g)
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                x_hat = (widen(_load32(turned + c * _LINE)) - mean) * rstd
                z = fma(x_hat, splat(load_f64(weight, c)), splat(load_f64(bias, c)))
                if active:
                    store_lanes(turned + c * _LINE, act(z if double else narrow(z)))
                else:
                    store_lanes(turned + c * _LINE, z)
        move_statistics(geometry, call, n0, count, means, rstds, False)
        write(geometry, call, _OUT, n0, count, turned, scratch)

    return block


@inner
def add_channels(folded: int, channels: int, target: int) -> None:
    """Sums over the lanes of each channel, added to those of the samples before."""
    for c in range(0, channels, LANES):
        sums = folded_sums(folded + c * FOLDED)
        left = channels - c
        if left >= LANES:
            _store64(target + 8 * c, _load64(target + 8 * c) + sums)
        else:
            _store64_part(target + 8 * c, _load64_part(target + 8 * c, left) + sums, left)


@cache
def backward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: dx of sixteen samples, and what they add to dweight and dbias."""
    read_x, read_dy, write = reader(x), reader(y), writer(y)
    channels_of, channel_at, _ = group_sums(labelled)
    moments = group_moments(labelled, masked)
    slope = activation_kernels(compute, activation)[1]
    double, active = compute == "float64", activation is not None
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
    def block(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
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
            values = splat(float(size))
            if given:
                mean = _load64(means + 8 * LANES * g)
                rstd = _load64(rstds + 8 * LANES * g)
                if masked:  # the mean may be that of other elements than the mask keeps
                    mean, _, values = moments(geometry, g, turned, mask)
            else:
                mean, m2, values = moments(geometry, g, turned, mask)
                rstd = inverse_deviation(m2, values, eps)
                _store64(means + 8 * LANES * g, mean)
                _store64(rstds + 8 * LANES * g, rstd)
            # x_hat of a lane without a sample is 0, and so is its dy
            mean = select(there, mean, zero)
            rstd = select(there, rstd, zero)
            sum_v = zero
            sum_vx = zero
            most_v = zero
            most_vx = zero
            spoiled = zero
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                a = load_f64(weight, c)
                x_hat = (widen(_load32(turned + c * _LINE)) - mean) * rstd
                dy = _load32(turned_dy + c * _LINE)
                if active:
                    dz = slope_of(dy, fma(x_hat, splat(a), splat(load_f64(bias, c))))
                    v = widen(dz)
                    if kept:
                        _store32(turned_dy + c * _LINE, dz)
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
                    spoiled = fma(v * x_hat, zero, spoiled)  # NaN by a NaN or an infinity
                else:
                    sum_v += v
                    sum_vx = fma(v, x_hat, sum_vx)
            if labelled:
                large = power_below(most_v + spoiled) * splat(6.0)
                large_x = power_below(most_vx + spoiled) * splat(6.0)
                units = no_units()
                units_x = no_units()
                for k in range(first, first + size):
                    c = channel_at(geometry, k)
                    x_hat = (widen(_load32(turned + c * _LINE)) - mean) * rstd
                    a = load_f64(weight, c)
                    v = again(_load32(turned_dy + c * _LINE), x_hat, a, load_f64(bias, c)) * splat(a)
                    units += in_units(v, large)
                    units_x += in_units(v * x_hat, large_x)
                sum_v = from_units(units, size, large)
                sum_vx = from_units(units_x, size, large_x)
            scale = rstd
            mean_v = zero - sum_v / values
            mean_vx = zero - sum_vx / values
            if not masked:
                if size == 1:  # dx is exactly 0
                    rstd = zero
                    scale = zero
                    mean_vx = zero
                elif size == 2 and not given:
                    # what is left when both sums cancel (`statistics.pair`)
                    scale = rstd * (splat(eps) * (rstd * rstd) if eps > 0.0 else zero)
                    mean_vx = zero
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                a = load_f64(weight, c)
                x_hat = (widen(_load32(turned + c * _LINE)) - mean) * rstd
                v = again(_load32(turned_dy + c * _LINE), x_hat, a, load_f64(bias, c))
                rest = fma(mean_vx, x_hat, mean_v)
                if masked:
                    rest = select(_load_mask(mask + c * LANES), rest, zero)
                _store32_wide(turned_dy + c * _LINE, fma(splat(a), v, rest) * scale)
        if not given:
            move_statistics(geometry, call, n0, count, means, rstds, False)
        part = word(geometry, w.GRADIENT_BYTES)
        sums = load_i64(call, w.CALL_WORK) + word(geometry, w.GRADIENTS_AT)
        sums += task // word(geometry, w.PART_SAMPLES) * part
        add_channels(folded, channels, sums)
        add_channels(folded_x, channels, sums + part // 2)
        write(geometry, call, _DX, n0, count, turned_dy, scratch)

    return block
