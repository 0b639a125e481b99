"""The backward kernel: moments (phase 0, if they were not given), sums of dz and dz*x_hat (phase 1), dx (phase 2).

dy and x are read twice and dx written once; a group that fits in cache costs one reading of each. dz = dy *
act'(z). With A = weight*RATIO, B and C of the group: dx = POWER * (A*dz + B*t + C), t = x_hat / RATIO. dweight and
dbias are sums over samples of the channels' sums: in parts of PART_SAMPLES samples, each part in order and without
loss (two float64), the parts in order at the end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .activate import activation_kernels
from .apply import to_compute
from .chunks import chunk_memory, chunk_of
from .compile import inner
from .convert import loader, storer
from .groups import data_of, group_of, join, moments_finisher, start_call
from .schedule import scheduler
from .simd import (
    LANES,
    fma,
    load_f64,
    load_i64,
    narrow_scalar,
    splat,
    store_f32,
    store_f64,
    store_fence,
    store_i64,
)
from .statistics import itemsize, record_writer, statistics
from .sums import accumulate, add_layers, dot, sum_kernels, total_of
from .words import SUMS

_X, _DY, _OUT = 0, 1, 2  # positions among the arrays of the geometry
_ROWS = 4
_load64, _ = loader("float64", "float64")
_store64, _, _ = storer("float64", "float64")


@cache
def apply_kernels(x: str, y: str, compute: str, activation: str | None) -> tuple[Any, Any]:
    """run(...) for dx of a run of one channel, rows(...) with coefficients element by element."""
    load_x, load_x_part = loader(x, compute)
    load_v, load_v_part = loader(y, compute)
    load_c, _ = loader(compute, compute)
    store, store_part, store_stream = storer(y, compute)
    slope = activation_kernels(compute, activation)[1]
    active = activation is not None
    lanes = to_compute(compute)
    x_size, y_size = itemsize(x), itemsize(y)
    c_size = 4 if compute == "float32" else 8
    alignment = min(64, LANES * y_size)

    @inner
    def gradient(xv: Any, v: Any, p: Any, h: Any, m: Any, a: Any, b: Any, c: Any, shift: Any) -> Any:
        t = fma(xv, p, h) + m
        if active:
            v = slope(v, fma(t, a, shift))
        return fma(a, v, fma(b, t, c)) * p

    @inner
    def run(px: int, pv: int, py: int, count: int, record: int, scale: float, shift: float, stream: bool) -> None:
        p = lanes(load_f64(record, w.POWER))
        h = lanes(load_f64(record, w.MINUS_HIGH))
        m = lanes(load_f64(record, w.MINUS_LOW))
        a = lanes(scale)
        b = lanes(load_f64(record, w.SLOPE))
        c = lanes(load_f64(record, w.OFFSET))
        s = lanes(shift)
        if stream:
            head = (-py & (alignment - 1)) // y_size
            if head * y_size == -py & (alignment - 1) and count >= head + LANES:
                if head > 0:
                    store_part(py, gradient(load_x_part(px, head), load_v_part(pv, head), p, h, m, a, b, c, s), head)
                    px += head * x_size
                    pv += head * y_size
                    py += head * y_size
                    count -= head
                while count >= LANES:
                    store_stream(py, gradient(load_x(px), load_v(pv), p, h, m, a, b, c, s))
                    px += LANES * x_size
                    pv += LANES * y_size
                    py += LANES * y_size
                    count -= LANES
        while count >= LANES:
            store(py, gradient(load_x(px), load_v(pv), p, h, m, a, b, c, s))
            px += LANES * x_size
            pv += LANES * y_size
            py += LANES * y_size
            count -= LANES
        if count > 0:
            v = gradient(load_x_part(px, count), load_v_part(pv, count), p, h, m, a, b, c, s)
            store_part(py, v, count)

    @inner
    def some_rows(
        px: int, x_step: int, pv: int, v_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int,
        each: int, stream: bool,
    ) -> None:  # fmt: skip
        left = cols
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            s = load_c(coefficients + 4 * each)
            b = load_c(coefficients + 5 * each)
            c = load_c(coefficients + 6 * each)
            if left < LANES:
                for r in range(rows):
                    xr = load_x_part(px + r * x_step, left)
                    v = load_v_part(pv + r * v_step, left)
                    store_part(py + r * y_step, gradient(xr, v, p, h, m, a, b, c, s), left)
            elif stream:
                for r in range(rows):
                    v = gradient(load_x(px + r * x_step), load_v(pv + r * v_step), p, h, m, a, b, c, s)
                    store_stream(py + r * y_step, v)
            else:
                for r in range(rows):
                    v = gradient(load_x(px + r * x_step), load_v(pv + r * v_step), p, h, m, a, b, c, s)
                    store(py + r * y_step, v)
            coefficients += LANES * c_size
            px += LANES * x_size
            pv += LANES * y_size
            py += LANES * y_size
            left -= LANES

    @inner
    def rows_kernel(
        px: int, x_step: int, pv: int, v_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int,
        each: int, stream: bool,
    ) -> None:  # fmt: skip
        streams = stream and (py | y_step) & (alignment - 1) == 0
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            some_rows(
                px + done * x_step, x_step, pv + done * v_step, v_step, py + done * y_step, y_step, here, cols,
                coefficients, each, streams,
            )  # fmt: skip
            done += here

    return run, rows_kernel


@cache
def expander(compute: str) -> Any:
    """expand(...): coefficients element by element: power, high, low, weight*RATIO, bias, SLOPE, OFFSET; and two in
    float64.
    """
    store_c, _, _ = storer(compute, "float64")
    size = 4 if compute == "float32" else 8

    @inner
    def expand(
        geometry: int, bundle0: int, channel0: int, channels: int, records: int, scratch: int, own: int, each64: int
    ) -> None:
        inner_size = word(geometry, w.INNER)
        target = scratch + word(geometry, w.COEFFICIENTS_AT)
        each = word(geometry, w.COEFFICIENT_BYTES)
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * bundle0
        bias = scratch + word(geometry, w.BIAS_AT) + 8 * bundle0
        c = channel0
        while c < channel0 + channels:
            record = records + group_of(geometry, c) * w.RECORD_BYTES
            together = 1
            if word(geometry, w.LABELS) == 0 and inner_size == 1:
                size_of_group = word(geometry, w.GROUP_CHANNELS)
                together = min(size_of_group - c % size_of_group, channel0 + channels - c)
            power = splat(load_f64(record, w.POWER))
            high = splat(load_f64(record, w.MINUS_HIGH))
            low = splat(load_f64(record, w.MINUS_LOW))
            ratio = load_f64(record, w.RATIO)
            slope = splat(load_f64(record, w.SLOPE))
            offset = splat(load_f64(record, w.OFFSET))
            for j in range(0, together * inner_size, LANES):
                element = (c - channel0) * inner_size + j
                at = target + element * size
                store_c(at, power)
                store_c(at + each, high)
                store_c(at + 2 * each, low)
                if inner_size == 1:
                    store_c(at + 3 * each, _load64(weight + 8 * (c + j)) * splat(ratio))
                    store_c(at + 4 * each, _load64(bias + 8 * (c + j)))
                else:
                    store_c(at + 3 * each, splat(load_f64(weight, c) * ratio))
                    store_c(at + 4 * each, splat(load_f64(bias, c)))
                store_c(at + 5 * each, slope)
                store_c(at + 6 * each, offset)
                if own != 0:
                    _store64(own + 8 * element, power)
                    _store64(own + each64 + 8 * element, high + low)
            c += together

    return expand


@cache
def sums_phase(x: str, y: str, compute: str, activation: str | None, by_rows: bool, strided: bool) -> tuple[Any, Any]:
    """Phase 1: sums of a chunk, and the records and gradients that come from a task's."""
    run, columns = sum_kernels(y, x, compute, activation, itemsize(y), itemsize(x))
    fill = record_writer(compute)
    expand = expander(compute)
    open_chunk, row_bytes, _ = chunk_memory(strided)
    x_size, y_size = itemsize(x), itemsize(y)
    double = compute == "float64"

    @inner
    def chunk_sums(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        bundles = word(geometry, w.BUNDLES)
        n = task // bundles
        width = word(geometry, w.BUNDLE_CHANNELS)
        bundle0 = (task % bundles) * width
        groups = word(geometry, w.GROUPS)
        row0, rows, channel0, channels, start, length, layer = chunk_of(geometry, chunk)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        records = scratch + word(geometry, w.OWN_RECORDS_AT)
        for g in range(groups):
            fill(records + g * w.RECORD_BYTES, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)
            store_f64(records + g * w.RECORD_BYTES, w.SLOPE, 0.0)
            store_f64(records + g * w.RECORD_BYTES, w.OFFSET, 0.0)
        piece = scratch + word(geometry, w.PIECES_AT)
        v_piece = piece + word(geometry, w.PIECE_BYTES)
        first = bundle0 + channel0
        x_base = load_i64(call, _X)
        v_base = load_i64(call, _DY)
        px = open_chunk(geometry, _X, x_base, n, row0, rows, first, channels, start, length, piece, True)
        pv = open_chunk(geometry, _DY, v_base, n, row0, rows, first, channels, start, length, v_piece, True)
        x_step = row_bytes(geometry, _X, channels, length)
        v_step = row_bytes(geometry, _DY, channels, length)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        out = store + word(geometry, w.SUMS_AT) + layer * SUMS * padded + 8 * channel0
        if by_rows:
            cols = channels * length
            own = scratch + word(geometry, w.BLOCKS_AT)
            each64 = 8 * ((cols + LANES - 1) // LANES * LANES + LANES)
            expand(geometry, bundle0, channel0, channels, records, scratch, own, each64)
            zero = splat(0.0)
            for k in range(2, 2 + 2 * SUMS):
                for j in range(0, cols, LANES):
                    _store64(own + k * each64 + 8 * j, zero)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            columns(pv, v_step, px, x_step, rows, cols, own, each64, coefficients, each)
            for k in range(SUMS):
                sums = own + (2 + k) * each64
                lost = sums + SUMS * each64
                for c in range(channels):
                    total = 0.0
                    for j in range(c * length, (c + 1) * length):
                        total += load_f64(sums, j) + load_f64(lost, j)
                    store_f64(out + k * padded, c, total)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            for c in range(channels):
                record = records + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                scale = load_f64(record, w.RATIO) * load_f64(weight, first + c)
                run(
                    pv + c * length * y_size, v_step, px + c * length * x_size, x_step, rows, length,
                    record, scale, load_f64(bias, first + c), out + 8 * c, padded,
                )  # fmt: skip

    @inner
    def finish_sums(geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        bundle0 = (task % word(geometry, w.BUNDLES)) * word(geometry, w.BUNDLE_CHANNELS)
        width = word(geometry, w.BUNDLE_CHANNELS)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        totals = store + word(geometry, w.TOTALS_AT)
        for k in range(SUMS):
            if double or k < 2:
                sums = store + word(geometry, w.SUMS_AT) + k * padded
                add_layers(sums, word(geometry, w.LAYERS), SUMS * padded, width, totals + k * padded)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * bundle0
        size = word(geometry, w.GROUP_CHANNELS)
        count = float(size * word(geometry, w.OUTER) * word(geometry, w.INNER))
        for g in range(groups):
            record = store + g * w.RECORD_BYTES
            fill(record, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)
            at = 8 * g * size
            mean_t = 0.0
            if double:
                # the mean again, from the sum of x - mean that came along: float64 alone loses 1e6 ulp at mean/std 1e6
                mean_t = total_of(totals + 2 * padded + at, size) / count
                store_f64(record, w.MINUS_LOW, load_f64(record, w.MINUS_LOW) - mean_t)
            ratio = load_f64(record, w.RATIO)
            for c in range(g * size, (g + 1) * size):
                sum_vt = fma(-mean_t, load_f64(totals, c), load_f64(totals + padded, c))
                store_f64(totals + padded, c, ratio * sum_vt)
            mean_v = dot(weight + at, totals + at, size) / count
            mean_v_xhat = dot(weight + at, totals + padded + at, size) / count
            store_f64(record, w.OFFSET, -ratio * mean_v)
            store_f64(record, w.SLOPE, -ratio * ratio * mean_v_xhat)
            if count == 1.0:
                store_f64(record, w.RATIO, 0.0)
                store_f64(record, w.OFFSET, 0.0)
                store_f64(record, w.SLOPE, 0.0)

    return chunk_sums, finish_sums


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
def write_gradients(geometry: int, work: int, dweight: int, dbias: int) -> None:
    """Merge the partial sums, in order, into dweight and dbias."""
    size = word(geometry, w.GRADIENT_BYTES)
    first = work + word(geometry, w.GRADIENTS_AT)
    for c in range(word(geometry, w.C)):
        for which in range(2):
            total, lost = 0.0, 0.0
            for part in range(word(geometry, w.GRADIENT_PARTS)):
                here = first + part * size + which * (size // 2)
                term = load_f64(here, c)
                moved = total + term
                kept = moved - total
                lost += (total - (moved - kept)) + (term - kept) + load_f64(here + size // 4, c)
                total = moved
            target = dbias if which == 0 else dweight
            if word(geometry, w.WEIGHT_KIND) == 0:
                store_f32(target, c, narrow_scalar(total + lost))
            else:
                store_f64(target, c, total + lost)


@cache
def dx_phase(x: str, y: str, compute: str, activation: str | None, by_rows: bool, strided: bool) -> Any:
    """Phase 2: dx of a chunk."""
    run, rows_kernel = apply_kernels(x, y, compute, activation)
    expand = expander(compute)
    open_chunk, row_bytes, close_chunk = chunk_memory(strided)
    x_size, y_size = itemsize(x), itemsize(y)

    @inner
    def chunk_dx(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        bundles = word(geometry, w.BUNDLES)
        n = task // bundles
        bundle0 = (task % bundles) * word(geometry, w.BUNDLE_CHANNELS)
        row0, rows, channel0, channels, start, length, _ = chunk_of(geometry, chunk)
        stream = word(geometry, w.STREAM) != 0
        piece = scratch + word(geometry, w.PIECES_AT)
        v_piece = piece + word(geometry, w.PIECE_BYTES)
        y_piece = v_piece + word(geometry, w.PIECE_BYTES)
        first = bundle0 + channel0
        x_base = load_i64(call, _X)
        v_base = load_i64(call, _DY)
        y_base = load_i64(call, _OUT)
        px = open_chunk(geometry, _X, x_base, n, row0, rows, first, channels, start, length, piece, True)
        pv = open_chunk(geometry, _DY, v_base, n, row0, rows, first, channels, start, length, v_piece, True)
        py = open_chunk(geometry, _OUT, y_base, n, row0, rows, first, channels, start, length, y_piece, False)
        x_step = row_bytes(geometry, _X, channels, length)
        v_step = row_bytes(geometry, _DY, channels, length)
        y_step = row_bytes(geometry, _OUT, channels, length)
        if by_rows:
            expand(geometry, bundle0, channel0, channels, store, scratch, 0, 0)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            cols = channels * length
            rows_kernel(px, x_step, pv, v_step, py, y_step, rows, cols, coefficients, each, stream)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            for r in range(rows):
                for c in range(channels):
                    record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                    run(
                        px + r * x_step + c * length * x_size,
                        pv + r * v_step + c * length * y_size,
                        py + r * y_step + c * length * y_size,
                        length,
                        record,
                        load_f64(record, w.RATIO) * load_f64(weight, first + c),
                        load_f64(bias, first + c),
                        stream,
                    )
        close_chunk(geometry, _OUT, y_base, n, row0, rows, first, channels, start, length, y_piece)

    return chunk_dx


def kernel(x: str, y: str, compute: str, activation: str | None, by_rows: bool, strided: bool) -> Any:
    """backward(geometry, x, dy, out, weight, bias, mean, rstd, dweight, dbias, work, first phase, caller)."""
    chunk_moments, _ = statistics(x, compute, _X, by_rows, strided)
    finish_moments = moments_finisher(x, compute, _X, by_rows, strided)
    chunk_sums, finish_sums = sums_phase(x, y, compute, activation, by_rows, strided)
    chunk_dx = dx_phase(x, y, compute, activation, by_rows, strided)

    @inner
    def run_chunk(phase: int, geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if phase == 0:
            chunk_moments(geometry, load_i64(call, _X), task, chunk, store, scratch)
        elif phase == 1:
            chunk_sums(geometry, call, task, chunk, store, scratch)
        else:
            chunk_dx(geometry, call, task, chunk, store, scratch)

    @inner
    def finish(phase: int, geometry: int, call: int, task: int, store: int, scratch: int) -> None:
        if phase == 0:
            finish_moments(geometry, call, load_i64(call, _X), task, store, scratch)
        else:
            finish_sums(geometry, call, task, store, scratch)
            if word(geometry, w.SPLIT) == 0:
                add_to_gradients(geometry, load_i64(call, w.CALL_WORK), task, store)

    schedule = scheduler(run_chunk, finish)

    def backward(
        geometry: int, x: int, dy: int, out: int, weight: int, bias: int, mean: int, rstd: int,
        dweight: int, dbias: int, work: int, first: int, caller: int,
    ) -> int:  # fmt: skip
        work = data_of(work)
        scratch = join(geometry, work)
        if scratch == 0:
            return 0
        store_i64(scratch, _X, data_of(x))
        store_i64(scratch, _DY, data_of(dy))
        store_i64(scratch, _OUT, data_of(out))
        store_i64(scratch, w.CALL_WORK, work)
        start_call(geometry, scratch, weight, bias, mean, rstd)
        schedule(geometry, scratch, work, scratch, first, 2, caller != 0)
        if word(geometry, w.STREAM) != 0:
            store_fence()
        if caller != 0:
            if word(geometry, w.SPLIT) != 0:
                stores = work + word(geometry, w.STORE_AT)
                for task in range(word(geometry, w.N) * word(geometry, w.BUNDLES)):
                    add_to_gradients(geometry, work, task, stores + task * word(geometry, w.STORE_BYTES))
            write_gradients(geometry, work, data_of(dweight), data_of(dbias))
        return 0

    return backward
