"""The first phase of every operation: moments of the chunks of a task, merged into a record for each group."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import words as w
from .access import word
from .block_moments import block_kernels, merge, segment_partial
from .chunks import chunk_memory, place_of, rows_together
from .compile import inner, within
from .convert import itemsize, loader, storer
from .labelled import merge_label, short_runs, sort_partials
from .mask_memory import open_mask
from .masked import SHORT, masked_kernels, merge_columns
from .memory import bits_float, float_bits, load_f64, load_i64, store_f64
from .simd import LANES, narrow_scalar, reduce_max, splat, vector_abs, vector_max, widen, widen_scalar
from .words import PARTIAL_BYTES

_X = 0  # position among the arrays of the geometry
_load64, _ = loader("float64", "float64")
_store64_part = storer("float64", "float64")[1]


@inner
def exponent(value: float) -> int:
    """floor(log2(|value|)); 1024 for infinity and NaN, -1023 for zero and subnormal numbers."""
    return ((float_bits(value) >> 52) & 2047) - 1023


@inner
def padded_bytes(columns: int) -> int:
    """Bytes of float64 values of columns, in whole vectors."""
    return 8 * ((columns + LANES - 1) // LANES * LANES)


@inner
def power_of_two(k: int) -> float:
    """2.0**k for k in the range of normal numbers."""
    return bits_float((k + 1023) << 52)


def record_writer(compute: str) -> Any:
    """fill(record, high, low, scale, root, root_scale): how the elements of a group become x_hat.

    The mean is (high + low) / scale and rstd is root * root_scale; both scales are powers of two.

    x_hat = (fma(x, POWER, MINUS_HIGH) + MINUS_LOW) * RATIO, where POWER is the power of two next to rstd, so that no
    product over- or underflows: 3e38, 1e20 and 1e-25 take the same path as 1. A mean that is far larger than the
    standard deviation (constant groups) holds POWER down.
    """
    double = compute == "float64"
    low_end, high_end, mean_end = (-1022, 1023, 1022) if double else (-126, 127, 100)

    @inner
    def fill(record: int, high: float, low: float, scale: float, root: float, root_scale: float) -> None:
        mean = high / scale
        rstd = root * root_scale
        k = min(max(exponent(rstd), low_end), high_end)
        k = max(min(k, mean_end - exponent(mean)), low_end)
        power = power_of_two(k)
        if not double:
            rounded = widen_scalar(narrow_scalar(high))
            low += high - rounded
            high = rounded
        store_f64(record, w.MEAN, mean)
        store_f64(record, w.RSTD, rstd)
        store_f64(record, w.POWER, power)
        store_f64(record, w.DX_POWER, power)
        # a subnormal mean would lose its digits here if it were divided by the scale first
        store_f64(record, w.MINUS_HIGH, -high * (power / scale))
        store_f64(record, w.MINUS_LOW, -low * (power / scale))
        inverse = power_of_two(-k) if k < 1023 else 0.5 * power_of_two(-1022)
        store_f64(record, w.RATIO, root * (root_scale * inverse))

    return fill


@inner
def pair(record: int, eps: float) -> None:
    """A group of two elements, whose rstd was taken from them with this eps.

    A*dz + C and B*t are the same but for eps * rstd**2 of them, which is what dx is: in the difference of the two
    float64 is 50 times the bound off. So dx = eps * rstd**2 * POWER * (A*dz + C).
    """
    rstd = load_f64(record, w.RSTD)
    share = eps * (rstd * rstd) if eps > 0.0 else 0.0  # without eps the square may be infinite
    store_f64(record, w.DX_POWER, load_f64(record, w.POWER) * share)
    store_f64(record, w.SLOPE, 0.0)


@inner
def rstd_of(m2: float, count: float, scale: float, eps: float) -> Any:
    """1/sqrt(m2/count/scale**2 + eps) as a number and the power of two to multiply it by: together never out of
    range.
    """
    variance = m2 / count
    if scale <= 1.0:
        unscaled = variance / scale / scale
        if unscaled < 2.0**1000:
            return 1.0 / math.sqrt(unscaled + eps), 1.0
        return 1.0 / math.sqrt(variance), scale  # eps has no part in it
    scaled_eps = eps * scale * scale
    if scaled_eps == math.inf:
        return 1.0 / math.sqrt(eps), 1.0  # the variance has none
    return 1.0 / math.sqrt(variance + scaled_eps), scale


@inner
def scale_below(top: float) -> float:
    """The power of two by which squares of numbers up to `top` stay in float64's range; 1 if they are there, or if
    nothing is a number.
    """
    k = exponent(top)
    if k == 1024 or -400 < k < 400 or top == 0.0:
        return 1.0
    return power_of_two(min(max(-k, -1022), 1022))


@inner
def in_range(m2: float) -> bool:
    """Whether no square left float64's range on the way to m2."""
    return 2.0**-900 < m2 < 2.0**1000


