"""What the kernels do group by group: weight and bias, records, coefficients; the entry of a participant."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .compile import inner
from .convert import loader, storer
from .simd import (
    LANES,
    atomic_add,
    bits_float,
    load_f32,
    load_f64,
    load_i64,
    splat,
    store_f64,
    store_i64,
    widen_scalar,
)
from .statistics import record_writer, rstd_of, statistics

_HEADER = object.__basicsize__
_load64, _ = loader("float64", "float64")


@inner
def data_of(array: int) -> int:
    """Address of the data of a NumPy array, from the address of the array object (its id); 0 for 0.

    The first field of NumPy's stable array structure. Boxing an array costs 100 ns, `ctypes.data` 900 ns, this nothing.
    """
    if array == 0:
        return 0
    return load_i64(array + _HEADER, 0)


@inner
def join(geometry: int, work: int) -> int:
    """Scratch memory of a thread that joins a job; 0 if as many have joined as there is memory for."""
    slot = atomic_add(work + w.JOINED, 1)
    if slot >= word(geometry, w.SLOTS):
        return 0
    return work + word(geometry, w.SCRATCH_AT) + slot * word(geometry, w.SCRATCH_BYTES)


@inner
def load_vector(target: int, source: int, kind: int, count: int, default: float) -> None:
    """A vector over the channels as float64, `default` where there is none."""
    if source == 0:
        for c in range(count):
            store_f64(target, c, default)
    elif kind == 0:
        for c in range(count):
            store_f64(target, c, widen_scalar(load_f32(source, c)))
    else:
        for c in range(count):
            store_f64(target, c, load_f64(source, c))


@inner
def load_parameters(geometry: int, scratch: int, weight: int, bias: int) -> None:
    """weight and bias of all channels into the scratch memory."""
    channels = word(geometry, w.C)
    load_vector(scratch + word(geometry, w.WEIGHT_AT), weight, word(geometry, w.WEIGHT_KIND), channels, 1.0)
    load_vector(scratch + word(geometry, w.BIAS_AT), bias, word(geometry, w.BIAS_KIND), channels, 0.0)


@inner
def group_of(geometry: int, channel: int) -> int:
    """Group, within its bundle, of a channel of the bundle."""
    labels = word(geometry, w.LABELS)
    if labels != 0:
        return load_i64(labels, channel)
    return channel // word(geometry, w.GROUP_CHANNELS)


@cache
def moments_finisher(dtype: str, compute: str, array: int, by_rows: bool, strided: bool) -> Any:
    """finish(geometry, call, base, task, store, scratch): records of a task's groups; mean and rstd to their arrays."""
    _, segment_moments = statistics(dtype, compute, array, by_rows, strided)
    fill = record_writer(compute)

    @inner
    def finish(geometry: int, call: int, base: int, task: int, store: int, scratch: int) -> None:
        groups = word(geometry, w.GROUPS)
        mean_out = load_i64(call, w.CALL_MEAN)
        rstd_out = load_i64(call, w.CALL_RSTD)
        eps = bits_float(word(geometry, w.EPS))
        partial = scratch + word(geometry, w.BLOCKS_AT)
        for g in range(groups):
            scale = segment_moments(geometry, base, task, g, store, scratch, partial)
            count = load_f64(partial, 0)
            m2 = load_f64(partial, 3)
            root, root_scale = rstd_of(m2, count, scale, eps)
            mean = load_f64(partial, 1) / scale
            record = store + g * w.RECORD_BYTES
            fill(record, load_f64(partial, 1), load_f64(partial, 2), scale, root, root_scale)
            store_f64(record, w.COUNT, count)
            store_f64(mean_out, task * groups + g, mean)
            store_f64(rstd_out, task * groups + g, root * root_scale)

    return finish


@cache
def coefficient_kernel(compute: str) -> Any:
    """expand(...): coefficients of a chunk of whole rows, element by element, in `compute` lanes.

    Arrays: power, minus_high, minus_low of the group, first = weight * SLOPE, second = bias (forward) or the
    group's constants.
    """
    store_c, _, _ = storer(compute, "float64")
    size = 4 if compute == "float32" else 8

    @inner
    def expand_forward(geometry: int, task: int, channel0: int, channels: int, store: int, scratch: int) -> None:
        inner_size = word(geometry, w.INNER)
        target = scratch + word(geometry, w.COEFFICIENTS_AT)
        each = word(geometry, w.COEFFICIENT_BYTES)
        first = (task % word(geometry, w.BUNDLES)) * word(geometry, w.BUNDLE_CHANNELS)
        weight = scratch + word(geometry, w.WEIGHT_AT) + 8 * first
        bias = scratch + word(geometry, w.BIAS_AT) + 8 * first
        c = channel0
        while c < channel0 + channels:
            record = store + group_of(geometry, c) * w.RECORD_BYTES
            # channels that share these coefficients' group, and the elements over which each vector below is valid
            together = 1
            if word(geometry, w.LABELS) == 0 and inner_size == 1:
                size_of_group = word(geometry, w.GROUP_CHANNELS)
                together = min(size_of_group - c % size_of_group, channel0 + channels - c)
            power = splat(load_f64(record, w.POWER))
            high = splat(load_f64(record, w.MINUS_HIGH))
            low = splat(load_f64(record, w.MINUS_LOW))
            ratio = load_f64(record, w.RATIO)
            for j in range(0, together * inner_size, LANES):
                at = target + ((c - channel0) * inner_size + j) * size
                store_c(at, power)
                store_c(at + each, high)
                store_c(at + 2 * each, low)
                if inner_size == 1:
                    store_c(at + 3 * each, _load64(weight + 8 * (c + j)) * splat(ratio))
                    store_c(at + 4 * each, _load64(bias + 8 * (c + j)))
                else:
                    store_c(at + 3 * each, splat(load_f64(weight, c) * ratio))
                    store_c(at + 4 * each, splat(load_f64(bias, c)))
            c += together

    return expand_forward


@inner
def start_call(geometry: int, scratch: int, weight: int, bias: int, mean: int, rstd: int) -> None:
    """Addresses and parameters of a call into a participant's scratch memory."""
    store_i64(scratch, w.CALL_MEAN, data_of(mean))
    store_i64(scratch, w.CALL_RSTD, data_of(rstd))
    load_parameters(geometry, scratch, data_of(weight), data_of(bias))
