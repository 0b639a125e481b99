"""Blocks of sixteen samples of a table: into lanes and out of them, with their masks and statistics."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import array_word, word
from .chunks import Place, sample_at
from .compile import inner
from .convert import LINE, itemsize, loader, storer
from .mask_memory import copy_mask, open_mask
from .memory import load_f64, load_i64, store_f64, store_i64
from .simd import LANES, fill_bytes
from .transpose import transpose_bytes, transpose_doubles, transpose_floats


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

    @inner
    def write(geometry: int, call: int, array: int, n0: int, count: int, source: int, scratch: int) -> None:
        tile = scratch + word(geometry, w.BLOCKS_AT)
        rows = tile + LANES * line
        step = place_rows(geometry, array, load_i64(call, array), n0, count, rows)
        channels = word(geometry, w.C)
        stream = LANES * size >= LINE and word(geometry, w.STREAM) != 0  # whole lines alone
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
                elif stream and p & (LINE - 1) == 0:
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