@cache
def largest_kernel(dtype: str, compute: str) -> Any:
    """largest(p, rows, step, cols) -> the largest |x|."""
    _, load_part = loader(dtype, compute)
    size = itemsize(dtype)

    @inner
    def largest(p: int, rows: int, step: int, cols: int) -> float:
        best = widen(vector_abs(load_part(p, 0)))
        for r in range(rows):
            for j in range(0, cols, LANES):
                best = vector_max(best, widen(vector_abs(load_part(p + r * step + j * size, min(LANES, cols - j)))))
        return reduce_max(best)

    return largest


@cache
def statistics(
    dtype: str, compute: str, by_rows: bool, dense: bool, labelled: bool = False, masked: bool = False
) -> tuple[Any, Any, Any]:
    """chunk(geometry, call, task, chunk, store, scratch), then merge(geometry, store, scratch) once for a task, and
    group(geometry, call, task, group, store, scratch, out): a group's partial, whose scale it returns.

    A group is a segment of a chunk's elements, or with labels segments of one channel each. Then partials are arrays
    over the channels: those of the layers of chunks are merged channel by channel and sorted by group.
    """
    rect, columns = block_kernels(dtype, compute, itemsize(dtype))
    masked_rect, masked_columns, masked_runs, masked_largest = masked_kernels(dtype, compute, itemsize(dtype))
    runs = short_runs(dtype, compute, itemsize(dtype))
    largest = largest_kernel(dtype, compute)
    size = itemsize(dtype)
    double = compute == "float64"
    open_chunk, _ = chunk_memory(dense)

    @inner
    def keep(geometry: int, partial: int, target: int, layer: int, channel: int) -> None:
        # a channel's partial into the arrays of its layer
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        target += 4 * layer * padded
        for k in range(4):
            store_f64(target + k * padded, channel, load_f64(partial, k))

    @inner
    def keep_columns(
        geometry: int, arrays: int, step: int, count: float, channels: int, target: int, layer: int, channel0: int
    ) -> None:
        # the same of all channels: from arrays of mean, its low part, m2, and of counts where they are not all `count`
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        target += 4 * layer * padded + 8 * channel0
        for j in range(0, channels, LANES):
            left = min(LANES, channels - j)
            if masked:
                _store64_part(target + 8 * j, _load64(arrays + 3 * step + 8 * j), left)
            else:
                _store64_part(target + 8 * j, splat(count), left)
            for k in range(3):
                _store64_part(target + (k + 1) * padded + 8 * j, _load64(arrays + k * step + 8 * j), left)

    @inner
    def chunk_moments(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        width = word(geometry, w.BUNDLE_CHANNELS)
        segments = word(geometry, w.SEGMENTS)
        place = place_of(geometry, task, chunk)
        rows, channel0, channels, length = place.rows, place.channel0, place.channels, place.length
        p, step = open_chunk(geometry, call, _X, place, scratch, True)
        pm, m_step = 0, 0
        if masked:
            pm, m_step = open_mask(geometry, call, place, scratch)
        blocks = scratch + word(geometry, w.BLOCKS_AT)
        partials = store + word(geometry, w.PARTIALS_AT)
        if segments == 1:
            out = partials + chunk * PARTIAL_BYTES
        else:
            out = partials + (place.layer * segments + channel0 // (width // segments)) * PARTIAL_BYTES
        cols = channels * length
        of_segment = min(width // segments, channels) * length
        if by_rows:  # noqa: SIM102 - known when the kernel is compiled, which then has no columns in it
            if word(geometry, w.BY_COLUMNS) != 0:
                together = 1 if masked else rows_together(rows, cols, step == cols * size)
                whole = rows // together
                rest = rows - whole * together
                each = padded_bytes(together * cols)
                if masked:
                    masked_columns(p, rows, step, pm, m_step, cols, 1.0, blocks, word(geometry, w.TOUCHED))
                else:
                    for part in range(2 if rest > 0 else 1):
                        at, height, many = 0, whole, together
                        if part == 1:
                            at, height, many = whole * together, rest, 1
                        columns(
                            p + at * step, height, many * step, many * cols, 1.0,
                            blocks + 5 * each * part, word(geometry, w.TOUCHED),
                        )  # fmt: skip
                if labelled and of_segment == 1 and together == 1:
                    keep_columns(geometry, blocks, each, float(rows), channels, partials, place.layer, channel0)
                    return
                for first in range(0, cols, of_segment):
                    at = blocks + 8 * first
                    target = blocks - 64 if labelled else out
                    if masked:
                        merge_columns(at + 3 * each, at, at + each, at + 2 * each, of_segment, target)
                    elif together == 1:
                        segment_partial(at, at + each, at + 2 * each, of_segment, float(rows), target)
                    else:
                        # a segment is in each of the rows that were one, and in those that were left
                        at_rest = blocks + 5 * each
                        each_rest = padded_bytes(cols)
                        parts = at_rest + 5 * each_rest
                        for k in range(together + (rest > 0)):
                            if k < together:
                                at, apart, count = blocks + 8 * (k * cols + first), each, float(whole)
                            else:
                                at, apart, count = at_rest + 8 * first, each_rest, float(rest)
                            segment_partial(
                                at, at + apart, at + 2 * apart, of_segment, count, parts + k * PARTIAL_BYTES
                            )
                        merge(parts, together + (rest > 0), PARTIAL_BYTES, target)
                    if labelled:
                        keep(geometry, target, partials, place.layer, channel0 + first // of_segment)
                    out += PARTIAL_BYTES
                return
        if labelled:  # noqa: SIM102
            if rows == 1 and length <= SHORT:
                each = 8 * ((channels + LANES - 1) // LANES * LANES)
                if masked:
                    masked_runs(p, pm, channels, length, blocks)
                else:
                    runs(p, channels, length, blocks, blocks + 4 * each)
                keep_columns(geometry, blocks, each, float(length), channels, partials, place.layer, channel0)
                return
        for first in range(0, cols, of_segment):
            target = blocks if labelled else out
            if masked:
                masked_rect(p + first * size, rows, step, pm + first, m_step, of_segment, 1.0, blocks, target)
            else:
                rect(p + first * size, rows, step, of_segment, 1.0, blocks, target)
            if labelled:
                keep(geometry, blocks, partials, place.layer, channel0 + first // of_segment)
            out += PARTIAL_BYTES

    @inner
    def revisit(geometry: int, call: int, task: int, segment: int, store: int, scratch: int, scale: float) -> float:
        # one segment again, chunk by chunk: its largest |x| if scale is 0, else its partials of x*scale
        width = word(geometry, w.BUNDLE_CHANNELS)
        segments = word(geometry, w.SEGMENTS)
        first = segment * (width // segments)
        best = 0.0
        for chunk in range(word(geometry, w.CHUNKS)):
            place = place_of(geometry, task, chunk)
            rows, channel0, channels, length = place.rows, place.channel0, place.channels, place.length
            if segments > 1 and not (channel0 <= first < channel0 + channels):
                continue
            p, step = open_chunk(geometry, call, _X, place, scratch, True)
            pm, m_step = 0, 0
            if masked:
                pm, m_step = open_mask(geometry, call, place, scratch)
            cols = channels * length
            which = chunk
            if segments > 1:
                p += (first - channel0) * length * size
                pm += (first - channel0) * length
                cols = width // segments * length
                which = place.layer * segments + segment
            if scale == 0.0:
                if masked:
                    best = max(best, masked_largest(p, rows, step, pm, m_step, cols))
                else:
                    best = max(best, largest(p, rows, step, cols))
            else:
                blocks = scratch + word(geometry, w.BLOCKS_AT)
                partials = store + word(geometry, w.PARTIALS_AT)
                out = blocks if labelled else partials + which * PARTIAL_BYTES
                if masked:
                    masked_rect(p, rows, step, pm, m_step, cols, scale, blocks, out)
                else:
                    rect(p, rows, step, cols, scale, blocks, out)
                if labelled:
                    keep(geometry, blocks, partials, place.layer, segment)
        return best

    @inner
    def merge_task(geometry: int, store: int, scratch: int) -> None:
        if labelled:
            sort_partials(geometry, store, scratch, masked)

    @inner
    def merge_group(geometry: int, group: int, store: int, scratch: int, out: int) -> None:
        if labelled:
            merge_label(geometry, group, scratch, out)
        else:
            segments = word(geometry, w.SEGMENTS)
            count = word(geometry, w.CHUNKS) if segments == 1 else word(geometry, w.LAYERS)
            merge(store + word(geometry, w.PARTIALS_AT) + group * PARTIAL_BYTES, count, segments * PARTIAL_BYTES, out)

    @inner
    def revisit_group(geometry: int, call: int, task: int, group: int, store: int, scratch: int, scale: float) -> float:
        if not labelled:
            return revisit(geometry, call, task, group, store, scratch, scale)
        bounds, order = word(geometry, w.BOUNDS), word(geometry, w.ORDER)
        best = 0.0
        for k in range(load_i64(bounds, group), load_i64(bounds, group + 1)):
            best = max(best, revisit(geometry, call, task, load_i64(order, k), store, scratch, scale))
        merge_task(geometry, store, scratch)
        return best

    @within  # a call would be 12 ns, of some 60 for a small group
    def group_moments(geometry: int, call: int, task: int, group: int, store: int, scratch: int, out: int) -> float:
        """A group's partial, and the power of two that x was multiplied by."""
        merge_group(geometry, group, store, scratch, out)
        if not double:
            return 1.0
        if in_range(load_f64(out, 3)):
            return 1.0
        # zero, or squares out of float64's range, or NaN and infinity in the data
        scale = scale_below(revisit_group(geometry, call, task, group, store, scratch, 0.0))
        if scale == 1.0:
            return 1.0
        revisit_group(geometry, call, task, group, store, scratch, scale)
        merge_group(geometry, group, store, scratch, out)
        return scale

    return chunk_moments, merge_task, group_moments
