"""From a task and a chunk's number to memory: the address of a dense array's chunk, or a copy of a strided one's."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import words as w
from .access import array_word, word
from .compile import apart, general, inner
from .memory import load_i32, load_i64, load_u8, load_u16, store_i32, store_i64, store_u8, store_u16
from .simd import LANES
from .words import SHORT_ROWS


class Place(NamedTuple):
    """A chunk's part of the arrays."""

    n: int
    row0: int
    rows: int
    first: int
    """Its first channel, from the sample's first."""
    channel0: int
    """The same, from the bundle's first."""
    channels: int
    start: int
    """Within a channel, as length."""
    length: int
    layer: int
    """The chunk's number among those that have a part of the same channel."""


@inner
def place_of(geometry: int, task: int, chunk: int) -> Any:
    """Which part of the arrays a task's chunk is."""
    bundles = word(geometry, w.BUNDLES)
    width = word(geometry, w.BUNDLE_CHANNELS)
    parts = word(geometry, w.PARTS)
    part = chunk % parts
    rest = chunk // parts
    across = word(geometry, w.CHANNEL_CHUNKS)
    channel0 = (rest % across) * word(geometry, w.CHANNELS)
    row_chunk = rest // across
    row0 = row_chunk * word(geometry, w.ROWS)
    rows = min(word(geometry, w.ROWS), word(geometry, w.OUTER) - row0)
    channels = min(word(geometry, w.CHANNELS), width - channel0)
    start = part * word(geometry, w.PART)
    length = min(word(geometry, w.PART), word(geometry, w.INNER) - start)
    first = task % bundles * width + channel0
    return Place(task // bundles, row0, rows, first, channel0, channels, start, length, row_chunk * parts + part)


@inner
def turn_of(cols: int) -> int:
    """Elements after which rows may be taken to begin again: those of a row, or of some where one is not a vector."""
    return cols if cols >= LANES else cols * ((SHORT_ROWS + cols - 1) // cols)


@inner
def rows_together(rows: int, cols: int, lined: bool) -> int:
    """How many rows are gone over as one, column by column: more than one of short ones that lie one after another."""
    together = turn_of(cols) // cols
    return together if lined and rows >= 8 * together else 1


@inner
def copy_run(target: int, target_step: int, source: int, source_step: int, count: int, itemsize: int) -> None:
    """Copy count items, each side with its own distance between items."""
    if itemsize == 4:
        for k in range(count):
            store_i32(target + k * target_step, 0, load_i32(source + k * source_step, 0))
    elif itemsize == 8:
        for k in range(count):
            store_i64(target + k * target_step, 0, load_i64(source + k * source_step, 0))
    elif itemsize == 2:
        for k in range(count):
            store_u16(target + k * target_step, 0, load_u16(source + k * source_step, 0))
    else:
        for k in range(count):
            store_u8(target + k * target_step, 0, load_u8(source + k * source_step, 0))


@inner
def offset_of(axes: int, count: int, index: int) -> int:
    """Bytes from the origin to a flat index over `count` axes, which are pairs (size, stride)."""
    if count == 1:  # without the divisions
        return index * load_i64(axes, 1)
    offset = 0
    for k in range(count - 1, -1, -1):
        size = load_i64(axes, 2 * k)
        offset += (index % size) * load_i64(axes, 2 * k + 1)
        index //= size
    return offset


@apart
def move_chunk(geometry: int, call: int, array: int, place: Any, piece: int, gather: bool) -> None:
    """Copy a strided array's chunk to the scratch memory (gather), or back."""
    channels, start, length = place.channels, place.start, place.length
    # axes: channel stride, number of batch, outer and inner axes, then (size, stride) of each, batch axes first
    axes = array_word(geometry, array, w.AXES)
    itemsize = array_word(geometry, array, w.ITEMSIZE)
    channel_stride = load_i64(axes, 0)
    batch_axes = load_i64(axes, 1)
    outer_axes = load_i64(axes, 2)
    inner_axes = load_i64(axes, 3)
    outer = axes + 32 + 16 * batch_axes
    inside = outer + 16 * outer_axes
    origin = load_i64(call, array) + offset_of(axes + 32, batch_axes, place.n) + place.first * channel_stride
    for r in range(place.rows):
        row = origin + offset_of(outer, outer_axes, place.row0 + r)
        if inner_axes == 0:
            if gather:
                copy_run(piece, itemsize, row, channel_stride, channels, itemsize)
            else:
                copy_run(row, channel_stride, piece, itemsize, channels, itemsize)
            piece += channels * itemsize
            continue
        last_size = load_i64(inside, 2 * (inner_axes - 1))
        last_stride = load_i64(inside, 2 * (inner_axes - 1) + 1)
        for c in range(channels):
            index = start
            while index < start + length:
                along = index % last_size
                count = min(last_size - along, start + length - index)
                here = row + c * channel_stride + offset_of(inside, inner_axes, index)
                if gather:
                    copy_run(piece, itemsize, here, last_stride, count, itemsize)
                else:
                    copy_run(here, last_stride, piece, itemsize, count, itemsize)
                piece += count * itemsize
                index += count


@apart
def sample_of_axes(geometry: int, array: int, n: int) -> int:
    """Bytes from the first sample of an array to sample n, by its batch axes."""
    axes = array_word(geometry, array, w.AXES)
    return offset_of(axes + 32, load_i64(axes, 1), n)


@general
def sample_at(geometry: int, array: int, base: int, n: int) -> int:
    """Address of a sample of a dense array."""
    if array_word(geometry, array, w.APART) == 0:
        return base + n * array_word(geometry, array, w.SN)
    return base + sample_of_axes(geometry, array, n)


@general
def open_dense(geometry: int, call: int, array: int, place: Any, scratch: int, read: bool) -> Any:
    """A dense array's chunk, where it lies."""
    step = array_word(geometry, array, w.SO)
    inside = (place.first * word(geometry, w.INNER) + place.start) * array_word(geometry, array, w.ITEMSIZE)
    return sample_at(geometry, array, load_i64(call, array), place.n) + place.row0 * step + inside, step


@general
def close_dense(geometry: int, call: int, array: int, place: Any, scratch: int) -> None:
    """Nothing: results are where they belong."""


@inner
def piece_of(geometry: int, array: int, scratch: int) -> int:
    """Memory for a strided array's chunk."""
    return scratch + word(geometry, w.PIECES_AT) + array * word(geometry, w.PIECE_BYTES)


@apart
def open_any(geometry: int, call: int, array: int, place: Any, scratch: int, read: bool) -> Any:
    """An array's chunk: where it lies, or a piece of memory, with a strided one's elements if they are read."""
    if array_word(geometry, array, w.STRIDED) == 0:
        return open_dense(geometry, call, array, place, scratch, read)
    piece = piece_of(geometry, array, scratch)
    if read:
        move_chunk(geometry, call, array, place, piece, True)
    return piece, place.channels * place.length * array_word(geometry, array, w.ITEMSIZE)


@apart
def close_any(geometry: int, call: int, array: int, place: Any, scratch: int) -> None:
    """Write the results of a strided array's chunk back."""
    if array_word(geometry, array, w.STRIDED) != 0:
        move_chunk(geometry, call, array, place, piece_of(geometry, array, scratch), False)


def chunk_memory(dense: bool) -> tuple[Any, Any]:
    """open_chunk and close_chunk for dense arrays, which are used in place, or for any.

    open_chunk(geometry, call, array, place, scratch, read) -> address, distance between rows
    close_chunk(the same without read) writes a strided chunk's results back

    Forward and backward of dense arrays know that they are: there is less to compile before a first call.
    """
    return (open_dense, close_dense) if dense else (open_any, close_any)
