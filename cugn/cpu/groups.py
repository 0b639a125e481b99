"""What is done group by group: weight and bias, moments, records, coefficients; the memory of a participant."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .chunks import turn_of
from .compile import general, inner
from .convert import loader, storer, to_compute
from .memory import bits_float, load_f64, load_i64, store_f64, store_i64
from .simd import (
    LANES,
    both,
    equal,
    first_lanes,
    fma,
    less_equal,
    reduce_max,
    select,
    splat,
    vector_abs,
    without,
)
from .statistics import record_writer, rstd_of, statistics

_HEADER = object.__basicsize__
_load64, _load64_part = loader("float64", "float64")
_, _load32_part = loader("float32", "float64")
_, _load_half_part = loader("float16", "float64")
_, _load_bfloat_part = loader("bfloat16", "float64")
_, _store64_part, _ = storer("float64", "float64")


@inner
def data_of(array: int) -> int:
    """Address of the data of a NumPy array, from the address of the array object (its id); 0 for 0.

    The first field of NumPy's stable array structure. Boxing an array costs 100 ns, `ctypes.data` 900 ns, this nothing.
    """
    if array == 0:
        return 0
    return load_i64(array + _HEADER, 0)


@inner
def join(geometry: int, work: int, role: int) -> int:
    """Scratch memory of a participant; 0 for a helper beyond the number of threads that the call may use."""
    slot = max(role, 0)
    if slot >= word(geometry, w.SLOTS):
        return 0
    return work + word(geometry, w.SCRATCH_AT) + slot * word(geometry, w.SCRATCH_BYTES)


@general
def load_vector(target: int, source: int, kind: int, count: int, default: float) -> None:
    """A vector over the channels as float64, `default` where there is none."""
    for c in range(0, count, LANES):
        here = min(LANES, count - c)
        if source == 0:
            value = splat(default)
        elif kind == w.FLOAT32:
            value = _load32_part(source + 4 * c, here)
        elif kind == w.FLOAT64:
            value = _load64_part(source + 8 * c, here)
        elif kind == w.FLOAT16:
            value = _load_half_part(source + 2 * c, here)
        else:
            value = _load_bfloat_part(source + 2 * c, here)
        _store64_part(target + 8 * c, value, here)


@inner
def load_parameters(geometry: int, scratch: int, weight: int, bias: int) -> None:
    """weight and bias of all channels into the scratch memory."""
    channels = word(geometry, w.C)
    load_vector(scratch + word(geometry, w.WEIGHT_AT), weight, word(geometry, w.WEIGHT_KIND), channels, 1.0)
    load_vector(scratch + word(geometry, w.BIAS_AT), bias, word(geometry, w.BIAS_KIND), channels, 0.0)


@inner
def tangent_at(geometry: int, scratch: int, which: int) -> int:
    """Address of the tangent of weight (0) or bias (1), which follow weight and bias."""
    each = word(geometry, w.BIAS_AT) - word(geometry, w.WEIGHT_AT)
    return scratch + word(geometry, w.BIAS_AT) + (which + 1) * each


@inner
def group_of(geometry: int, channel: int) -> int:
    """Group, within its bundle, of a channel of the bundle."""
    labels = word(geometry, w.LABELS)
    if labels != 0:
        return load_i64(labels, channel)
    return channel // word(geometry, w.GROUP_CHANNELS)


def moments_chunk(*options: Any) -> Any:
    """Kernel: moments of a chunk."""
    return statistics(*options)[0]


@cache
def moments_finisher(
    dtype: str, compute: str, by_rows: bool, dense: bool, labelled: bool = False, masked: bool = False
) -> Any:
    """Kernel: records of a task's groups; mean and rstd to their arrays.

    With CALL_ONLY, mean and m2 to those arrays, and under a mask the counts behind m2; no records.
    """
    _, merge_task, group_moments = statistics(dtype, compute, by_rows, dense, labelled, masked)
    fill = record_writer(compute)

    @inner
    def finish(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        only = load_i64(call, w.CALL_ONLY) != 0
        mean_out = load_i64(call, w.CALL_MEAN)
        rstd_out = load_i64(call, w.CALL_RSTD)
        eps = bits_float(word(geometry, w.EPS))
        partial = scratch + word(geometry, w.BLOCKS_AT)
        merge_task(geometry, store, scratch)
        for g in range(groups):
            scale = group_moments(geometry, call, task, g, store, scratch, partial)
            count = load_f64(partial, 0)
            m2 = load_f64(partial, 3)
            high = load_f64(partial, 1)
            if masked:
                high += 0.0 / count  # NaN where nothing is kept
            if only:
                if masked:
                    store_f64(rstd_out, (word(geometry, w.N) * word(geometry, w.BUNDLES) + task) * groups + g, count)
                store_f64(mean_out, task * groups + g, (high + load_f64(partial, 2)) / scale)
                store_f64(rstd_out, task * groups + g, m2 / scale / scale)
                continue
            root, root_scale = rstd_of(m2, count, scale, eps)
            record = store + g * w.RECORD_BYTES
            fill(record, high, load_f64(partial, 2), scale, root, root_scale)
            store_f64(record, w.COUNT, count)
            store_f64(mean_out, task * groups + g, high / scale)
            store_f64(rstd_out, task * groups + g, root * root_scale)

    return finish


def moments_finish(labelled: bool, masked: bool) -> Any:
    """Kernel: the same in float32, where it looks at no element again."""
    return moments_finisher("float32", "float32", False, True, labelled, masked)


@cache
def moments_kernel(*options: Any) -> Any:
    """Kernel: moments of a chunk, and what follows."""
    chunk_moments, finish = moments_chunk(*options), moments_finisher(*options)

    @inner
    def kernel(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        if chunk >= 0:
            chunk_moments(geometry, call, task, chunk, store, scratch)
        else:
            finish(geometry, call, task, chunk, store, scratch)

    return kernel


@cache
def given_finish(compute: str) -> Any:
    """Kernel: records of a task's groups from the mean and rstd that the caller gave."""
    write = record_writer(compute)

    @inner
    def fill(geometry: int, call: int, task: int, chunk: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        mean = load_i64(call, w.CALL_MEAN) + 8 * task * groups
        rstd = load_i64(call, w.CALL_RSTD) + 8 * task * groups
        for g in range(groups):
            write(store + g * w.RECORD_BYTES, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)

    return fill


@cache
def record_lanes(compute: str) -> Any:
    """record_lanes(record): POWER, MINUS_HIGH and MINUS_LOW of a group as lanes."""
    lanes = to_compute(compute)

    @inner
    def of_record(record: int) -> Any:
        high, low = load_f64(record, w.MINUS_HIGH), load_f64(record, w.MINUS_LOW)
        return lanes(load_f64(record, w.POWER)), lanes(high), lanes(low)

    return of_record


@inner
def foldable(record: int, arrays: int) -> bool:
    """Whether a group's coefficients may be for x itself in the place of t = x*POWER + MINUS_HIGH + MINUS_LOW.

    Then w*x_hat + b = A*x + B costs one operation and two vectors of coefficients, not three and five. A and B are
    rounded about values that |mean|/std makes larger, so this is for means up to one standard deviation: 4u of the 6u
    that the result may be off, 8u in float64. Products must not leave the normal numbers where those of x_hat do not.
    """
    rstd = load_f64(record, w.RSTD)
    if not (abs(load_f64(record, w.MEAN)) * rstd <= 1.0 and 2.0**-20 <= rstd <= 2.0**20):
        return False
    if arrays > 5:
        power = load_f64(record, w.POWER)
        slope = abs(load_f64(record, w.SLOPE)) * power * power
        if not (slope == 0.0 or 2.0**-80 <= slope <= 2.0**80):
            return False
        if load_f64(record, w.DX_POWER) != power:  # a group of two elements
            return False
        return abs(load_f64(record, w.OFFSET)) <= 2.0**80
    return True


@cache
def coefficient_kernel(compute: str, tangents: bool = False) -> Any:
    """expand(geometry, call, tag, task, channel0, channels, records, scratch, arrays, fold): coefficients element by
    element.

    The first `arrays` of: power, minus_high, minus_low of the group, weight * RATIO, bias, SLOPE, OFFSET of the group;
    in float64 also DX_POWER; with `tangents`, in its place, weight's tangent * RATIO, bias's tangent, and the last
    seven words of the group's record.
    With `fold`, the coefficients of x itself, and 1, -0.0, -0.0 for the first three, where a group and the
    weight allow that: the same bits whether a loop makes use of it or not. CALL_FOLDED says whether all are such.
    They are followed by themselves, as far as vectors that begin in a row go on into the next ones.
    A participant keeps those of whole rows from chunk to chunk: `tag` says which task and phase they are for.
    """
    store_c, _, _ = storer(compute, "float64")
    again, load_again = storer(compute, compute)[0], loader(compute, compute)[0]
    size = 4 if compute == "float32" else 8
    double = compute == "float64"
    last_field = w.RECORD_BYTES // 8 if tangents else w.DX_POWER + 1

    @inner
    def limit(record: int, arrays: int, fold: bool) -> float:
        # weights up to which the coefficients are folded: none where the group's are not
        return 2.0**60 if fold and foldable(record, arrays) else -1.0

    @inner
    def field_of(record: int, fields: int, field: int, by_channel: bool) -> Any:
        # of a group's record in all lanes, or those of sixteen channels with labels
        if by_channel:
            return _load64(fields + field * w.RECORD_BYTES)
        return splat(load_f64(record, field))

    @inner
    def expand(
        geometry: int, call: int, tag: int, task: int, channel0: int, channels: int, records: int, scratch: int,
        arrays: int, fold: bool,
    ) -> None:  # fmt: skip
        if channels == word(geometry, w.BUNDLE_CHANNELS):
            if load_i64(call, w.CALL_EXPANDED) == tag:
                return
            store_i64(call, w.CALL_EXPANDED, tag)
        inner_size = word(geometry, w.INNER)
        target = scratch + word(geometry, w.COEFFICIENTS_AT)
        each = word(geometry, w.COEFFICIENT_BYTES)
        first = (task % word(geometry, w.BUNDLES)) * word(geometry, w.BUNDLE_CHANNELS)
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * first
        bias = scratch + word(geometry, w.BIAS_AT) + 8 * first
        tangent = bias + word(geometry, w.BIAS_AT) - word(geometry, w.WEIGHT_AT)
        shift_tangent = tangent + word(geometry, w.BIAS_AT) - word(geometry, w.WEIGHT_AT)
        zero, one = splat(0.0), splat(1.0)
        unfolded = zero if fold else one
        c = channel0
        by_channel = word(geometry, w.LABELS) != 0 and inner_size == 1
        fields = scratch + word(geometry, w.BLOCKS_AT)
        while c < channel0 + channels:
            record = records + group_of(geometry, c) * w.RECORD_BYTES
            # channels that share these coefficients; the vectors may run over into those of the next ones
            together = 1
            if by_channel:
                together = min(LANES, channel0 + channels - c)
                for k in range(together):
                    of_channel = records + group_of(geometry, c + k) * w.RECORD_BYTES
                    store_f64(fields, k, limit(of_channel, arrays, fold))
                    for field in range(w.POWER, last_field):
                        store_f64(fields + field * w.RECORD_BYTES, k, load_f64(of_channel, field))
            elif inner_size == 1:
                size_of_group = word(geometry, w.GROUP_CHANNELS)
                together = min(size_of_group - c % size_of_group, channel0 + channels - c)
            power = field_of(record, fields, w.POWER, by_channel)
            high = field_of(record, fields, w.MINUS_HIGH, by_channel)
            low = field_of(record, fields, w.MINUS_LOW, by_channel)
            ratio = field_of(record, fields, w.RATIO, by_channel)
            slope = field_of(record, fields, w.SLOPE, by_channel)
            offset = field_of(record, fields, w.OFFSET, by_channel)
            most = _load64(fields) if by_channel else splat(limit(record, arrays, fold))
            for j in range(0, together * inner_size, LANES):
                at = target + ((c - channel0) * inner_size + j) * size
                if inner_size == 1:
                    factor = _load64(weight + 8 * (c + j))
                    shift = _load64(bias + 8 * (c + j))
                else:
                    factor = splat(load_f64(weight, c))
                    shift = splat(load_f64(bias, c))
                large = vector_abs(factor)
                large = select(equal(large, zero), one, large)
                fits = both(less_equal(large, most), less_equal(splat(2.0**-60), large))
                unfolded = select(without(first_lanes(min(together * inner_size - j, LANES)), fits), one, unfolded)
                store_c(at, select(fits, one, power))
                store_c(at + each, select(fits, splat(-0.0), high))
                store_c(at + 2 * each, select(fits, splat(-0.0), low))
                if arrays > 3:
                    scale = factor * ratio
                    store_c(at + 3 * each, select(fits, scale * power, scale))
                    store_c(at + 4 * each, select(fits, fma(scale, high + low, shift), shift))
                if arrays > 5:
                    store_c(at + 5 * each, select(fits, slope * power * power, slope))
                    store_c(at + 6 * each, select(fits, power * fma(slope, high + low, offset), offset))
                if double and not tangents:  # noqa: SIM102 - as below
                    if arrays > 7:
                        dx_power = field_of(record, fields, w.DX_POWER, by_channel)
                        store_c(at + 7 * each, select(fits, one, dx_power))
                if tangents:  # noqa: SIM102 - known when the kernel is compiled, which otherwise has none of it
                    if arrays > 7:
                        if inner_size == 1:
                            store_c(at + 7 * each, _load64(tangent + 8 * (c + j)) * ratio)
                            store_c(at + 8 * each, _load64(shift_tangent + 8 * (c + j)))
                        else:
                            store_c(at + 7 * each, splat(load_f64(tangent, c)) * ratio)
                            store_c(at + 8 * each, splat(load_f64(shift_tangent, c)))
                        for k in range(w.GX_OFFSET, arrays):
                            store_c(at + k * each, field_of(record, fields, k, by_channel))
            c += together
        cols = channels * inner_size
        for k in range(arrays):
            at = target + k * each
            for j in range(cols, turn_of(cols) + LANES, cols):
                again(at + j * size, load_again(at))
        store_i64(call, w.CALL_FOLDED, 1 if reduce_max(unfolded) == 0.0 else 0)

    return expand


@general
def start_call(
    geometry: int, call: int, weight: int, bias: int, mean: int, rstd: int, where: int, dweight: int, dbias: int
) -> None:
    """Addresses and parameters of a call, by the ids of their arrays (0 for none), into a participant's memory."""
    store_i64(call, w.CALL_EXPANDED, -1)
    store_i64(call, w.CALL_RECORDS, -1)
    store_i64(call, w.CALL_MEAN, data_of(mean))
    store_i64(call, w.CALL_RSTD, data_of(rstd))
    store_i64(call, w.MASK, data_of(where))
    store_i64(call, w.CALL_DWEIGHT, data_of(dweight))
    store_i64(call, w.CALL_DBIAS, data_of(dbias))
    load_parameters(geometry, call, data_of(weight), data_of(bias))
