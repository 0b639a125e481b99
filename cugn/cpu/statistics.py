"""The first phase of every operation: moments of the chunks of a task, merged into a record for each group."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import words as w
from .access import word
from .chunks import chunk_memory, chunk_of
from .compile import inner
from .convert import loader
from .moments import block_kernels, merge
from .simd import (
    LANES,
    bits_float,
    float_bits,
    load_f64,
    narrow_scalar,
    reduce_max,
    store_f64,
    vector_abs,
    vector_max,
    widen,
    widen_scalar,
)
from .words import PARTIAL_BYTES

_ITEMSIZE = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float32": 4, "float64": 8}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return _ITEMSIZE[dtype]


@inner
def exponent(value: float) -> int:
    """floor(log2(|value|)); 1024 for infinity and NaN, -1023 for zero and subnormal numbers."""
    return ((float_bits(value) >> 52) & 2047) - 1023


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
    low_end, high_end, mean_end = (-1022, 1023, 900) if double else (-126, 127, 100)

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
        # a subnormal mean would lose its digits here if it were divided by the scale first
        store_f64(record, w.MINUS_HIGH, -high * (power / scale))
        store_f64(record, w.MINUS_LOW, -low * (power / scale))
        store_f64(record, w.RATIO, root * (root_scale / power))

    return fill


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


@cache
def statistics(dtype: str, compute: str, array: int, by_rows: bool, strided: bool) -> tuple[Any, Any]:
    """chunk(geometry, base, task, chunk, store, scratch), and group(..., segment, ...): a segment's partial and
    scale.
    """
    rect, columns = block_kernels(dtype, compute, itemsize(dtype))
    _, load_part = loader(dtype, compute)
    size = itemsize(dtype)
    double = compute == "float64"
    open_chunk, row_bytes, _ = chunk_memory(strided)

    @inner
    def chunk_moments(geometry: int, base: int, task: int, chunk: int, store: int, scratch: int) -> None:
        bundles = word(geometry, w.BUNDLES)
        width = word(geometry, w.BUNDLE_CHANNELS)
        segments = word(geometry, w.SEGMENTS)
        row0, rows, channel0, channels, start, length, layer = chunk_of(geometry, chunk)
        p = open_chunk(
            geometry, array, base, task // bundles, row0, rows, (task % bundles) * width + channel0, channels,
            start, length, scratch + word(geometry, w.PIECES_AT), True,
        )  # fmt: skip
        step = row_bytes(geometry, array, channels, length)
        blocks = scratch + word(geometry, w.BLOCKS_AT)
        partials = store + word(geometry, w.PARTIALS_AT)
        if segments == 1:
            out = partials + chunk * PARTIAL_BYTES
        else:
            out = partials + (layer * segments + channel0 // (width // segments)) * PARTIAL_BYTES
        of_segment = min(width // segments, channels) * length
        if by_rows:  # noqa: SIM102 - known when the kernel is compiled, which then has no columns in it
            if word(geometry, w.BY_COLUMNS) != 0:
                columns(p, rows, step, channels * length, 1.0, blocks, of_segment, out)
                return
        for first in range(0, channels * length, of_segment):
            rect(p + first * size, rows, step, of_segment, 1.0, blocks, out)
            out += PARTIAL_BYTES

    @inner
    def largest(p: int, rows: int, step: int, cols: int) -> float:
        best = widen(vector_abs(load_part(p, 0)))
        for r in range(rows):
            for j in range(0, cols, LANES):
                best = vector_max(best, widen(vector_abs(load_part(p + r * step + j * size, min(LANES, cols - j)))))
        return reduce_max(best)

    @inner
    def revisit(geometry: int, base: int, task: int, segment: int, store: int, scratch: int, scale: float) -> float:
        # one segment again, chunk by chunk: its largest |x| if scale is 0, else its partials of x*scale
        bundles = word(geometry, w.BUNDLES)
        width = word(geometry, w.BUNDLE_CHANNELS)
        segments = word(geometry, w.SEGMENTS)
        first = segment * (width // segments)
        best = 0.0
        for chunk in range(word(geometry, w.CHUNKS)):
            row0, rows, channel0, channels, start, length, layer = chunk_of(geometry, chunk)
            if segments > 1 and not (channel0 <= first < channel0 + channels):
                continue
            p = open_chunk(
                geometry, array, base, task // bundles, row0, rows, (task % bundles) * width + channel0, channels,
                start, length, scratch + word(geometry, w.PIECES_AT), True,
            )  # fmt: skip
            step = row_bytes(geometry, array, channels, length)
            cols = channels * length
            which = chunk
            if segments > 1:
                p += (first - channel0) * length * size
                cols = width // segments * length
                which = layer * segments + segment
            if scale == 0.0:
                best = max(best, largest(p, rows, step, cols))
            else:
                out = store + word(geometry, w.PARTIALS_AT) + which * PARTIAL_BYTES
                rect(p, rows, step, cols, scale, scratch + word(geometry, w.BLOCKS_AT), out)
        return best

    @inner
    def merge_segment(geometry: int, segment: int, store: int, out: int) -> None:
        segments = word(geometry, w.SEGMENTS)
        count = word(geometry, w.CHUNKS) if segments == 1 else word(geometry, w.LAYERS)
        merge(store + word(geometry, w.PARTIALS_AT) + segment * PARTIAL_BYTES, count, segments * PARTIAL_BYTES, out)

    @inner
    def segment_moments(geometry: int, base: int, task: int, segment: int, store: int, scratch: int, out: int) -> float:
        """A segment's partial, and the power of two that x was multiplied by."""
        merge_segment(geometry, segment, store, out)
        if not double:
            return 1.0
        m2 = load_f64(out, 3)
        if 2.0**-900 < m2 < 2.0**1000:
            return 1.0
        # zero, or squares out of float64's range, or NaN and infinity in the data
        top = revisit(geometry, base, task, segment, store, scratch, 0.0)
        k = exponent(top)
        if k == 1024 or -400 < k < 400 or top == 0.0:
            return 1.0
        scale = power_of_two(min(max(-k, -1022), 1022))
        revisit(geometry, base, task, segment, store, scratch, scale)
        merge_segment(geometry, segment, store, out)
        return scale

    return chunk_moments, segment_moments
