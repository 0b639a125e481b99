"""The backward's phases after the moments: sums of dz and dz*x_hat, then dx.

dz = dy * act'(z). With A = weight*RATIO, B and C of the group: dx = DX_POWER * (A*dz + B*t + C), t = x_hat / RATIO.
dweight and dbias are sums over samples of the channels' sums: in parts of PART_SAMPLES samples, each part in order and
without loss (two float64), the parts in order at the end. Under a mask the sums are over all elements, since the
statistics are in each of their outputs, and B*t + C is for those that are kept, since only they are in the statistics.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import words as w
from .access import word
from .backward_loops import apply_kernels
from .block_moments import two_sum_error
from .chunks import chunk_memory, place_of, rows_together
from .compile import inner
from .convert import itemsize, loader, storer, to_compute
from .gradients import task_gradients
from .groups import coefficient_kernel, given_finish, group_of, record_lanes
from .labelled import group_sums
from .mask_memory import open_mask
from .masked import kept_sums
from .memory import bits_float, load_f64, load_i64, store_f64, store_i64
from .phases import GATES, keeps_dz
from .simd import LANES, fma, splat
from .statistics import padded_bytes, pair, record_writer
from .sums import add_layers, sum_kernels
from .words import FOLDED, SUMS

_X, _DY, _OUT = 0, 1, 2  # positions among the arrays of the geometry


@inner
def kept_at(geometry: int, chunk: int, scratch: int) -> int:
    """Where a chunk's dz are between the phases that need them, 0 if they are made twice."""
    at = word(geometry, w.KEPT_AT)
    if at == 0:
        return 0
    return scratch + at + 4 * chunk * word(geometry, w.ROWS) * word(geometry, w.CHANNELS) * word(geometry, w.PART)


