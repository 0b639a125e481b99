"""A chunk's booleans as contiguous bytes.

A mask is read in place where its memory is that of x, else copied chunk by chunk: a byte an element, 16 at a time along
an axis of stride 1 or 0, so that one that broadcasts costs what any other does.
"""

from __future__ import annotations

from typing import Any

from . import words as w
from .access import array_word, word
from .chunks import offset_of
from .compile import inner
from .convert import mask_loader
from .memory import load_i64, load_u8, store_u8
from .simd import LANES, copy_bytes, fill_bytes

_load_mask, _load_mask_part = mask_loader()


@inner
def copy_mask(target: int, source: int, step: int, count: int) -> None:
    """Copy `count` bytes that lie `step` apart; up to 15 beyond the end are written, none beyond it read."""
    if step == 1:
        whole = count // LANES * LANES
        for k in range(0, whole, LANES):
            copy_bytes(target + k, source + k)
        for k in range(whole, count):
            store_u8(target + k, 0, load_u8(source + k, 0))
    elif step == 0:
        value = int(load_u8(source, 0))
        for k in range(0, count, LANES):
            fill_bytes(target + k, value)
    else:
        for k in range(count):
            store_u8(target + k, 0, load_u8(source + k * step, 0))


@inner
def open_mask(geometry: int, call: int, place: Any, scratch: int) -> Any:
    """Address of a chunk's booleans, and the distance between their rows."""
    channels, start, length = place.channels, place.start, place.length
    base = load_i64(call, w.MASK)
    if array_word(geometry, w.MASK, w.STRIDED) == 0:
        step = array_word(geometry, w.MASK, w.SO)
        row = base + place.n * array_word(geometry, w.MASK, w.SN) + place.row0 * step
        return row + place.first * word(geometry, w.INNER) + start, step
    axes = array_word(geometry, w.MASK, w.AXES)
    channel_stride = load_i64(axes, 0)
    batch_axes = load_i64(axes, 1)
    outer_axes = load_i64(axes, 2)
    inner_axes = load_i64(axes, 3)
    outer = axes + 32 + 16 * batch_axes
    inside = outer + 16 * outer_axes
    origin = base + offset_of(axes + 32, batch_axes, place.n) + place.first * channel_stride
    piece = scratch + word(geometry, w.MASK_PIECE_AT)
    target = piece
    for r in range(place.rows):
        row = origin + offset_of(outer, outer_axes, place.row0 + r)
        if inner_axes == 0:
            copy_mask(target, row, channel_stride, channels)
            target += channels
            continue
        last_size = load_i64(inside, 2 * (inner_axes - 1))
        last_stride = load_i64(inside, 2 * (inner_axes - 1) + 1)
        if inner_axes == 1:
            for c in range(channels):
                copy_mask(target, row + c * channel_stride + start * last_stride, last_stride, length)
                target += length
            continue
        for c in range(channels):
            index = start
            while index < start + length:
                along = index % last_size
                count = min(last_size - along, start + length - index)
                copy_mask(target, row + c * channel_stride + offset_of(inside, inner_axes, index), last_stride, count)
                target += count
                index += count
    return piece, channels * length


@inner
def mask_at(pm: int, left: int) -> Any:
    """The next 16 booleans, False beyond the end."""
    if left >= LANES:
        return _load_mask(pm)
    return _load_mask_part(pm, left)
