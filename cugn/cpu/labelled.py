"""Label groups: partials and sums of single channels, sorted by group, merged so that the channels' order is nothing.

A task is all channels of a sample. Its statistics are kept channel by channel, four float64 arrays a layer of chunks;
the layers are merged for 16 channels at a time, the channels of a group in `exact.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .adders import add_kept
from .block_moments import PLAIN, about, about_zero
from .compile import inner
from .convert import loader, loader_up_to, storer
from .exact import exact_sum, merge_arrays
from .memory import load_f64, load_i64, store_f64
from .simd import (
    LANES,
    first_lane,
    first_lanes,
    fma,
    folded_sums,
    less,
    reduce_add,
    rounding,
    select,
    splat,
    store_folded,
    widen,
)
from .sums import dot, total_of
from .words import FOLDED, FOLDED_SUM

_SINGLE = 2
"""Elements beyond the last vector that are taken one by one: a vector of one is a quarter of the work on 7x7 images."""
_load64, _ = loader("float64", "float64")
_store64 = storer("float64", "float64")[0]


@cache
def short_runs(dtype: str, compute: str, itemsize: int) -> Any:
    """runs(p, channels, count, scratch, folded): arrays of mean, its low part, m2 and count of short channels.

    One by one they would cost 25 ns each beside their sums. `folded`: room for the sums of 16 channels.
    """
    load, load_part = loader(dtype, compute)
    load_up_to = loader_up_to(dtype, compute)
    double = compute == "float64"

    @inner
    def shift_of(q: int, count: int) -> float:
        # float64: the mean, near enough; float32, whose differences are exact in float64: the first element
        if not double:
            return first_lane(widen(load_part(q, 1)))
        total = splat(0.0)
        for j in range(0, count, LANES):
            total += widen(load_up_to(q + j * itemsize, count - j))
        return reduce_add(total) / float(count)

    @inner
    def sixteen(p: int, channels: int, count: int, shifts: int, folded: int, shifted: bool) -> Any:
        # sums of d = x - shift (else of x) and of d*d of up to 16 channels
        singles = folded + 2 * FOLDED_SUM
        zero = splat(0.0)
        whole = count // LANES * LANES
        left = count - whole
        tail = first_lanes(left)
        for c in range(channels):
            q = p + c * count * itemsize
            shift = load_f64(shifts, c) if shifted else 0.0
            minus = splat(-shift)
            total = zero
            square = zero
            for j in range(0, whole, LANES):
                d = widen(load(q + j * itemsize))
                if shifted:
                    d += minus
                total += d
                square = fma(d, d, square)
            if left > _SINGLE:
                d = widen(load_part(q + whole * itemsize, left))
                if shifted:
                    d = select(tail, d + minus, zero)
                total += d
                square = fma(d, d, square)
            else:
                for j in range(left):
                    last = first_lane(widen(load_part(q + (whole + j) * itemsize, 1)))
                    store_f64(singles, j * LANES + c, last - shift)
            store_folded(folded + c * FOLDED, total)
            store_folded(folded + FOLDED_SUM + c * FOLDED, square)
        total = folded_sums(folded)
        square = folded_sums(folded + FOLDED_SUM)
        for j in range(left if left <= _SINGLE else 0):
            d = _load64(singles + 8 * j * LANES)
            total += d
            square = fma(d, d, square)
        return total, square

    @inner
    def runs(p: int, channels: int, count: int, scratch: int, folded: int) -> None:
        padded = 8 * ((channels + LANES - 1) // LANES * LANES)
        n = splat(float(count))
        inverse = splat(1.0 / float(count))
        for c in range(0, channels, LANES):
            # the arrays are whole vectors: what is beyond the last channel is nothing that is read
            q = p + c * count * itemsize
            here = min(LANES, channels - c)
            at = scratch + 8 * c
            cancelled = True
            if not double:
                total, square = sixteen(q, here, count, at, folded, False)
                mean, rest, m2 = about_zero(total, square, n, inverse)
                again = less(m2 * splat(PLAIN), square)
                cancelled = reduce_add(select(again, splat(1.0), splat(0.0))) != 0.0
            if cancelled:
                for k in range(here):
                    store_f64(at, k, shift_of(q + k * count * itemsize, count))
                total, square = sixteen(q, here, count, at, folded, True)
                high, low, squares = about(_load64(at), total, square, n)
                if double:
                    mean, rest, m2 = high, low, squares
                else:
                    mean = select(again, high, mean)
                    rest = select(again, low, rest)
                    m2 = select(again, squares, m2)
            _store64(at, mean)
            _store64(at + padded, rest)
            _store64(at + 2 * padded, m2)
            _store64(at + 3 * padded, n)

    return runs


@inner
def merge_layers(parts: int, layers: int, padded: int, channels: int, out: int) -> None:
    """Arrays of count, mean, its low part and m2 over the channels from those of the layers, in order."""
    zero = splat(0.0)
    layer_bytes = 4 * padded
    for c in range(0, 8 * channels, 8 * LANES):
        total = _load64(parts + c)
        reference = _load64(parts + padded + c)
        for k in range(1, layers):
            at = parts + k * layer_bytes + c
            n = _load64(at)
            reference = select(less(zero, total), reference, _load64(at + padded))
            total += n
        offset = zero
        lost = zero
        for k in range(layers):
            at = parts + k * layer_bytes + c
            n = _load64(at)
            d = (_load64(at + padded) - reference) + _load64(at + 2 * padded)
            term = select(less(zero, n), n * d, zero)
            offset, lost = add_kept(offset, lost, term)
        offset = select(less(zero, total), (offset + lost) / total, zero)
        high = reference + offset
        low = rounding(reference, offset, high)
        m2 = zero
        lost = zero
        for k in range(layers):
            at = parts + k * layer_bytes + c
            n = _load64(at)
            d = (_load64(at + padded) - high) + (_load64(at + 2 * padded) - low)
            term = select(less(zero, n), fma(n * d, d, _load64(at + 3 * padded)), zero)
            m2, lost = add_kept(m2, lost, term)
        _store64(out + c, total)
        _store64(out + padded + c, high)
        _store64(out + 2 * padded + c, low)
        _store64(out + 3 * padded + c, m2 + lost)


@inner
def sort_partials(geometry: int, store: int, scratch: int, masked: bool) -> None:
    """A task's partials, merged over the layers and sorted by group, into the scratch memory."""
    padded = 8 * word(geometry, w.PADDED_WIDTH)
    channels = word(geometry, w.C)
    order = word(geometry, w.ORDER)
    merged = scratch + word(geometry, w.BLOCKS_AT) + 64
    ordered = merged + 4 * padded
    partials = store + word(geometry, w.PARTIALS_AT)
    if word(geometry, w.LAYERS) == 1:
        merged = partials
    else:
        merge_layers(partials, word(geometry, w.LAYERS), padded, channels, merged)
    if not masked:  # all channels have as many elements
        count = splat(load_f64(merged, 0))
        for j in range(0, padded, 8 * LANES):
            _store64(ordered + j, count)
    for j in range(channels):
        c = load_i64(order, j)
        if masked:
            store_f64(ordered, j, load_f64(merged, c))
        store_f64(ordered + padded, j, load_f64(merged + padded, c))
        store_f64(ordered + 2 * padded, j, load_f64(merged + 2 * padded, c))
        store_f64(ordered + 3 * padded, j, load_f64(merged + 3 * padded, c))


