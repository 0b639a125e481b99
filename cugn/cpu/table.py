"""One sample of a table (S = 1: cells x genes, layer norm), group by group, all of it while in L1.

Each element has a weight of its own, which is read as it lies: coefficients element by element, which pay where many
rows share them, would cost four times what the row itself does. In the backward a channel's sum over a sample is one
element, so nothing is kept between passes but the sums over the group: dweight and dbias of the sample are added at
once to the partial sums of its part of the batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import words as w
from .access import word
from .activate import activation_kernels
from .adders import add_kept, add_to, adder
from .apply import HEAD_FROM
from .block_moments import block_kernels
from .chunks import sample_at
from .compile import inner
from .convert import LINE, itemsize, line_elements, loader, loader_up_to, storer, to_compute
from .memory import bits_float, load_f64, load_i64, store_f64, store_i64
from .simd import LANES, first_lanes, fma, reduce_add, rounding, select, splat, widen
from .statistics import in_range, largest_kernel, record_writer, rstd_of, scale_below

_X, _Y = 0, 1  # positions among the arrays of the forward's geometry
_DY, _OUT = 1, 2  # and of the backward's
_load64, _load64_part = loader("float64", "float64")
_store64, _store64_part, _ = storer("float64", "float64")


@cache
def parameter_kernel(compute: str) -> Any:
    """load(geometry, call, scratch): weight and bias in lanes of the compute dtype, once for each participant."""
    store_c, _, _ = storer(compute, "float64")
    c_size = 8 if compute == "float64" else 4

    @inner
    def load_parameters(geometry: int, call: int, scratch: int) -> None:
        if load_i64(call, w.CALL_EXPANDED) == 0:
            return
        store_i64(call, w.CALL_EXPANDED, 0)
        target = scratch + word(geometry, w.COEFFICIENTS_AT)
        each = word(geometry, w.COEFFICIENT_BYTES)
        for c in range(0, word(geometry, w.C), LANES):
            store_c(target + c * c_size, _load64(scratch + word(geometry, w.WEIGHT_AT) + 8 * c))
            store_c(target + each + c * c_size, _load64(scratch + word(geometry, w.BIAS_AT) + 8 * c))

    return load_parameters


@cache
def moments_sample(x: str, compute: str) -> Any:
    """Kernel: records of a sample's groups; mean and rstd to their arrays, with CALL_ONLY mean and m2 and no records.

    What `groups.moments_finisher` does after chunks of any shape: a row of 64 elements is 25 cycles of adding, and the
    way through chunks and phases was 200.
    """
    rect, _ = block_kernels(x, compute, itemsize(x))
    largest = largest_kernel(x, compute)
    fill = record_writer(compute)
    x_size, double = itemsize(x), compute == "float64"

    @inner
    def sample(geometry: int, call: int, n: int, chunk: int, store: int, scratch: int) -> None:
        groups, size = word(geometry, w.GROUPS), word(geometry, w.GROUP_CHANNELS)
        mean_out, rstd_out = load_i64(call, w.CALL_MEAN), load_i64(call, w.CALL_RSTD)
        only = load_i64(call, w.CALL_ONLY) != 0
        eps = bits_float(word(geometry, w.EPS))
        blocks = scratch + word(geometry, w.BLOCKS_AT)
        partial = blocks - 64
        px = sample_at(geometry, _X, load_i64(call, _X), n)
        count = float(size)
        for g in range(groups):
            rect(px, 1, 0, size, 1.0, blocks, partial)
            scale = 1.0
            if double:  # noqa: SIM102 - known when the kernel is compiled
                if not in_range(load_f64(partial, 3)):
                    scale = scale_below(largest(px, 1, 0, size))
                    if scale != 1.0:
                        rect(px, 1, 0, size, scale, blocks, partial)
            high, low, m2 = load_f64(partial, 1), load_f64(partial, 2), load_f64(partial, 3)
            px += size * x_size
            if only:
                store_f64(mean_out, n * groups + g, (high + low) / scale)
                store_f64(rstd_out, n * groups + g, m2 / scale / scale)
                continue
            root, root_scale = rstd_of(m2, count, scale, eps)
            fill(store + g * w.RECORD_BYTES, high, low, scale, root, root_scale)
            store_f64(mean_out, n * groups + g, high / scale)
            store_f64(rstd_out, n * groups + g, root * root_scale)

    return sample


@cache
def forward_sample(x: str, y: str, compute: str, activation: str | None) -> Any:
    """Kernel: y of a sample, with mean and rstd."""
    moments, apply = moments_sample(x, compute), apply_sample(x, y, compute, activation)

    @inner
    def sample(geometry: int, call: int, n: int, chunk: int, store: int, scratch: int) -> None:
        moments(geometry, call, n, chunk, store, scratch)
        apply(geometry, call, n, chunk, store, scratch)

    return sample


@cache
def apply_sample(x: str, y: str, compute: str, activation: str | None) -> Any:
    """Kernel: y of a sample from the records of its groups."""
    load_x, load_x_part = loader(x, compute)
    load_c, _ = loader(compute, compute)
    store, store_part, store_stream = storer(y, compute)
    act = activation_kernels(compute, activation)[0]
    parameters = parameter_kernel(compute)
    lanes = to_compute(compute)
    x_size, y_size = itemsize(x), itemsize(y)
    c_size = 8 if compute == "float64" else 4
    line = line_elements(y)

    @inner
    def apply(px: int, py: int, size: int, weight: int, bias: int, record: int, stream: bool) -> None:
        p = lanes(load_f64(record, w.POWER))
        h = lanes(load_f64(record, w.MINUS_HIGH))
        m = lanes(load_f64(record, w.MINUS_LOW))
        ratio = lanes(load_f64(record, w.RATIO))
        j = 0
        if stream:
            if size >= HEAD_FROM:  # a head makes all other stores whole lines
                head = (-py & (LINE - 1)) // y_size
                while j < head:
                    here = min(head - j, LANES)
                    t = fma(load_x_part(px + j * x_size, here), p, h) + m
                    value = act(fma(t, load_c(weight + j * c_size) * ratio, load_c(bias + j * c_size)))
                    store_part(py + j * y_size, value, here)
                    j += here
            stream = (py + j * y_size) & (LINE - 1) == 0
        streamed = j + (size - j) // line * line if stream else 0
        while j <= size - LANES:
            t = fma(load_x(px + j * x_size), p, h) + m
            value = act(fma(t, load_c(weight + j * c_size) * ratio, load_c(bias + j * c_size)))
            if j < streamed:
                store_stream(py + j * y_size, value)
            else:
                store(py + j * y_size, value)
            j += LANES
        if j < size:
            t = fma(load_x_part(px + j * x_size, size - j), p, h) + m
            value = act(fma(t, load_c(weight + j * c_size) * ratio, load_c(bias + j * c_size)))
            store_part(py + j * y_size, value, size - j)

    @inner
    def sample(geometry: int, call: int, n: int, chunk: int, store: int, scratch: int) -> None:
        parameters(geometry, call, scratch)
        size = word(geometry, w.GROUP_CHANNELS)
        px = sample_at(geometry, _X, load_i64(call, _X), n)
        py = sample_at(geometry, _Y, load_i64(call, _Y), n)
        weight = scratch + word(geometry, w.COEFFICIENTS_AT)
        bias = weight + word(geometry, w.COEFFICIENT_BYTES)
        stream = word(geometry, w.STREAM) != 0
        for g in range(word(geometry, w.GROUPS)):
            c = g * size
            apply(
                px + c * x_size, py + c * y_size, size, weight + c * c_size, bias + c * c_size,
                store + g * w.RECORD_BYTES, stream,
            )  # fmt: skip

    return sample


@cache
def backward_sample(x: str, y: str, compute: str, activation: str | None) -> Any:
    """Kernel: dx of samples, and what they add to dweight and dbias; groups are of more than two channels."""
    load_x = loader_up_to(x, compute)
    load_v = loader_up_to(y, compute)
    load_c, _ = loader(compute, compute)
    store, store_part, _ = storer(y, compute)
    parameters = parameter_kernel(compute)
    slope = activation_kernels(compute, activation)[1]
    active = activation is not None
    fill = record_writer(compute)
    lanes = to_compute(compute)
    double = compute == "float64"
    exact = y == "float64"
    begin, add_term, _ = adder(exact)
    x_size, y_size = itemsize(x), itemsize(y)
    c_size = 8 if double else 4

    @inner
    def add(high: int, low: int, term: Any, left: int) -> None:
        # nothing beyond `left` is touched: it may be another participant's
        if exact:
            if left >= LANES:
                add_to(high, low, term)
                return
            before = _load64_part(high, left)
            moved = before + term
            _store64_part(low, _load64_part(low, left) + rounding(before, term, moved), left)
            _store64_part(high, moved, left)
        elif left >= LANES:
            _store64(high, _load64(high) + term)
        else:
            _store64_part(high, _load64_part(high, left) + term, left)

    @inner
    def recentre(px: int, size: int, record: int) -> None:
        # the mean again, from the sum of x - mean: one float64 loses 1e6 ulp at mean/std 1e6
        p = lanes(load_f64(record, w.POWER))
        h = lanes(load_f64(record, w.MINUS_HIGH))
        m = lanes(load_f64(record, w.MINUS_LOW))
        zero = splat(0.0)
        total = zero
        lost = zero
        for j in range(0, size, LANES):
            t = widen(fma(load_x(px + j * x_size, size - j), p, h) + m)
            t = select(first_lanes(min(size - j, LANES)), t, zero)
            total, lost = add_kept(total, lost, t)
        mean_t = (reduce_add(total) + reduce_add(lost)) / size
        store_f64(record, w.MINUS_LOW, load_f64(record, w.MINUS_LOW) - mean_t)

    @inner
    def terms(
        px: int, pv: int, j: int, left: int, p: Any, h: Any, m: Any, scale: Any, weight: int, bias: int
    ) -> Any:  # fmt: skip
        # dz, t and dz*weight of a vector in float64; zeros beyond the end: 0 * t must not bring in an infinite t, nor
        # the next group's weight
        v = load_v(pv + j * y_size, left)
        t = fma(load_x(px + j * x_size, left), p, h) + m
        a = load_c(weight + j * c_size)
        if active:
            v = slope(v, fma(t, a * scale, load_c(bias + j * c_size)))
        v64 = widen(v)
        t64 = widen(t)
        wv = v64 * widen(a)
        if left < LANES:
            there = first_lanes(left)
            zero = splat(0.0)
            v64 = select(there, v64, zero)
            t64 = select(there, t64, zero)
            wv = select(there, wv, zero)
        return v64, t64, wv

    @inner
    def lanes_of(record: int) -> Any:
        p = lanes(load_f64(record, w.POWER))
        h = lanes(load_f64(record, w.MINUS_HIGH))
        return p, h, lanes(load_f64(record, w.MINUS_LOW)), lanes(load_f64(record, w.RATIO))

    @inner
    def add_row(sums: Any, sums_t: Any, wv: Any, t: Any) -> Any:
        return add_term(sums, wv, splat(1.0), splat(0.0)), add_term(sums_t, wv, t, splat(0.0))

    @inner
    def store_sums(sums: Any, sums_t: Any, size: int, record: int) -> None:
        total = reduce_add(sums[0])
        total_t = reduce_add(sums_t[0])
        if exact:
            total += reduce_add(sums[1])
            total_t += reduce_add(sums_t[1])
        ratio = load_f64(record, w.RATIO)
        store_f64(record, w.OFFSET, -ratio * (total / size))
        store_f64(record, w.SLOPE, -ratio * ratio * ratio * (total_t / size))

    @inner
    def of_one(
        px: int, pv: int, size: int, weight: int, bias: int, record: int, db: int, dw: int, at: int
    ) -> None:  # fmt: skip
        # sums over the group into the record; dbias and dweight of the sample to db and dw, their rounding `at` behind
        p, h, m, scale = lanes_of(record)
        wide = splat(load_f64(record, w.RATIO))
        sums = begin()
        sums_t = begin()
        for j in range(0, size, LANES):
            left = size - j
            v, t, wv = terms(px, pv, j, left, p, h, m, scale, weight, bias)
            add(db + 8 * j, db + at + 8 * j, v, left)
            add(dw + 8 * j, dw + at + 8 * j, v * (t * wide), left)
            sums, sums_t = add_row(sums, sums_t, wv, t)
        store_sums(sums, sums_t, size, record)

    @inner
    def add_two(
        j: int, left: int, row: Any, row1: Any, weight: int, bias: int, db: int, dw: int, at: int, state: Any
    ) -> Any:  # fmt: skip
        # a vector of two samples: to the sums of each, and to dbias and dweight in one
        px, pv, p, h, m, scale, wide = row
        px1, pv1, p1, h1, m1, scale1, wide1 = row1
        sums, sums_t, sums1, sums1_t = state
        v, t, wv = terms(px, pv, j, left, p, h, m, scale, weight, bias)
        sums, sums_t = add_row(sums, sums_t, wv, t)
        v1, t1, wv1 = terms(px1, pv1, j, left, p1, h1, m1, scale1, weight, bias)
        sums1, sums1_t = add_row(sums1, sums1_t, wv1, t1)
        add(db + 8 * j, db + at + 8 * j, v + v1, left)
        add(dw + 8 * j, dw + at + 8 * j, fma(v, t * wide, v1 * (t1 * wide1)), left)
        return sums, sums_t, sums1, sums1_t

    @inner
    def of_two(
        px: int, pv: int, record: int, px1: int, pv1: int, record1: int, size: int, weight: int, bias: int, db: int,
        dw: int, at: int,
    ) -> None:  # fmt: skip
        # the same of two samples; whole vectors by themselves, without a question: 0.9 of the time
        row = (px, pv, *lanes_of(record), splat(load_f64(record, w.RATIO)))
        row1 = (px1, pv1, *lanes_of(record1), splat(load_f64(record1, w.RATIO)))
        state = (begin(), begin(), begin(), begin())
        whole = size - size % LANES
        for j in range(0, whole, LANES):
            state = add_two(j, LANES, row, row1, weight, bias, db, dw, at, state)
        if whole < size:
            state = add_two(whole, size - whole, row, row1, weight, bias, db, dw, at, state)
        store_sums(state[0], state[1], size, record)
        store_sums(state[2], state[3], size, record1)

    @inner
    def dx_of(
        px: int, pv: int, j: int, left: int, p: Any, h: Any, m: Any, ratio: Any, q: Any, b: Any, c: Any, weight: int,
        bias: int,
    ) -> Any:  # fmt: skip
        v = load_v(pv + j * y_size, left)
        t = fma(load_x(px + j * x_size, left), p, h) + m
        a = load_c(weight + j * c_size) * ratio
        if active:
            v = slope(v, fma(t, a, load_c(bias + j * c_size)))
        return fma(a, v, fma(b, t, c)) * q

    @inner
    def apply(px: int, pv: int, py: int, size: int, weight: int, bias: int, record: int) -> None:
        p = lanes(load_f64(record, w.POWER))
        h = lanes(load_f64(record, w.MINUS_HIGH))
        m = lanes(load_f64(record, w.MINUS_LOW))
        ratio = lanes(load_f64(record, w.RATIO))
        q = lanes(load_f64(record, w.DX_POWER)) if double else p
        b = lanes(load_f64(record, w.SLOPE))
        c = lanes(load_f64(record, w.OFFSET))
        whole = size - size % LANES
        for j in range(0, whole, LANES):
            store(py + j * y_size, dx_of(px, pv, j, LANES, p, h, m, ratio, q, b, c, weight, bias))
        if whole < size:
            dx = dx_of(px, pv, whole, size - whole, p, h, m, ratio, q, b, c, weight, bias)
            store_part(py + whole * y_size, dx, size - whole)

    @inner
    def samples(geometry: int, call: int, n: int, chunk: int, store: int, scratch: int) -> None:
        # two at a time: the first of two waits for the second, but for the last of a part
        part_samples = word(geometry, w.PART_SAMPLES)
        place = n % part_samples
        if place % 2 == 0 and place + 1 < part_samples and n + 1 < word(geometry, w.N):
            return
        n0 = n - place % 2
        parameters(geometry, call, scratch)
        groups = word(geometry, w.GROUPS)
        size = word(geometry, w.GROUP_CHANNELS)
        weight = scratch + word(geometry, w.COEFFICIENTS_AT)
        bias = weight + word(geometry, w.COEFFICIENT_BYTES)
        records = scratch + word(geometry, w.OWN_RECORDS_AT)
        each = groups * w.RECORD_BYTES
        part = word(geometry, w.GRADIENT_BYTES)
        db = load_i64(call, w.CALL_WORK) + word(geometry, w.GRADIENTS_AT) + n // part_samples * part
        dw = db + part // 2
        # pass by pass over all groups: each is a chain of dependent operations, of which several then run at once
        for k in range(n0, n + 1):
            mean = load_i64(call, w.CALL_MEAN) + 8 * k * groups
            rstd = load_i64(call, w.CALL_RSTD) + 8 * k * groups
            record = records + (k - n0) * each
            for g in range(groups):
                fill(record + g * w.RECORD_BYTES, load_f64(mean, g), 0.0, 1.0, load_f64(rstd, g), 1.0)
            if double:
                px = sample_at(geometry, _X, load_i64(call, _X), k)
                for g in range(groups):
                    recentre(px + g * size * x_size, size, record + g * w.RECORD_BYTES)
        px = sample_at(geometry, _X, load_i64(call, _X), n0)
        pv = sample_at(geometry, _DY, load_i64(call, _DY), n0)
        px1 = sample_at(geometry, _X, load_i64(call, _X), n)
        pv1 = sample_at(geometry, _DY, load_i64(call, _DY), n)
        for g in range(groups):
            c = g * size
            x_at, v_at, c_at = c * x_size, c * y_size, c * c_size
            record = records + g * w.RECORD_BYTES
            if n0 < n:
                of_two(
                    px + x_at, pv + v_at, record, px1 + x_at, pv1 + v_at, record + each, size, weight + c_at,
                    bias + c_at, db + 8 * c, dw + 8 * c, part // 4,
                )  # fmt: skip
            else:
                of_one(
                    px + x_at, pv + v_at, size, weight + c_at, bias + c_at, record, db + 8 * c, dw + 8 * c, part // 4
                )
        for k in range(n0, n + 1):
            px = sample_at(geometry, _X, load_i64(call, _X), k)
            pv = sample_at(geometry, _DY, load_i64(call, _DY), k)
            py = sample_at(geometry, _OUT, load_i64(call, _OUT), k)
            for g in range(groups):
                c = g * size
                record = records + (k - n0) * each + g * w.RECORD_BYTES
                apply(
                    px + c * x_size, pv + c * y_size, py + c * y_size, size, weight + c * c_size, bias + c * c_size,
                    record,
                )  # fmt: skip

    return samples
