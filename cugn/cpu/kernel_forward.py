"""The forward kernel: moments of each group (phase 0), then y (phase 1).

x is read twice and y written once; a group that fits in cache is read from memory once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .apply import apply_kernels
from .chunks import chunk_memory, chunk_of
from .compile import inner
from .groups import coefficient_kernel, data_of, group_of, join, moments_finisher, start_call
from .schedule import scheduler
from .simd import load_f64, load_i64, store_fence, store_i64
from .statistics import itemsize, statistics

ARGUMENTS = 9
_X, _OUT = 0, 1  # positions among the arrays of the geometry


@cache
def apply_chunk(x: str, y: str, compute: str, activation: str | None, by_rows: bool, strided: bool) -> Any:
    """The last phase: y of one chunk."""
    run, rows_kernel = apply_kernels(x, y, compute, activation, itemsize(x), itemsize(y))
    expand = coefficient_kernel(compute)
    x_size, y_size = itemsize(x), itemsize(y)
    open_chunk, row_bytes, close_chunk = chunk_memory(strided)

    @inner
    def chunk_apply(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        bundles = word(geometry, w.BUNDLES)
        n = task // bundles
        bundle0 = (task % bundles) * word(geometry, w.BUNDLE_CHANNELS)
        row0, rows, channel0, channels, start, length, _ = chunk_of(geometry, chunk)
        stream = word(geometry, w.STREAM) != 0
        piece = scratch + word(geometry, w.PIECES_AT)
        y_piece = piece + word(geometry, w.PIECE_BYTES)
        y_base = load_i64(call, _OUT)
        first = bundle0 + channel0
        x_base = load_i64(call, _X)
        px = open_chunk(geometry, _X, x_base, n, row0, rows, first, channels, start, length, piece, True)
        py = open_chunk(geometry, _OUT, y_base, n, row0, rows, first, channels, start, length, y_piece, False)
        x_step = row_bytes(geometry, _X, channels, length)
        y_step = row_bytes(geometry, _OUT, channels, length)
        if by_rows:
            expand(geometry, task, channel0, channels, store, scratch)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            rows_kernel(px, x_step, py, y_step, rows, channels * length, coefficients, each, stream)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            for r in range(rows):
                for c in range(channels):
                    record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                    scale = load_f64(record, w.RATIO) * load_f64(weight, first + c)
                    run(
                        px + r * x_step + c * length * x_size,
                        py + r * y_step + c * length * y_size,
                        length,
                        load_f64(record, w.POWER),
                        load_f64(record, w.MINUS_HIGH),
                        load_f64(record, w.MINUS_LOW),
                        scale,
                        load_f64(bias, first + c),
                        stream,
                    )
        close_chunk(geometry, _OUT, y_base, n, row0, rows, first, channels, start, length, y_piece)

    return chunk_apply


def kernel(x: str, y: str, compute: str, activation: str | None, by_rows: bool, strided: bool) -> Any:
    """forward(geometry, x, out, weight, bias, mean, rstd, work, caller), every array by its id."""
    chunk_moments, _ = statistics(x, compute, _X, by_rows, strided)
    finish_moments = moments_finisher(x, compute, _X, by_rows, strided)
    chunk_apply = apply_chunk(x, y, compute, activation, by_rows, strided)

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 0:
            chunk_moments(geometry, load_i64(call, _X), task, chunk, store, scratch)
        else:
            chunk_apply(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        finish_moments(geometry, call, load_i64(call, _X), task, store, scratch)

    schedule = scheduler(run_chunk, finish)

    def forward(
        geometry: int, x: int, out: int, weight: int, bias: int, mean: int, rstd: int, work: int, caller: int
    ) -> int:
        work = data_of(work)
        scratch = join(geometry, work)
        if scratch == 0:
            return 0
        store_i64(scratch, _X, data_of(x))
        store_i64(scratch, _OUT, data_of(out))
        start_call(geometry, scratch, weight, bias, mean, rstd)
        schedule(geometry, scratch, work, scratch, 0, 1, caller != 0)
        if word(geometry, w.STREAM) != 0:
            store_fence()
        return 0

    return forward
