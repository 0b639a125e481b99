"""Kernels for arrays in parts: the phases of forward and backward by themselves, with statistics taken as they are.

moments: phase 0 of the forward, its results kept. normalize: phase 1, records from the caller's statistics.
backward_sums: phase 1 of the backward, its sums over groups kept. backward_apply: phase 2, with the caller's means. The
phase that is left out does nothing but finish, which is where the caller's numbers come in.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .compile import inner
from .gradients import task_gradients
from .groups import data_of, start_call
from .kernel_backward import dx_phase, sums_phase
from .kernel_forward import apply_chunk
from .labelled import group_sums
from .program import Kind, Program
from .simd import load_f64, load_i64, store_f64, store_i64
from .statistics import record_writer, statistics
from .sums import add_layers
from .table import apply_sample_kernel
from .words import SUMS

_X, _DY, _BACKWARD_OUT, _FORWARD_OUT = 0, 1, 2, 1  # positions among the arrays of the geometry


@cache
def fill_records(compute: str) -> Any:
    """fill(geometry, call, task, store): records of a task's groups from mean and rstd."""
    write = record_writer(compute)

    @inner
    def fill(geometry: int, call: int, task: int, store: int) -> None:
        groups = word(geometry, w.GROUPS)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        for g in range(groups):
            write(store + g * w.RECORD_BYTES, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)

    return fill


def kernel(operation: str, kind: Kind) -> Program:
    """The kernel of an operation."""
    made = {"moments": _moments, "normalize": _normalize, "backward_sums": _sums, "backward_apply": _apply}
    return made[operation](kind)


def _moments(kind: Kind) -> Program:
    masked = kind.masked
    chunk_moments, merge_task, group_moments = statistics(
        kind.x, kind.compute, _X, kind.by_rows, kind.dense, kind.labelled, masked
    )

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 0:
            chunk_moments(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        partial = scratch + word(geometry, w.BLOCKS_AT)
        merge_task(geometry, store, scratch)
        for g in range(groups):
            scale = group_moments(geometry, call, task, g, store, scratch, partial)
            mean = (load_f64(partial, 1) + load_f64(partial, 2)) / scale
            count = load_f64(partial, 0)
            if masked:
                mean += 0.0 / count  # NaN where nothing is kept
                store_f64(load_i64(call, w.CALL_FIRST), task * groups + g, count)
            store_f64(load_i64(call, w.CALL_MEAN), task * groups + g, mean)
            store_f64(load_i64(call, w.CALL_RSTD), task * groups + g, load_f64(partial, 3) / scale / scale)

    def start(geometry: int, call: int, x: int, mean: int, m2: int, count: int, where: int) -> int:
        store_i64(call, _X, data_of(x))
        store_i64(call, w.CALL_FIRST, data_of(count))
        start_call(geometry, call, 0, 0, mean, m2, where, 0, 0)
        return 0

    return Program(start, run_chunk, finish, last=1)


def _normalize(kind: Kind) -> Program:
    chunk_apply = apply_chunk(kind)
    fill = fill_records(kind.compute)
    apply_sample = apply_sample_kernel(kind.x, kind.y, kind.compute, kind.activation, _FORWARD_OUT)
    table = kind.table

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 1:
            if table:
                apply_sample(geometry, call, task, store, scratch)
            else:
                chunk_apply(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        fill(geometry, call, task, store)

    def start(geometry: int, call: int, x: int, out: int, weight: int, bias: int, mean: int, rstd: int) -> int:
        store_i64(call, _X, data_of(x))
        store_i64(call, _FORWARD_OUT, data_of(out))
        start_call(geometry, call, weight, bias, mean, rstd, 0, 0, 0)
        return 0

    return Program(start, run_chunk, finish, last=1)


def _sums(kind: Kind) -> Program:
    channels_of, channel_at, over_group = group_sums(kind.labelled)
    chunk_sums, _ = sums_phase(kind._replace(masked=False))
    fill = fill_records(kind.compute)

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 0:
            chunk_sums(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        width = word(geometry, w.BUNDLE_CHANNELS)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        totals = store + word(geometry, w.TOTALS_AT)
        for k in range(2):
            sums = store + word(geometry, w.SUMS_AT) + k * padded
            add_layers(sums, word(geometry, w.LAYERS), SUMS * padded, width, totals + k * padded)
        fill(geometry, call, task, store)
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * (task % word(geometry, w.BUNDLES)) * width
        for g in range(groups):
            ratio = load_f64(store + g * w.RECORD_BYTES, w.RATIO)
            start, size = channels_of(geometry, g)
            for k in range(start, start + size):
                c = channel_at(geometry, k)
                store_f64(totals + padded, c, ratio * load_f64(totals + padded, c))
            sum_wdy = over_group(geometry, g, totals, weight, scratch)
            sum_wdy_xhat = over_group(geometry, g, totals + padded, weight, scratch)
            store_f64(load_i64(call, w.CALL_FIRST), task * groups + g, sum_wdy)
            store_f64(load_i64(call, w.CALL_SECOND), task * groups + g, sum_wdy_xhat)
        task_gradients(geometry, call, task, store)

    def start(
        geometry: int, call: int, x: int, dy: int, weight: int, bias: int, mean: int, rstd: int, sum_wdy: int,
        sum_wdy_xhat: int, dweight: int, dbias: int,
    ) -> int:  # fmt: skip
        store_i64(call, _X, data_of(x))
        store_i64(call, _DY, data_of(dy))
        store_i64(call, w.CALL_PHASE, 1)  # the statistics were given
        store_i64(call, w.CALL_FIRST, data_of(sum_wdy))
        store_i64(call, w.CALL_SECOND, data_of(sum_wdy_xhat))
        start_call(geometry, call, weight, bias, mean, rstd, 0, dweight, dbias)
        return 0

    return Program(start, run_chunk, finish, last=1, gradients=True)


def _apply(kind: Kind) -> Program:
    chunk_dx = dx_phase(kind)
    fill = fill_records(kind.compute)

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 1:
            chunk_dx(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        fill(geometry, call, task, store)
        groups = word(geometry, w.GROUPS)
        for g in range(groups):
            record = store + g * w.RECORD_BYTES
            ratio = load_f64(record, w.RATIO)
            mean_wdy = load_f64(load_i64(call, w.CALL_FIRST), task * groups + g)
            mean_wdy_xhat = load_f64(load_i64(call, w.CALL_SECOND), task * groups + g)
            store_f64(record, w.OFFSET, -ratio * mean_wdy)
            store_f64(record, w.SLOPE, -ratio * ratio * mean_wdy_xhat)

    def start(
        geometry: int, call: int, x: int, dy: int, out: int, weight: int, bias: int, mean: int, rstd: int,
        mean_wdy: int, mean_wdy_xhat: int, where: int,
    ) -> int:  # fmt: skip
        store_i64(call, _X, data_of(x))
        store_i64(call, _DY, data_of(dy))
        store_i64(call, _BACKWARD_OUT, data_of(out))
        store_i64(call, w.CALL_FIRST, data_of(mean_wdy))
        store_i64(call, w.CALL_SECOND, data_of(mean_wdy_xhat))
        start_call(geometry, call, weight, bias, mean, rstd, where, 0, 0)
        return 0

    return Program(start, run_chunk, finish, last=1)