@cache
def sums_chunk(
    x: str, y: str, compute: str, activation: str | None, by_rows: bool, dense: bool, labelled: bool, masked: bool
) -> Any:
    """Kernel: sums of a chunk."""
    keeps = keeps_dz(compute, activation, masked)
    run, careful, unfold, columns = sum_kernels(y, x, compute, activation, keeps)
    run_kept, columns_kept = kept_sums(x, compute, itemsize(x))
    sums_kept = SUMS + masked
    fill = record_writer(compute)
    expand = coefficient_kernel(compute)
    lanes_of = record_lanes(compute)
    open_chunk, _ = chunk_memory(dense)
    x_size, y_size = itemsize(x), itemsize(y)
    double = compute == "float64"
    active = activation is not None
    gated = double and activation in GATES
    kinds = 2 * SUMS if double else SUMS + 1  # arrays of sums: of what they lost, or to take them again

    @inner
    def chunk_sums(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        place = place_of(geometry, task, chunk)
        rows, first, channel0, channels, length = place.rows, place.first, place.channel0, place.channels, place.length
        groups = word(geometry, w.GROUPS)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        records = scratch + word(geometry, w.OWN_RECORDS_AT)
        if load_i64(call, w.CALL_RECORDS) != task:
            store_i64(call, w.CALL_RECORDS, task)
            for g in range(groups):
                fill(records + g * w.RECORD_BYTES, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)
                if gated:  # noqa: SIM102 - known when the kernel is compiled
                    if load_i64(call, w.CALL_GIVEN) == 0:
                        # the slope of a gate needs all digits of x_hat in this phase already
                        low = load_f64(store + g * w.RECORD_BYTES, w.MINUS_LOW)
                        store_f64(records + g * w.RECORD_BYTES, w.MINUS_LOW, low)
                store_f64(records + g * w.RECORD_BYTES, w.SLOPE, 0.0)
                store_f64(records + g * w.RECORD_BYTES, w.OFFSET, 0.0)
        px, x_step = open_chunk(geometry, call, _X, place, scratch, True)
        pv, v_step = open_chunk(geometry, call, _DY, place, scratch, True)
        pm, m_step = 0, 0
        if masked:
            pm, m_step = open_mask(geometry, call, place, scratch)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        out = store + word(geometry, w.SUMS_AT) + place.layer * sums_kept * padded + 8 * channel0
        if by_rows:
            cols = channels * length
            own = scratch + word(geometry, w.BLOCKS_AT)
            arrays = 5 if active else 3
            expand(geometry, call, 2 * task, task, channel0, channels, records, scratch, arrays, False)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            together = rows_together(rows, cols, x_step == cols * x_size and v_step == cols * y_size)
            whole = rows // together
            rest = rows - whole * together
            each64 = padded_bytes(together * cols) + 8 * LANES
            for part in range(2 if rest > 0 else 1):
                at, height, many = 0, whole, together
                if part == 1:
                    at, height, many = whole * together, rest, 1
                columns(
                    pv + at * v_step, many * v_step, px + at * x_step, many * x_step, height, many * cols,
                    own + part * kinds * each64, each64, coefficients, each, word(geometry, w.TOUCHED),
                )  # fmt: skip
            for k in range(SUMS if double else SUMS - 1):
                for c in range(channels):
                    total = 0.0
                    lost = 0.0
                    for row in range(together + (rest > 0)):
                        sums = own + k * each64 + (8 * row * cols if row < together else kinds * each64)
                        for j in range(c * length, (c + 1) * length):
                            term = load_f64(sums, j)
                            moved = total + term
                            if double:
                                lost += two_sum_error(total, term, moved) + load_f64(sums + SUMS * each64, j)
                            total = moved
                    store_f64(out + k * padded, c, total + lost)
            if masked and (double or load_i64(call, w.CALL_GIVEN) == 1):
                columns_kept(px, x_step, pm, m_step, rows, cols, own, each64, coefficients, each)
                for c in range(channels):
                    kept = 0.0
                    total = 0.0
                    for j in range(c * length, (c + 1) * length):
                        kept += load_f64(own, j)
                        total += load_f64(own + each64, j)
                        total += load_f64(own + 2 * each64, j)
                    store_f64(out + 3 * padded, c, kept)
                    store_f64(out + 2 * padded, c, total)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            folded = scratch + word(geometry, w.BLOCKS_AT)
            kept = kept_at(geometry, chunk, scratch) if keeps else 0
            record = records
            p, h, m = lanes_of(record)
            finite = True
            for c in range(channels):
                if labelled:
                    record = records + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                    p, h, m = lanes_of(record)
                run(
                    pv + c * length * y_size, v_step, px + c * length * x_size, x_step, rows, length, p, h, m,
                    load_f64(record, w.RATIO) * load_f64(weight, first + c), load_f64(bias, first + c),
                    folded + c % LANES * FOLDED, 0 if kept == 0 else kept + 4 * c * length, 4 * channels * length,
                )  # fmt: skip
                if c % LANES == LANES - 1 or c == channels - 1:
                    block = c - c % LANES
                    finite &= unfold(folded, c + 1 - block, out + 8 * block, padded)
            if not finite:
                for c in range(channels):
                    if labelled:
                        record = records + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                        p, h, m = lanes_of(record)
                    if not (abs(load_f64(out, c)) + abs(load_f64(out + padded, c)) < math.inf):
                        careful(
                            pv + c * length * y_size, v_step, px + c * length * x_size, x_step, rows, length, p, h, m,
                            load_f64(record, w.RATIO) * load_f64(weight, first + c), load_f64(bias, first + c),
                            out + 8 * c, padded,
                        )  # fmt: skip
            if masked and (double or load_i64(call, w.CALL_GIVEN) == 1):
                for c in range(channels):
                    if labelled:
                        record = records + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                        p, h, m = lanes_of(record)
                    run_kept(
                        px + c * length * x_size, x_step, pm + c * length, m_step, rows, length,
                        p, h, m, out + 8 * c, padded,
                    )  # fmt: skip

    return chunk_sums


@cache
def sums_finish(compute: str, labelled: bool, masked: bool, gated: bool) -> Any:
    """Kernel: the records and gradients that come from a task's sums; `gated` in float64 alone."""
    fill = record_writer(compute)
    channels_of, channel_at, over_group = group_sums(labelled)
    load64_part, store64_part = loader("float64", "float64")[1], storer("float64", "float64")[1]
    sums_kept = SUMS + masked
    double = compute == "float64"

    @inner
    def finish_sums(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        bundle0 = (task % word(geometry, w.BUNDLES)) * word(geometry, w.BUNDLE_CHANNELS)
        width = word(geometry, w.BUNDLE_CHANNELS)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        totals = store + word(geometry, w.TOTALS_AT)
        for k in range(sums_kept):
            if double or masked or k != 2:
                sums = store + word(geometry, w.SUMS_AT) + k * padded
                add_layers(sums, word(geometry, w.LAYERS), sums_kept * padded, width, totals + k * padded)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * bundle0
        spatial = float(word(geometry, w.OUTER) * word(geometry, w.INNER))
        for g in range(groups):
            record = store + g * w.RECORD_BYTES
            low = load_f64(record, w.MINUS_LOW)
            fill(record, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)
            if gated:  # noqa: SIM102
                if load_i64(call, w.CALL_GIVEN) == 0:
                    store_f64(record, w.MINUS_LOW, low)
            start, size = channels_of(geometry, g)
            elements = size * spatial
            count = elements
            recentred = double
            if masked:
                count = load_f64(record, w.COUNT)
                if load_i64(call, w.CALL_GIVEN) == 1:  # the first was left out: the statistics were given
                    recentred = True
                    count = over_group(geometry, g, totals + 3 * padded, 0, scratch)
                elements += 0.0 / count  # NaN where nothing is kept
            mean_t = 0.0
            if recentred:
                # the mean again, from the sum of x - mean that came along: float64 alone loses 1e6 ulp at mean/std 1e6
                mean_t = over_group(geometry, g, totals + 2 * padded, 0, scratch) / count
                store_f64(record, w.MINUS_LOW, load_f64(record, w.MINUS_LOW) - mean_t)
            if masked:
                store_f64(record, w.RATIO, load_f64(record, w.RATIO) * (elements / elements))
            ratio = load_f64(record, w.RATIO)
            if labelled:
                for k in range(start, start + size):
                    c = channel_at(geometry, k)
                    sum_vt = fma(-mean_t, load_f64(totals, c), load_f64(totals + padded, c))
                    store_f64(totals + padded, c, ratio * sum_vt)
            else:
                for c in range(start, start + size, LANES):
                    left = min(LANES, start + size - c)
                    at = totals + padded + 8 * c
                    sums_vt = fma(splat(-mean_t), load64_part(totals + 8 * c, left), load64_part(at, left))
                    store64_part(at, splat(ratio) * sums_vt, left)
            mean_v = over_group(geometry, g, totals, weight, scratch) / count
            mean_v_xhat = over_group(geometry, g, totals + padded, weight, scratch) / count
            store_f64(record, w.OFFSET, -ratio * mean_v)
            store_f64(record, w.SLOPE, -ratio * ratio * mean_v_xhat)
            if double and not masked:  # noqa: SIM102 - known when the kernel is compiled
                if elements == 2.0 and load_i64(call, w.CALL_GIVEN) == 0:
                    pair(record, bits_float(word(geometry, w.EPS)))
            if elements == 1.0:
                store_f64(record, w.RATIO, 0.0)
                store_f64(record, w.OFFSET, 0.0)
                store_f64(record, w.SLOPE, 0.0)
        task_gradients(geometry, call, task, store)

    return finish_sums


@cache
def dx_chunk(
    x: str, y: str, compute: str, activation: str | None, by_rows: bool, dense: bool, labelled: bool, masked: bool
) -> Any:
    """Kernel: dx of a chunk."""
    run, rows_kernel = apply_kernels(x, y, y, compute, activation, masked)
    run_kept, _ = apply_kernels(x, compute, y, compute, None, masked)
    expand = coefficient_kernel(compute)
    lanes_of = record_lanes(compute)
    lanes = to_compute(compute)
    open_chunk, close_chunk = chunk_memory(dense)
    x_size, y_size = itemsize(x), itemsize(y)
    double = compute == "float64"
    keeps = keeps_dz(compute, activation, masked)
    folds = activation != "relu"
    arrays = 7 + double

    @inner
    def chunk_dx(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        place = place_of(geometry, task, chunk)
        rows, first, channel0, channels, length = place.rows, place.first, place.channel0, place.channels, place.length
        stream = word(geometry, w.STREAM) != 0
        kept = kept_at(geometry, chunk, scratch) if keeps else 0
        px, x_step = open_chunk(geometry, call, _X, place, scratch, True)
        pv, v_step = 0, 0
        if kept == 0:
            pv, v_step = open_chunk(geometry, call, _DY, place, scratch, True)
        py, y_step = open_chunk(geometry, call, _OUT, place, scratch, False)
        pm, m_step = 0, 0
        if masked:
            pm, m_step = open_mask(geometry, call, place, scratch)
        if by_rows:
            # relu's z is that of the sums to the bit: folded, an element at 0 counted as above 0 here and not there
            expand(geometry, call, 2 * task + 1, task, channel0, channels, store, scratch, arrays, folds)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            cols = channels * length
            folded = load_i64(call, w.CALL_FOLDED) != 0
            touched = word(geometry, w.TOUCHED)
            rows_kernel(
                px, x_step, pv, v_step, pm, m_step, py, y_step, rows, cols, coefficients, each, stream, folded, touched
            )  # fmt: skip
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            record = store
            p, h, m = lanes_of(record)
            q = lanes(load_f64(record, w.DX_POWER)) if double else p
            slope = lanes(load_f64(record, w.SLOPE))
            offset = lanes(load_f64(record, w.OFFSET))
            for r in range(rows):
                for c in range(channels):
                    if labelled:
                        record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                        p, h, m = lanes_of(record)
                        q = lanes(load_f64(record, w.DX_POWER)) if double else p
                        slope = lanes(load_f64(record, w.SLOPE))
                        offset = lanes(load_f64(record, w.OFFSET))
                    qx = px + r * x_step + c * length * x_size
                    qy = py + r * y_step + c * length * y_size
                    scale = load_f64(record, w.RATIO) * load_f64(weight, first + c)
                    if keeps and kept != 0:
                        qv = kept + 4 * (r * channels + c) * length
                        run_kept(qx, qv, 0, qy, length, p, h, m, q, slope, offset, scale, 0.0, stream)
                    else:
                        qv = pv + r * v_step + c * length * y_size
                        qm = pm + r * m_step + c * length
                        shift = load_f64(bias, first + c)
                        run(qx, qv, qm, qy, length, p, h, m, q, slope, offset, scale, shift, stream)
        close_chunk(geometry, call, _OUT, place, scratch)

    return chunk_dx


@inner
def sums_given(geometry: int, call: int, task: int) -> tuple[int, int]:
    """Where a task's two sums over groups are, or their means, of a backward in parts."""
    first = load_i64(call, w.CALL_PARTS) + 8 * task * word(geometry, w.GROUPS)
    return first, first + 8 * word(geometry, w.N) * word(geometry, w.ALL_GROUPS)


@cache
def parts_sums(compute: str, labelled: bool) -> Any:
    """Kernel: the sums of a task, in a backward in parts."""
    channels_of, channel_at, over_group = group_sums(labelled)
    fill = given_finish(compute)

    @inner
    def finish(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        fill(geometry, call, task, chunk, store, scratch)
        first, second = sums_given(geometry, call, task)
        width = word(geometry, w.BUNDLE_CHANNELS)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        totals = store + word(geometry, w.TOTALS_AT)
        for k in range(2):
            sums = store + word(geometry, w.SUMS_AT) + k * padded
            add_layers(sums, word(geometry, w.LAYERS), SUMS * padded, width, totals + k * padded)
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * (task % word(geometry, w.BUNDLES)) * width
        for g in range(word(geometry, w.GROUPS)):
            ratio = load_f64(store + g * w.RECORD_BYTES, w.RATIO)
            start, size = channels_of(geometry, g)
            for k in range(start, start + size):
                c = channel_at(geometry, k)
                store_f64(totals + padded, c, ratio * load_f64(totals + padded, c))
            store_f64(first, g, over_group(geometry, g, totals, weight, scratch))
            store_f64(second, g, over_group(geometry, g, totals + padded, weight, scratch))
        task_gradients(geometry, call, task, store)

    return finish


@cache
def parts_means(compute: str) -> Any:
    """Kernel: records from statistics and means that were given, in a backward in parts."""
    fill = given_finish(compute)

    @inner
    def finish(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        fill(geometry, call, task, chunk, store, scratch)
        first, second = sums_given(geometry, call, task)
        for g in range(word(geometry, w.GROUPS)):
            record = store + g * w.RECORD_BYTES
            ratio = load_f64(record, w.RATIO)
            store_f64(record, w.OFFSET, -ratio * load_f64(first, g))
            store_f64(record, w.SLOPE, -ratio * ratio * load_f64(second, g))

    return finish
