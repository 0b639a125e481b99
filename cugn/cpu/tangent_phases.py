"""The phases of jvp and double backward after the moments: sums of products, then linear combinations.

The same for both: ty of the jvp is gdy of the double backward with other names, and takes two of its sums. x, u (tx
or ddx) and v (dy) are read twice, each result is written once.

With J(u) = u - E[u] - x_hat E[u x_hat], k = dy act''(z), gz = k gdz and r = ddweight dz + weight gz::

    gdz = rstd weight J(u) + ddweight x_hat + ddbias
    gx = rstd (r - E[r] - x_hat E[r x_hat])
         - rstd^2 (x_hat E[q J(u)] + E[q x_hat] J(u) + E[u x_hat] (q - E[q] - x_hat E[q x_hat])),   q = weight dz

gdz is linear in u and x_hat within a channel, so that the sums of gz come from those of k, k x_hat, k x_hat^2, k u and
k u x_hat: one pass over the arrays, whatever the activation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .chunks import chunk_memory, place_of
from .compile import inner
from .convert import itemsize
from .gradients import task_gradients
from .groups import coefficient_kernel, group_of, record_lanes, tangent_at
from .labelled import group_sums
from .mask_memory import open_mask
from .memory import load_f64, store_f64
from .phases import GATES
from .simd import LANES
from .sums import add_layers
from .tangent_loops import (
    KT,
    KTT,
    KU,
    KUT,
    UT,
    UV,
    VT,
    K,
    U,
    V,
    apply_kernels,
    coefficients_of,
    product_sums,
    sums_of,
)

_X, _U, _V = 0, 1, 2  # positions among the arrays of the geometry; after them the results
# What takes the place of sums when a task's are merged: the gradients' parts first, where `add_to_gradients` looks
(_GBIAS, _GWEIGHT, _Q, _QX, _QJ, _R, _RX) = range(7)


def totals_of(second: bool, bent: bool) -> int:
    """Arrays of totals of the channels that an operation needs."""
    return max(sums_of(second, bent), _RX + 1 if second else 0)


@cache
def arrays_read(masked: bool, second: bool) -> Any:
    """open_all(geometry, call, place, scratch): a chunk of x, u, v and mask.

    Address and distance between rows of each; v is u where there is none, the mask 0.
    """
    open_chunk, _ = chunk_memory(dense=False)

    @inner
    def open_all(geometry: int, call: int, place: Any, scratch: int) -> Any:
        px, x_step = open_chunk(geometry, call, _X, place, scratch, True)
        pu, u_step = open_chunk(geometry, call, _U, place, scratch, True)
        pv, v_step = pu, u_step
        if second:
            pv, v_step = open_chunk(geometry, call, _V, place, scratch, True)
        pm, m_step = 0, 0
        if masked:
            pm, m_step = open_mask(geometry, call, place, scratch)
        return px, x_step, pu, u_step, pv, v_step, pm, m_step

    return open_all


@cache
def sums_chunk(x: str, y: str, compute: str, activation: str | None, by_rows: bool, masked: bool, second: bool) -> Any:
    """Kernel: sums of a chunk."""
    run, columns = product_sums(x, y, compute, activation, second, masked)
    expand = coefficient_kernel(compute, tangents=True)
    lanes_of = record_lanes(compute)
    open_all = arrays_read(masked, second)
    x_size, y_size = itemsize(x), itemsize(y)
    double = compute == "float64"
    active = activation is not None and second
    bent = activation in GATES
    count, totals_count = sums_of(second, bent), totals_of(second, bent)

    @inner
    def chunk_sums(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        place = place_of(geometry, task, chunk)
        rows, first, channel0, channels, length = place.rows, place.first, place.channel0, place.channels, place.length
        px, x_step, pu, u_step, pv, v_step, pm, m_step = open_all(geometry, call, place, scratch)
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        out = store + word(geometry, w.SUMS_AT) + place.layer * totals_count * padded + 8 * channel0
        own = scratch + word(geometry, w.BLOCKS_AT)
        if by_rows:
            cols = channels * length
            each64 = 8 * ((cols + LANES - 1) // LANES * LANES + LANES)
            expand(geometry, call, 2 * task, task, channel0, channels, store, scratch, 5 if active else 3, False)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            columns(
                px, x_step, pu, u_step, pv, v_step, pm, m_step, rows, cols, own, each64, coefficients, each,
                word(geometry, w.TOUCHED),
            )  # fmt: skip
            for k in range(count):
                for c in range(channels):
                    total = 0.0
                    for j in range(c * length, (c + 1) * length):
                        total += load_f64(own + k * each64, j)
                        if double:
                            total += load_f64(own + (count + k) * each64, j)
                    store_f64(out + k * padded, c, total)
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT)
            bias = scratch + word(geometry, w.BIAS_AT)
            for c in range(channels):
                record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                p, h, m = lanes_of(record)
                run(
                    px + c * length * x_size, x_step, pu + c * length * y_size, u_step,
                    pv + c * length * y_size, v_step, pm + c * length, m_step, rows, length,
                    p, h, m, load_f64(record, w.RATIO) * load_f64(weight, first + c), load_f64(bias, first + c),
                    own, out + 8 * c, padded,
                )  # fmt: skip

    return chunk_sums


@cache
def sums_finish(bent: bool, labelled: bool, second: bool) -> Any:
    """Kernel: the coefficients and gradients that come from a task's sums."""
    channels_of, channel_at, over_group = group_sums(labelled)
    count, totals_count = sums_of(second, bent), totals_of(second, bent)

    @inner
    def finish_sums(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        width = word(geometry, w.BUNDLE_CHANNELS)
        first = (task % word(geometry, w.BUNDLES)) * width
        padded = 8 * word(geometry, w.PADDED_WIDTH)
        totals = store + word(geometry, w.TOTALS_AT)
        for k in range(count):
            sums = store + word(geometry, w.SUMS_AT) + k * padded
            add_layers(sums, word(geometry, w.LAYERS), totals_count * padded, width, totals + k * padded)
        weight = scratch + word(geometry, w.WEIGHT_AT)
        tweight = tangent_at(geometry, scratch, 0)
        tbias = tangent_at(geometry, scratch, 1)
        for g in range(word(geometry, w.GROUPS)):
            record = store + g * w.RECORD_BYTES
            elements = load_f64(record, w.COUNT)
            ratio = load_f64(record, w.RATIO)
            rstd = load_f64(record, w.RSTD)
            start, size = channels_of(geometry, g)
            mean_u = over_group(geometry, g, totals + U * padded, 0, scratch) / elements
            mean_ux = ratio * over_group(geometry, g, totals + UT * padded, 0, scratch) / elements
            store_f64(record, w.SLOPE, -ratio * mean_ux)
            store_f64(record, w.OFFSET, -mean_u)
            if second:
                for place in range(start, start + size):
                    k = channel_at(geometry, place)
                    gamma = load_f64(weight, first + k)
                    dgamma = load_f64(tweight, first + k)
                    dbeta = load_f64(tbias, first + k)
                    dz = load_f64(totals + V * padded, k)
                    dzx = ratio * load_f64(totals + VT * padded, k)
                    dzj = (load_f64(totals + UV * padded, k) - mean_u * dz) - mean_ux * dzx
                    gz = 0.0
                    gzx = 0.0
                    if bent:
                        bend = load_f64(totals + K * padded, k)
                        bend_x = ratio * load_f64(totals + KT * padded, k)
                        bend_xx = ratio * (ratio * load_f64(totals + KTT * padded, k))
                        bend_u = load_f64(totals + KU * padded, k)
                        bend_ux = ratio * load_f64(totals + KUT * padded, k)
                        gz = rstd * gamma * ((bend_u - mean_u * bend) - mean_ux * bend_x)
                        gz += dgamma * bend_x + dbeta * bend
                        gzx = rstd * gamma * ((bend_ux - mean_u * bend_x) - mean_ux * bend_xx)
                        gzx += dgamma * bend_xx + dbeta * bend_x
                    store_f64(totals + _GBIAS * padded, k, gz)
                    store_f64(totals + _GWEIGHT * padded, k, rstd * dzj + gzx)
                    store_f64(totals + _Q * padded, k, gamma * dz)
                    store_f64(totals + _QX * padded, k, gamma * dzx)
                    store_f64(totals + _QJ * padded, k, gamma * dzj)
                    store_f64(totals + _R * padded, k, dgamma * dz + gamma * gz)
                    store_f64(totals + _RX * padded, k, dgamma * dzx + gamma * gzx)
                mean_q = over_group(geometry, g, totals + _Q * padded, 0, scratch) / elements
                mean_qx = over_group(geometry, g, totals + _QX * padded, 0, scratch) / elements
                mean_qj = over_group(geometry, g, totals + _QJ * padded, 0, scratch) / elements
                mean_r = over_group(geometry, g, totals + _R * padded, 0, scratch) / elements
                mean_rx = over_group(geometry, g, totals + _RX * padded, 0, scratch) / elements
                square = ratio * ratio
                store_f64(record, w.GX_OFFSET, -ratio * mean_r)
                store_f64(record, w.GX_SLOPE, -square * mean_rx)
                store_f64(record, w.GX_V, -ratio * mean_ux)
                store_f64(record, w.GX_U, -square * mean_qx)
                store_f64(record, w.GX_INNER_SLOPE, -square * (ratio * (mean_qj - mean_ux * mean_qx)))
                store_f64(record, w.GX_INNER_OFFSET, square * (mean_ux * mean_q))
                # one element: gx is 0, which roundings of its terms would not be
                alone = size * word(geometry, w.OUTER) * word(geometry, w.INNER) == 1
                store_f64(record, w.GX_POWER, 0.0 if alone else load_f64(record, w.POWER))
        if second:
            task_gradients(geometry, call, task, store)

    return finish_sums


@cache
def apply_chunk(x: str, y: str, compute: str, activation: str | None, by_rows: bool, masked: bool, second: bool) -> Any:
    """Kernel: the results of a chunk."""
    splats, run, rows_kernel = apply_kernels(x, y, compute, activation, second, masked)
    expand = coefficient_kernel(compute, tangents=True)
    open_chunk, close_chunk = chunk_memory(dense=False)
    x_size, y_size = itemsize(x), itemsize(y)
    arrays = coefficients_of(second)
    open_all = arrays_read(masked and second, second)
    first_out = _V + 1 if second else _V
    other_out = first_out + 1 if second else first_out

    @inner
    def chunk_apply(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        place = place_of(geometry, task, chunk)
        rows, first, channel0, channels, length = place.rows, place.first, place.channel0, place.channels, place.length
        stream = word(geometry, w.STREAM) != 0
        px, x_step, pu, u_step, pv, v_step, pm, m_step = open_all(geometry, call, place, scratch)
        py, y_step = open_chunk(geometry, call, first_out, place, scratch, False)
        pg, g_step = py, y_step
        if second:
            pg, g_step = open_chunk(geometry, call, other_out, place, scratch, False)
        if by_rows:
            expand(geometry, call, 2 * task + 1, task, channel0, channels, store, scratch, arrays, False)
            coefficients = scratch + word(geometry, w.COEFFICIENTS_AT)
            each = word(geometry, w.COEFFICIENT_BYTES)
            rows_kernel(
                px, x_step, pu, u_step, pv, v_step, pm, m_step, py, y_step, pg, g_step, rows, channels * length,
                coefficients, each, stream,
            )  # fmt: skip
        else:
            weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * first
            bias = scratch + word(geometry, w.BIAS_AT) + 8 * first
            tweight = tangent_at(geometry, scratch, 0) + 8 * first
            tbias = tangent_at(geometry, scratch, 1) + 8 * first
            for c in range(channels):
                record = store + group_of(geometry, channel0 + c) * w.RECORD_BYTES
                ratio = load_f64(record, w.RATIO)
                coefficients_here = splats(
                    record, ratio * load_f64(weight, c), load_f64(bias, c), ratio * load_f64(tweight, c),
                    load_f64(tbias, c),
                )  # fmt: skip
                for r in range(rows):
                    at = c * length * y_size
                    run(
                        px + r * x_step + c * length * x_size, pu + r * u_step + at, pv + r * v_step + at,
                        pm + r * m_step + c * length, py + r * y_step + at, pg + r * g_step + at, length,
                        coefficients_here, stream,
                    )  # fmt: skip
        close_chunk(geometry, call, first_out, place, scratch)
        if second:
            close_chunk(geometry, call, other_out, place, scratch)

    return chunk_apply
