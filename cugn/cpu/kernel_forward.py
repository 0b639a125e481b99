"""The forward kernel: moments of each group (phase 0), then y (phase 1).

x is read twice and y written once; a group that fits in cache is read from memory once. For arrays in parts each phase
is there by itself: `moments` ends with the first, `normalize` has only the second, with statistics that it was given.
A phase that is left out does nothing but finish.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .apply import apply_kernels
from .chunks import chunk_memory, chunk_of
from .compile import inner
from .groups import coefficient_kernel, data_of, given_records, group_of, moments_phase, record_lanes, start_call
from .memory import load_f64, load_i64, store_i64
from .program import Kind, Program
from .statistics import itemsize
from .table import apply_sample_kernel

_X, _OUT = 0, 1  # positions among the arrays of the geometry


@cache
def apply_chunk(kind: Kind) -> Any:
    """The last phase: y of one chunk."""
    x_size, y_size = itemsize(kind.x), itemsize(kind.y)
    run, rows_kernel = apply_kernels(kind.x, kind.y, kind.compute, kind.activation, x_size, y_size)
    expand = coefficient_kernel(kind.compute)
    lanes_of = record_lanes(kind.compute)
    open_chunk, row_bytes, close_chunk = chunk_memory(kind.dense)
    by_rows, labelled = kind.by_rows, kind.labelled

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
            expand(geometry, call, task, task, channel0, channels, store, scratch, 5, True)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            folded = load_i64(call, w.CALL_FOLDED) != 0
            rows_kernel(px, x_step, py, y_step, rows, channels * length, coefficients, each, stream, folded)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            record = store
            p, h, m = lanes_of(record)
            ratio = load_f64(record, w.RATIO)
            for r in range(rows):
                for c in range(channels):
                    if labelled:
                        record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                        p, h, m = lanes_of(record)
                        ratio = load_f64(record, w.RATIO)
                    run(
                        px + r * x_step + c * length * x_size,
                        py + r * y_step + c * length * y_size,
                        length, p, h, m,
                        ratio * load_f64(weight, first + c),
                        load_f64(bias, first + c),
                        stream,
                    )  # fmt: skip
        close_chunk(geometry, _OUT, y_base, n, row0, rows, first, channels, start, length, y_piece)

    return chunk_apply


def kernel(kind: Kind) -> Program:
    """Arrays: x, out, weight, bias, mean, rstd, where; then whether mean and rstd are given.

    Without an out there are the moments alone: m2 in the place of rstd, under a mask with the counts behind it.
    """
    chunk_moments, finish_moments = moments_phase(kind)
    fill = given_records(kind.compute)
    chunk_apply = apply_chunk(kind)
    apply_sample = apply_sample_kernel(kind.x, kind.y, kind.compute, kind.activation)
    table = kind.table

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 0:
            if load_i64(call, w.CALL_PHASE) == 0:
                chunk_moments(geometry, call, task, chunk, store, scratch)
        elif load_i64(call, _OUT) == 0:
            return
        elif table:
            apply_sample(geometry, call, task, store, scratch)
        else:
            chunk_apply(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        if load_i64(call, w.CALL_PHASE) == 1:
            fill(geometry, call, task, store)
        else:
            finish_moments(geometry, call, task, store, scratch, load_i64(call, _OUT) == 0)

    def start(
        geometry: int, call: int, x: int, out: int, weight: int, bias: int, mean: int, rstd: int, where: int, given: int
    ) -> int:
        store_i64(call, _X, data_of(x))
        store_i64(call, _OUT, data_of(out))
        store_i64(call, w.CALL_PHASE, given)
        start_call(geometry, call, weight, bias, mean, rstd, where, 0, 0)
        return 0

    return Program(start, run_chunk, finish, last=1)
