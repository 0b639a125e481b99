"""One native look at the arrays of a call: the call that `recent.py` knows it by, and whether its `out` lies apart."""

from __future__ import annotations

from . import recent as r
from .compile import inner
from .memory import load_i32, load_i64, store_i64


@inner
def describe(array: int, at: int) -> tuple[int, int, int]:
    """Write number of axes, dtype, shape and strides from an address on; first byte, an end, and the address behind."""
    fields = array + r.HEADER
    axes = load_i32(fields, r.NDIM) & 0xFFFFFFFF
    shape, strides = load_i64(fields, r.DIMENSIONS), load_i64(fields, r.STRIDES)
    low = high = load_i64(fields, r.DATA)
    store_i64(at, 0, axes)
    store_i64(at, 1, load_i64(fields, r.DTYPE))
    at += 16
    for axis in range(axes):
        n, stride = load_i64(shape, axis), load_i64(strides, axis)
        store_i64(at, 0, n)
        store_i64(at, 1, stride)
        at += 16
        reach = stride * (n - 1)
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high + r.LARGEST_ITEM, at


def look(table: int, call: int, count: int, groups: int, replaceable: int, number: int) -> int:
    """Twice the number of the call that looks like this one, plus 1 where `out` needs a closer look; 0: there is none.

    `call` is the id of a tuple: `count` arrays, four objects known by their ids, and eps. The last array is an `out` if
    it may be one of the first `replaceable`, x first. With a `number`, the call is entered under that one; the number
    of the call that stood in its place, or -1 where it cannot be described.
    """
    room = table + 8 * r.ROOM
    at = room
    items = call + r.ITEMS
    for k in range(count, count + r.NAMED):
        store_i64(at, 0, load_i64(items, k))
        at += 8
    store_i64(at, 0, load_i64(load_i64(items, count + r.NAMED) + r.HEADER, 0))  # a float's bits
    store_i64(at, 1, groups)
    at += 16
    none, ndarray = load_i64(table, r.NONE), load_i64(table, r.NDARRAY)
    out = load_i64(items, count - 1)
    written = replaceable != 0 and out != none
    low = high = 0
    apart = True
    for back in range(count):
        k = count - 1 - back
        array = load_i64(items, k)
        if array == none:
            store_i64(at, 0, -1)
            at += 8
            continue
        if load_i64(array + r.HEADER, -1) != ndarray or load_i32(array + r.HEADER, r.NDIM) > r.MOST_AXES:
            return -1 if number else 0
        first, end, at = describe(array, at)
        if k == count - 1:
            low, high = first, end
            flags = load_i32(array + r.HEADER, r.FLAGS)
            apart = flags & r.WRITEABLE != 0 and flags & (r.CONTIGUOUS | r.OWNED) != 0
        elif first < high and low < end and not (array == out and k < replaceable):
            apart = False
    length = (at - room) // 8
    mixed = length
    for k in range(length):
        mixed = (mixed ^ load_i64(room, k)) * 0x1E3779B97F4A7C15
        mixed ^= (mixed >> 29) & 0x7FFFFFFFF
    slot = table + 8 * (r.FIRST + r.SLOT * (mixed & (r.SLOTS - 1)))
    known = load_i64(slot, r.NUMBER)
    if number:
        store_i64(slot, r.NUMBER, number)
        store_i64(slot, r.WORDS, length)
        for k in range(length):
            store_i64(slot, r.DESCRIPTION + k, load_i64(room, k))
        return known
    if load_i64(slot, r.WORDS) != length:
        return 0
    for k in range(length):
        if load_i64(slot, r.DESCRIPTION + k) != load_i64(room, k):
            return 0
    return 2 * known + (1 if written and not apart else 0)
