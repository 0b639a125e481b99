"""The loops of jvp and double backward: sums of products along x_hat, and linear combinations of several arrays.

Both work on u (tx or ddx); the double backward also on v (dy). With t = x_hat / RATIO, J = u + SLOPE*t + OFFSET and
dz, gz what act' and act'' make of dy and of dy * gdz (`tangent_phases.py` has the coefficients)::

    gdz = POWER * a*J + (d*t + e)          gdy (ty, for the jvp) = gdz * act'(z)
    gx = GX_POWER * (d*dz + a*gz + GX_OFFSET + GX_SLOPE*t
                     + POWER * (GX_V*a*dz + GX_U*J + GX_INNER_SLOPE*t + GX_INNER_OFFSET))

a is weight * RATIO, d and e the tangents of weight (times RATIO) and bias. Sums are float64, of lanes of either type.
Tuples of vectors stay in registers: LLVM takes them apart (ten sums and their operands fit in the 32 of AVX-512).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic

from . import words as w
from .activate import derivative_kernel
from .compile import inner
from .convert import COMPUTE, LINE, itemsize, line_elements, loader, storer, to_compute
from .mask_memory import mask_at
from .memory import I64, load_f64, pointer, store_f64
from .phases import GATES
from .simd import F64, LANES, first_lanes, fma, reduce_add, select, splat, vector_of, widen
from .touch import touch_rows

_ALIGN_FROM = 256
_ROWS = 4  # rows taken together: coefficients or accumulators are loaded once for four of data
_STEPS = 16  # additions of float64 lanes before the rounding of their sum is kept
_LINE = 8 * LANES
_load64, _ = loader("float64", "float64")
_store64, _, _ = storer("float64", "float64")
(U, UT, V, VT, UV, K, KT, KTT, KU, KUT) = range(10)
"""Sums of each channel: of u, u*t; for the double backward also of v = dz, v*t, u*v, and with an activation of
k = dy * act''(z), k*t, k*t*t, k*u, k*u*t.
"""


def sums_of(second: bool, bent: bool) -> int:
    """How many of the sums an operation takes, under an activation whose slope changes or not."""
    if not second:
        return V
    return KUT + 1 if bent else K


@cache
def tuples(count: int, compute: str) -> tuple[Any, Any, Any]:
    """Tuples of vectors: zeros(); add_all(address, stride, values), into sums in memory; load_all(address, stride).

    In float64 what a sum in memory loses to rounding is kept `count` strides after it.
    """
    double = compute == "float64"
    wide = vector_of(ir.DoubleType())
    lane = vector_of(ir.DoubleType() if double else ir.FloatType())

    def place(builder: Any, address: Any, stride: Any, k: int, kind: ir.Type) -> Any:
        return pointer(builder, builder.add(address, builder.mul(stride, ir.Constant(I64, k))), kind)

    @intrinsic
    def zeros(typingctx: Any) -> Any:
        kind = UniTuple(F64, count)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return ir.Constant(context.get_value_type(kind), None)

        return kind(), codegen

    @intrinsic
    def add_all(typingctx: Any, address: Any, stride: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, stride, values = args
            for k in range(count):
                term = builder.extract_value(values, k)
                target = place(builder, address, stride, k, wide)
                before = builder.load(target, align=8)
                total = builder.fadd(before, term)
                builder.store(total, target, align=8)
                if double:
                    kept = builder.fsub(total, before)
                    error = builder.fadd(builder.fsub(before, builder.fsub(total, kept)), builder.fsub(term, kept))
                    lost = place(builder, address, stride, count + k, wide)
                    builder.store(builder.fadd(builder.load(lost, align=8), error), lost, align=8)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, UniTuple(F64, count)), codegen

    @intrinsic
    def load_all(typingctx: Any, address: Any, stride: Any) -> Any:
        kind = UniTuple(COMPUTE[compute], count)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, stride = args
            values = [builder.load(place(builder, address, stride, k, lane), align=4) for k in range(count)]
            return context.make_tuple(builder, kind, values)

        return kind(types.int64, types.int64), codegen

    return zeros, add_all, load_all


@cache
def stepper(compute: str, activation: str | None, second: bool, masked: bool) -> Any:
    """step(sums, x, u, v, t, kept, p, h, m, a, s): the sums with one vector more; t is float64.

    A mask counts in the means of u and u*t alone: every element's dy depends on the statistics.
    """
    derivatives = derivative_kernel(compute, activation)
    count = sums_of(second, activation in GATES)
    active = activation is not None

    @inner
    def only(kept: Any, value: Any) -> Any:
        if masked:
            return select(kept, value, splat(0.0))
        return value

    if not second:

        @inner
        def step_first(
            sums: Any, x: Any, u: Any, v: Any, t: Any, kept: Any, p: Any, h: Any, m: Any, a: Any, s: Any
        ) -> Any:
            wide = only(kept, widen(u))
            return sums[U] + wide, fma(wide, only(kept, t), sums[UT])

        return step_first

    if count == K:

        @inner
        def step_flat(
            sums: Any, x: Any, u: Any, v: Any, t: Any, kept: Any, p: Any, h: Any, m: Any, a: Any, s: Any
        ) -> Any:
            if active:
                v = v * derivatives(fma(fma(x, p, h) + m, a, s))[0]
            wide = widen(u)
            mine = only(kept, wide)
            dz = widen(v)
            return (
                sums[U] + mine, fma(mine, only(kept, t), sums[UT]),
                sums[V] + dz, fma(dz, t, sums[VT]), fma(wide, dz, sums[UV]),
            )  # fmt: skip

        return step_flat

    @inner
    def step_bent(sums: Any, x: Any, u: Any, v: Any, t: Any, kept: Any, p: Any, h: Any, m: Any, a: Any, s: Any) -> Any:
        slope, curvature = derivatives(fma(fma(x, p, h) + m, a, s))
        wide = widen(u)
        mine = only(kept, wide)
        dz = widen(v * slope)
        k = widen(v * curvature)
        kt = k * t
        return (
            sums[U] + mine, fma(mine, only(kept, t), sums[UT]),
            sums[V] + dz, fma(dz, t, sums[VT]), fma(wide, dz, sums[UV]),
            sums[K] + k, sums[KT] + kt, fma(kt, t, sums[KTT]), fma(k, wide, sums[KU]), fma(kt, wide, sums[KUT]),
        )  # fmt: skip

    return step_bent


@cache
def product_sums(x: str, y: str, compute: str, activation: str | None, second: bool, masked: bool) -> tuple[Any, Any]:
    """run(...) for one channel's runs, columns(...) for rows with accumulators element by element."""
    load_x, load_x_part = loader(x, compute)
    load_y, load_y_part = loader(y, compute)
    load_c, _ = loader(compute, compute)
    count = sums_of(second, activation in GATES)
    zeros, add_all, _ = tuples(count, compute)
    step = stepper(compute, activation, second, masked)
    lanes = to_compute(compute)
    double = compute == "float64"
    active = activation is not None and second
    x_size, y_size = itemsize(x), itemsize(y)
    c_size = 8 if double else 4

    @inner
    def along(x: Any, p: Any, h: Any, m: Any, power: Any, minus: Any) -> Any:
        # float64 lanes need the mean's parts one after the other; of float32 lanes' t nothing is lost either way
        if double:
            return fma(widen(x), power, widen(h)) + widen(m)
        return fma(widen(x), power, minus)

    @inner
    def run(
        px: int, x_step: int, pu: int, u_step: int, pv: int, v_step: int, pm: int, m_step: int, rows: int, length: int,
        p: Any, h: Any, m: Any, scale: float, shift: float, own: int, out: int, stride: int,
    ) -> None:  # fmt: skip
        power = widen(p)
        minus = widen(h) + widen(m)
        a = lanes(scale)
        s = lanes(shift)
        zero = splat(0.0)
        for k in range(2 * count):
            _store64(own + k * _LINE, zero)
        sums = zeros()
        steps = 0
        for r in range(rows):
            qx = px + r * x_step
            qu = pu + r * u_step
            qv = pv + r * v_step
            qm = pm + r * m_step
            left = length
            while left > 0:
                if left >= LANES:
                    xs = load_x(qx)
                    us = load_y(qu)
                    vs = us
                    if second:
                        vs = load_y(qv)
                    t = along(xs, p, h, m, power, minus)
                else:
                    xs = load_x_part(qx, left)
                    us = load_y_part(qu, left)
                    vs = us
                    if second:
                        vs = load_y_part(qv, left)
                    # zeros beyond the end: 0 * t must not bring in an infinite t
                    t = select(first_lanes(left), along(xs, p, h, m, power, minus), zero)
                kept = first_lanes(left)
                if masked:
                    kept = mask_at(qm, left)
                    qm += LANES
                sums = step(sums, xs, us, vs, t, kept, p, h, m, a, s)
                qx += LANES * x_size
                qu += LANES * y_size
                qv += LANES * y_size
                left -= LANES
                if double:
                    steps += 1
                    if steps == _STEPS:
                        add_all(own, _LINE, sums)
                        sums = zeros()
                        steps = 0
        add_all(own, _LINE, sums)
        for k in range(count):
            total = _load64(own + k * _LINE)
            if double:
                total += _load64(own + (count + k) * _LINE)
            store_f64(out + k * stride, 0, reduce_add(total))

    @inner
    def some_columns(
        px: int, x_step: int, pu: int, u_step: int, pv: int, v_step: int, pm: int, m_step: int, rows: int, cols: int,
        own: int, each64: int, coefficients: int, each: int,
    ) -> None:  # fmt: skip
        left = cols
        while left > 0:
            sums = zeros()
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = p
            s = p
            if active:
                a = load_c(coefficients + 3 * each)
                s = load_c(coefficients + 4 * each)
            power = widen(p)
            minus = widen(h) + widen(m)
            for r in range(rows):
                if left >= LANES:
                    xs = load_x(px + r * x_step)
                    us = load_y(pu + r * u_step)
                    vs = us
                    if second:
                        vs = load_y(pv + r * v_step)
                else:
                    xs = load_x_part(px + r * x_step, left)
                    us = load_y_part(pu + r * u_step, left)
                    vs = us
                    if second:
                        vs = load_y_part(pv + r * v_step, left)
                kept = first_lanes(left)
                if masked:
                    kept = mask_at(pm + r * m_step, left)
                sums = step(sums, xs, us, vs, along(xs, p, h, m, power, minus), kept, p, h, m, a, s)
            add_all(own, each64, sums)
            own += _LINE
            coefficients += LANES * c_size
            px += LANES * x_size
            pu += LANES * y_size
            pv += LANES * y_size
            pm += LANES
            left -= LANES

    @inner
    def columns(
        px: int, x_step: int, pu: int, u_step: int, pv: int, v_step: int, pm: int, m_step: int, rows: int, cols: int,
        own: int, each64: int, coefficients: int, each: int, touched: int,
    ) -> None:  # fmt: skip
        zero = splat(0.0)
        arrays = 2 + second
        for k in range(2 * count):
            for j in range(0, cols, LANES):
                _store64(own + k * each64 + 8 * j, zero)
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            touch_rows(px + done * x_step, x_step, here, cols * x_size, touched // arrays)
            touch_rows(pu + done * u_step, u_step, here, cols * y_size, touched // arrays)
            if second:
                touch_rows(pv + done * v_step, v_step, here, cols * y_size, touched // arrays)
            some_columns(
                px + done * x_step, x_step, pu + done * u_step, u_step, pv + done * v_step, v_step,
                pm + done * m_step, m_step, here, cols, own, each64, coefficients, each,
            )  # fmt: skip
            done += _ROWS

    return run, columns


# the coefficients of a group in the order of `coefficient_kernel`, without those of a channel
(_P, _H, _M, _A, _S, _SLOPE, _OFFSET, _D, _E) = range(9)


def coefficients_of(second: bool) -> int:
    """How many coefficients an element has."""
    return 16 if second else 9


@cache
def combiner(compute: str, activation: str | None, second: bool, masked: bool) -> Any:
    """combine(x, u, v, kept, c): gdy and gx (of the jvp: ty, twice) from a tuple c of coefficients."""
    derivatives = derivative_kernel(compute, activation)
    lanes = to_compute(compute)
    active = activation is not None
    bent = activation in GATES

    @inner
    def combine(x: Any, u: Any, v: Any, kept: Any, c: Any) -> Any:
        p = c[_P]
        t = fma(x, p, c[_H]) + c[_M]
        pushed = u + fma(c[_SLOPE], t, c[_OFFSET])
        gdz = fma(c[_A] * pushed, p, fma(c[_D], t, c[_E]))
        gdy = gdz
        if active:
            slope, curvature = derivatives(fma(t, c[_A], c[_S]))
            gdy = gdz * slope
        if not second:
            return gdy, gdy
        inside = fma(c[w.GX_U], pushed, fma(c[w.GX_INNER_SLOPE], t, c[w.GX_INNER_OFFSET]))
        outside = fma(c[w.GX_SLOPE], t, c[w.GX_OFFSET])
        if masked:  # x of the others has no part in the statistics
            inside = select(kept, inside, lanes(0.0))
            outside = select(kept, outside, lanes(0.0))
        if bent:
            outside = fma(c[_A], v * curvature * gdz, outside)
        if active:
            v = v * slope
        inside = fma(c[w.GX_V], c[_A] * v, inside)
        return gdy, fma(p, inside, fma(c[_D], v, outside)) * c[w.GX_POWER]

    return combine


@cache
def apply_kernels(
    x: str, y: str, compute: str, activation: str | None, second: bool, masked: bool
) -> tuple[Any, Any, Any]:
    """splats(record, a, s, d, e): a tuple of coefficients; run(...) with them, rows(...) with those in memory."""
    load_x, load_x_part = loader(x, compute)
    load_y, load_y_part = loader(y, compute)
    store, store_part, store_stream = storer(y, compute)
    combine = combiner(compute, activation, second, masked)
    masks = masked and second
    _, _, load_all = tuples(coefficients_of(second), compute)
    lanes = to_compute(compute)
    x_size, y_size = itemsize(x), itemsize(y)
    c_size = 4 if compute == "float32" else 8
    line = line_elements(y)

    @inner
    def splats_first(record: int, a: float, s: float, d: float, e: float) -> Any:
        return (
            lanes(load_f64(record, w.POWER)), lanes(load_f64(record, w.MINUS_HIGH)),
            lanes(load_f64(record, w.MINUS_LOW)), lanes(a), lanes(s),
            lanes(load_f64(record, w.SLOPE)), lanes(load_f64(record, w.OFFSET)), lanes(d), lanes(e),
        )  # fmt: skip

    @inner
    def splats_second(record: int, a: float, s: float, d: float, e: float) -> Any:
        return (
            *splats_first(record, a, s, d, e),
            lanes(load_f64(record, w.GX_OFFSET)), lanes(load_f64(record, w.GX_SLOPE)),
            lanes(load_f64(record, w.GX_V)), lanes(load_f64(record, w.GX_U)),
            lanes(load_f64(record, w.GX_INNER_SLOPE)), lanes(load_f64(record, w.GX_INNER_OFFSET)),
            lanes(load_f64(record, w.GX_POWER)),
        )  # fmt: skip

    @inner
    def part(px: int, pu: int, pv: int, pm: int, py: int, pg: int, count: int, c: Any) -> None:
        v = u = load_y_part(pu, count)
        if second:
            v = load_y_part(pv, count)
        kept = first_lanes(count)
        if masks:
            kept = mask_at(pm, count)
        first, other = combine(load_x_part(px, count), u, v, kept, c)
        store_part(py, first, count)
        if second:
            store_part(pg, other, count)

    @inner
    def whole(px: int, pu: int, pv: int, pm: int, py: int, pg: int, stream: bool, c: Any) -> None:
        v = u = load_y(pu)
        if second:
            v = load_y(pv)
        kept = first_lanes(LANES)
        if masks:
            kept = mask_at(pm, LANES)
        first, other = combine(load_x(px), u, v, kept, c)
        if stream:
            store_stream(py, first)
            if second:
                store_stream(pg, other)
        else:
            store(py, first)
            if second:
                store(pg, other)

    @inner
    def run(px: int, pu: int, pv: int, pm: int, py: int, pg: int, count: int, c: Any, stream: bool) -> None:
        streams = False
        head = 0
        if count >= _ALIGN_FROM:
            head = (-py & (LINE - 1)) // y_size
            streams = stream and ((py + head * y_size) | (pg + head * y_size)) & (LINE - 1) == 0
        unstreamed = (count - head) % line if streams else count
        left = count
        while left > 0:
            here = min(left if head == 0 else head, LANES)
            if here == LANES and head == 0:
                whole(px, pu, pv, pm, py, pg, left > unstreamed, c)
            else:
                part(px, pu, pv, pm, py, pg, here, c)
            head = max(head - LANES, 0)
            px += here * x_size
            pu += here * y_size
            pv += here * y_size
            pm += here
            py += here * y_size
            pg += here * y_size
            left -= here

    @inner
    def rows_kernel(
        px: int, x_step: int, pu: int, u_step: int, pv: int, v_step: int, pm: int, m_step: int,
        py: int, y_step: int, pg: int, g_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
    ) -> None:  # fmt: skip
        streams = stream and (py | y_step | pg | g_step) & (LINE - 1) == 0
        done = 0
        while done < rows:
            j = 0
            while j < cols:
                c = load_all(coefficients + j * c_size, each)
                for r in range(done, min(done + _ROWS, rows)):
                    qx = px + r * x_step + j * x_size
                    qu = pu + r * u_step + j * y_size
                    qv = pv + r * v_step + j * y_size
                    qm = pm + r * m_step + j
                    qy = py + r * y_step + j * y_size
                    qg = pg + r * g_step + j * y_size
                    if cols - j < LANES:
                        part(qx, qu, qv, qm, qy, qg, cols - j, c)
                    else:
                        whole(qx, qu, qv, qm, qy, qg, streams, c)
                j += LANES
            done += _ROWS

    return splats_second if second else splats_first, run, rows_kernel