@inner
def merge_label(geometry: int, group: int, scratch: int, out: int) -> None:
    """Partial of a group from those of its channels, sorted before."""
    padded = 8 * word(geometry, w.PADDED_WIDTH)
    bounds = word(geometry, w.BOUNDS)
    first = load_i64(bounds, group)
    at = scratch + word(geometry, w.BLOCKS_AT) + 64 + 4 * padded + 8 * first
    merge_arrays(at, at + padded, at + 2 * padded, at + 3 * padded, load_i64(bounds, group + 1) - first, out)


@cache
def group_sums(labelled: bool) -> tuple[Any, Any, Any]:
    """Sums over the channels of a group of a bundle.

    channels_of(geometry, group) -> the first of its places, and how many; channel_at(geometry, place);
    over_group(geometry, group, values, weight, scratch) -> sum of values, times weight where that is no null address.
    """
    if labelled:

        @inner
        def channels_of(geometry: int, group: int) -> Any:
            bounds = word(geometry, w.BOUNDS)
            first = load_i64(bounds, group)
            return first, load_i64(bounds, group + 1) - first

        @inner
        def channel_at(geometry: int, place: int) -> int:
            return load_i64(word(geometry, w.ORDER), place)

        @inner
        def over_group(geometry: int, group: int, values: int, weight: int, scratch: int) -> float:
            order = word(geometry, w.ORDER)
            first, count = channels_of(geometry, group)
            terms = scratch + word(geometry, w.BLOCKS_AT) + 64
            for k in range(count):
                c = load_i64(order, first + k)
                factor = 1.0 if weight == 0 else load_f64(weight, c)
                store_f64(terms, k, factor * load_f64(values, c))
            return exact_sum(terms, count)

        return channels_of, channel_at, over_group

    @inner
    def equal_channels_of(geometry: int, group: int) -> Any:
        size = word(geometry, w.GROUP_CHANNELS)
        return group * size, size

    @inner
    def same_channel(geometry: int, place: int) -> int:
        return place

    @inner
    def over_equal_group(geometry: int, group: int, values: int, weight: int, scratch: int) -> float:
        first, size = equal_channels_of(geometry, group)
        if weight == 0:
            return total_of(values + 8 * first, size)
        return dot(weight + 8 * first, values + 8 * first, size)

    return equal_channels_of, same_channel, over_equal_group
