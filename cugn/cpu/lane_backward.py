"""The backward of a table with a sample in each lane (`lane_phases.py`): sums, dx, and what dweight and dbias get."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .activate import activation_kernels
from .adders import add_kept, add_to, adder
from .block_moments import STEPS
from .compile import inner
from .convert import itemsize, loader, mask_loader, storer
from .labelled import group_sums
from .lane_memory import move_statistics, read_mask, reader, real_of, writer
from .lane_moments import elements, group_moments, inverse_deviation, unscaled
from .memory import bits_float, load_f64, load_i64
from .powers import power_below
from .simd import (
    LANES,
    first_lanes,
    fma,
    folded_sums,
    less,
    narrow,
    rounding,
    select,
    splat,
    store_folded,
    vector_abs,
    widen,
)
from .words import FOLDED

_X, _DY, _DX = 0, 1, 2  # positions among the arrays of the geometry
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")
_load_mask, _ = mask_loader()


@cache
def add_channels(exact: bool) -> Any:
    """add(folded, channels, target, rests): sums over the lanes of each channel to those of the samples before."""

    @inner
    def add(folded: int, channels: int, target: int, rests: int) -> None:
        for c in range(0, channels, LANES):
            term = folded_sums(folded + c * FOLDED)
            at = target + 8 * c
            left = channels - c
            if left >= LANES:
                if exact:
                    add_to(at, rests + 8 * c, term)
                else:
                    _store64(at, _load64(at) + term)
            else:  # nothing beyond `left` is touched: it may be another participant's
                before = _load64_part(at, left)
                moved = before + term
                if exact:
                    lost = _load64_part(rests + 8 * c, left) + rounding(before, term, moved)
                    _store64_part(rests + 8 * c, lost, left)
                _store64_part(at, moved, left)

    return add


@cache
def backward_block(x: str, y: str, compute: str, activation: str | None, labelled: bool, masked: bool) -> Any:
    """Kernel: dx of sixteen samples, and what they add to dweight and dbias."""
    real = real_of(x, y)
    line = LANES * itemsize(real)
    read_x, read_dy, write = reader(x, real), reader(y, real), writer(y, real)
    load = loader(real, real)[0]
    store_wide = storer(real, "float64")[0]
    channels_of, channel_at, _ = group_sums(labelled)
    moments = group_moments(real, labelled, masked)
    normal, root_of = elements(real), inverse_deviation(real)
    slope = activation_kernels(compute, activation)[1]
    exact, double, active = real == "float64", compute == "float64", activation is not None
    dz_bytes = 8 * LANES
    begin_any, add_any, total_any = adder(exact, ordered=False)
    add_samples = add_channels(exact)

    @inner
    def slope_of(dy: Any, z: Any) -> Any:
        if double:
            return slope(widen(dy), z)
        return slope(dy, narrow(z))

    @inner
    def dz_of(dy: int, kept: int) -> Any:
        # of a channel, once more: made again, it took half of a float64 gate's time
        if active:
            return _load64(kept)
        return widen(load(dy))

    @inner
    def sums_in_any_order(
        geometry: int, first: int, size: int, turned: int, turned_dy: int, kept: int, weight: int,
        mean: Any, rest: Any, root: Any, scale: Any, most_v: Any, most_vx: Any, sum_v: Any, sum_vx: Any,
    ) -> Any:  # fmt: skip
        # the same sums in any order; NaN where the plain ones are not finite, which are taken next to the end of range
        large = power_below(most_v) * splat(6.0)
        large_x = power_below(most_vx) * splat(6.0)
        sums = begin_any()
        sums_x = begin_any()
        for k in range(first, first + size):
            c = channel_at(geometry, k)
            x_hat = normal(turned + c * line, mean, rest, root, scale)
            v = dz_of(turned_dy + c * line, kept + (k - first) * dz_bytes) * splat(load_f64(weight, c))
            sums = add_any(sums, v, splat(1.0), large)
            sums_x = add_any(sums_x, v, x_hat, large_x)
        total = total_any(sums, size, large)
        total_x = total_any(sums_x, size, large_x)
        most = splat(2.0**1000)
        total = select(less(most_v, most), total + (sum_v - sum_v), sum_v)
        return total, select(less(most_vx, most), total_x + (sum_vx - sum_vx), sum_vx)

    @inner
    def block(geometry: int, call: int, task: int, chunk: int, store_at: int, scratch: int) -> None:
        n0 = LANES * task
        count = min(LANES, word(geometry, w.SAMPLES) - n0)
        channels = word(geometry, w.C)
        turned = scratch + word(geometry, w.TURNED_AT)
        turned_dy = turned + word(geometry, w.TURNED_BYTES)
        folded = turned_dy + word(geometry, w.TURNED_BYTES)
        folded_x = folded + FOLDED * word(geometry, w.PADDED_WIDTH)
        kept = scratch + word(geometry, w.KEPT_AT)
        read_x(geometry, call, _X, n0, count, turned, scratch)
        read_dy(geometry, call, _DY, n0, count, turned_dy, scratch)
        mask = 0
        if masked:
            mask = read_mask(geometry, call, n0, count, scratch)
        means = scratch + word(geometry, w.LANE_STATISTICS_AT)
        rstds = means + 8 * LANES * word(geometry, w.GROUPS)
        given = load_i64(call, w.CALL_GIVEN) == 1
        if given:
            move_statistics(geometry, call, n0, count, means, rstds, True)
        weight, bias = scratch + word(geometry, w.WEIGHT_AT), scratch + word(geometry, w.BIAS_AT)
        eps = bits_float(word(geometry, w.EPS))
        zero = splat(0.0)
        there = first_lanes(count)
        for g in range(word(geometry, w.GROUPS)):
            first, size = channels_of(geometry, g)
            if exact or masked or not given or word(geometry, w.WEIGHT_KIND) == w.FLOAT64:
                mean, rest, m2, values, scale = moments(geometry, g, turned, mask, eps)
                if given:
                    # of the mean alone one float64 is not enough (nor for a dweight in float64), or it may be that of
                    # other elements than a mask keeps
                    root = unscaled(_load64(rstds + 8 * LANES * g), scale)
                else:
                    root = root_of(m2, values, scale, eps)
                    _store64(means + 8 * LANES * g, unscaled(mean + rest, scale))
                    _store64(rstds + 8 * LANES * g, root * scale)
            else:
                mean, rest, scale = _load64(means + 8 * LANES * g), zero, splat(1.0)
                root = _load64(rstds + 8 * LANES * g)
                values = splat(float(size))
            # x_hat of a lane without a sample is 0, and so is its dy
            mean = select(there, mean, zero)
            rest = select(there, rest, zero)
            root = select(there, root, zero)
            sum_v = zero
            sum_vx = zero
            lost_v = zero
            lost_vx = zero
            most_v = zero
            most_vx = zero
            for begun in range(first, first + size, STEPS):
                part_v = zero
                part_vx = zero
                for k in range(begun, min(begun + STEPS, first + size)):
                    c = channel_at(geometry, k)
                    a = load_f64(weight, c)
                    x_hat = normal(turned + c * line, mean, rest, root, scale)
                    dy = load(turned_dy + c * line)
                    if active:
                        v = widen(slope_of(dy, fma(x_hat, splat(a), splat(load_f64(bias, c)))))
                        _store64(kept + (k - first) * dz_bytes, v)
                    else:
                        v = widen(dy)
                    store_folded(folded + c * FOLDED, v)
                    store_folded(folded_x + c * FOLDED, v * x_hat)
                    v = v * splat(a)
                    if labelled:
                        absolute = vector_abs(v)
                        most_v = select(less(most_v, absolute), absolute, most_v)
                        absolute = vector_abs(v * x_hat)
                        most_vx = select(less(most_vx, absolute), absolute, most_vx)
                    part_v += v
                    part_vx = fma(v, x_hat, part_vx)
                if exact and not labelled:
                    sum_v, lost_v = add_kept(sum_v, lost_v, part_v)
                    sum_vx, lost_vx = add_kept(sum_vx, lost_vx, part_vx)
                else:
                    sum_v += part_v
                    sum_vx += part_vx
            sum_v += lost_v
            sum_vx += lost_vx
            if labelled:
                sum_v, sum_vx = sums_in_any_order(
                    geometry, first, size, turned, turned_dy, kept, weight, mean, rest, root, scale,
                    most_v, most_vx, sum_v, sum_vx,
                )  # fmt: skip
            factor = root
            mean_v = zero - sum_v / values
            mean_vx = zero - sum_vx / values
            if masked:  # an infinity that was left out is not in x_hat of those that are kept, but spoils their group
                mean_v += mean_vx - mean_vx
            elif size == 1:  # dx is exactly 0
                root = zero
                factor = zero
                mean_vx = zero
            elif size == 2 and not given:
                # what is left when both sums cancel (`statistics.pair`)
                rstd = root * scale
                factor = root * (splat(eps) * (rstd * rstd) if eps > 0.0 else zero)
                mean_vx = zero
            for k in range(first, first + size):
                c = channel_at(geometry, k)
                a = load_f64(weight, c)
                x_hat = normal(turned + c * line, mean, rest, root, scale)
                v = dz_of(turned_dy + c * line, kept + (k - first) * dz_bytes)
                means_here = fma(mean_vx, x_hat, mean_v)
                if masked:
                    means_here = select(_load_mask(mask + c * LANES), means_here, zero)
                dx = fma(splat(a), v, means_here) * factor
                if exact:
                    dx = dx * scale
                store_wide(turned_dy + c * line, dx)
        if not given:
            move_statistics(geometry, call, n0, count, means, rstds, False)
        part = word(geometry, w.GRADIENT_BYTES)
        sums = load_i64(call, w.CALL_WORK) + word(geometry, w.GRADIENTS_AT)
        sums += task // word(geometry, w.PART_SAMPLES) * part
        add_samples(folded, channels, sums, sums + part // 4)
        add_samples(folded_x, channels, sums + part // 2, sums + part // 4 * 3)
        write(geometry, call, _DX, n0, count, turned_dy, scratch)

    return block
