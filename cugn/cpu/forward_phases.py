"""The forward's second phase: y of a chunk, from the records of its groups."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .apply import apply_kernels, folds_runs
from .chunks import chunk_memory, place_of
from .compile import inner
from .convert import itemsize
from .groups import coefficient_kernel, foldable, group_of, record_lanes
from .memory import load_f64, load_i64
from .simd import fma

_X, _OUT = 0, 1  # positions among the arrays of the geometry


@cache
def apply_chunk(x: str, y: str, compute: str, activation: str | None, by_rows: bool, dense: bool) -> Any:
    """Kernel: y of one chunk."""
    x_size, y_size = itemsize(x), itemsize(y)
    run, rows_kernel = apply_kernels(x, y, compute, activation, x_size, y_size)
    expand = coefficient_kernel(compute)
    lanes_of = record_lanes(compute)
    open_chunk, close_chunk = chunk_memory(dense)
    folds = folds_runs(compute, activation)

    @inner
    def chunk_apply(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        place = place_of(geometry, task, chunk)
        rows, first, channel0, channels, length = place.rows, place.first, place.channel0, place.channels, place.length
        stream = word(geometry, w.STREAM) != 0
        px, x_step = open_chunk(geometry, call, _X, place, scratch, True)
        py, y_step = open_chunk(geometry, call, _OUT, place, scratch, False)
        if by_rows:
            expand(geometry, call, task, task, channel0, channels, store, scratch, 5, True)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            folded = load_i64(call, w.CALL_FOLDED) != 0
            cols, touched = channels * length, word(geometry, w.TOUCHED)
            rows_kernel(px, x_step, py, y_step, rows, cols, coefficients, each, stream, folded, touched)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            labelled = word(geometry, w.LABELS) != 0
            record = store
            p, h, m = lanes_of(record)
            fits = foldable(record, 5) if folds else False
            for r in range(rows):
                for c in range(channels):
                    if labelled:
                        record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                        p, h, m = lanes_of(record)
                        fits = foldable(record, 5) if folds else False
                    factor = load_f64(weight, first + c)
                    scale = load_f64(record, w.RATIO) * factor
                    shift = load_f64(bias, first + c)
                    folded = False
                    if folds and fits and (factor == 0.0 or 2.0**-60 <= abs(factor) <= 2.0**60):
                        folded = True
                        shift = fma(scale, load_f64(record, w.MINUS_HIGH) + load_f64(record, w.MINUS_LOW), shift)
                        scale *= load_f64(record, w.POWER)
                    run(
                        px + r * x_step + c * length * x_size,
                        py + r * y_step + c * length * y_size,
                        length, p, h, m, scale, shift, stream, folded,
                    )  # fmt: skip
        close_chunk(geometry, call, _OUT, place, scratch)

    return chunk_apply
