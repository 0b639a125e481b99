"""dweight and dbias: a task's sums into a part of the batch, and the parts, in order, into the results.

A part is PART_SAMPLES samples, each added in order and without loss (two float64), so that the bits depend on N but not
on the threads. Tasks that are split between threads are added at the end, by the caller.
"""

from __future__ import annotations

from . import words as w
from .access import word
from .compile import inner
from .convert import loader, storer
from .memory import load_i64
from .simd import LANES, rounding, splat
from .sums import accumulate

_load64, _ = loader("float64", "float64")
_, _store64_part, _ = storer("float64", "float64")
_, _store32_part, _ = storer("float32", "float64")
_, _store_half_part, _ = storer("float16", "float64")
_, _store_bfloat_part, _ = storer("bfloat16", "float64")


@inner
def add_to_gradients(geometry: int, work: int, task: int, store: int) -> None:
    """A task's sums into the partial sums of its samples."""
    bundles = word(geometry, w.BUNDLES)
    n = task // bundles
    width = word(geometry, w.BUNDLE_CHANNELS)
    at = 8 * (task % bundles) * width
    padded = 8 * word(geometry, w.PADDED_WIDTH)
    totals = store + word(geometry, w.TOTALS_AT)
    size = word(geometry, w.GRADIENT_BYTES)
    part = work + word(geometry, w.GRADIENTS_AT) + n // word(geometry, w.PART_SAMPLES) * size
    accumulate(part + at, part + size // 4 + at, totals, width)
    accumulate(part + size // 2 + at, part + size // 4 * 3 + at, totals + padded, width)


@inner
def task_gradients(geometry: int, call: int, task: int, store: int) -> None:
    """A finished task's sums into its part, at once if one thread does the part."""
    if word(geometry, w.SPLIT) == 0:
        add_to_gradients(geometry, load_i64(call, w.CALL_WORK), task, store)


@inner
def gather_gradients(geometry: int, call: int) -> None:
    """dweight and dbias of a call whose tasks are all done, if it has them."""
    if load_i64(call, w.CALL_DWEIGHT) == 0:
        return
    work = load_i64(call, w.CALL_WORK)
    if word(geometry, w.SPLIT) != 0:
        stores = work + word(geometry, w.STORE_AT)
        for task in range(word(geometry, w.N) * word(geometry, w.BUNDLES)):
            add_to_gradients(geometry, work, task, stores + task * word(geometry, w.STORE_BYTES))
    write_gradients(geometry, work, load_i64(call, w.CALL_DWEIGHT), load_i64(call, w.CALL_DBIAS))


@inner
def write_gradients(geometry: int, work: int, dweight: int, dbias: int) -> None:
    """Merge the partial sums, in order, into dweight and dbias."""
    size = word(geometry, w.GRADIENT_BYTES)
    first = work + word(geometry, w.GRADIENTS_AT)
    channels = word(geometry, w.C)
    for which in range(2):
        target = dbias if which == 0 else dweight
        for c in range(0, channels, LANES):
            total = splat(0.0)
            lost = splat(0.0)
            for part in range(word(geometry, w.GRADIENT_PARTS)):
                here = first + part * size + which * (size // 2) + 8 * c
                term = _load64(here)
                moved = total + term
                lost += rounding(total, term, moved) + _load64(here + size // 4)
                total = moved
            kind, here, total = word(geometry, w.WEIGHT_KIND), min(LANES, channels - c), total + lost
            if kind == w.FLOAT32:
                _store32_part(target + 4 * c, total, here)
            elif kind == w.FLOAT64:
                _store64_part(target + 8 * c, total, here)
            elif kind == w.FLOAT16:
                _store_half_part(target + 2 * c, total, here)
            else:
                _store_bfloat_part(target + 2 * c, total, here)
