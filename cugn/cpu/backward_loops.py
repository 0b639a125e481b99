"""dx of a run of one channel, or of rows with coefficients element by element: the loops of the backward's last phase.

x and dy are read once and dx written once: dx = DX_POWER * (A*dz + B*t + C), with t = x_hat / RATIO and
dz = dy * act'(z). Under a mask B*t + C is for the elements that are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .apply import HEAD_FROM
from .compile import inner
from .convert import itemsize, loader, mask_loader, storer, to_compute
from .simd import LANES, fma, select

_ROWS = 4
_ALIGN_FROM = 256


@cache
def apply_kernels(x: str, v: str, y: str, compute: str, activation: str | None, masked: bool) -> tuple[Any, Any]:
    """run(...) for dx of a run of one channel, rows(...) with coefficients element by element; v is the dtype of dy."""
    load_mask, load_mask_part = mask_loader()
    load_x, load_x_part = loader(x, compute)
    load_v, load_v_part = loader(v, compute)
    load_c, _ = loader(compute, compute)
    store, store_part, store_stream = storer(y, compute)
    slope = activation_kernels(compute, activation)[1]
    active = activation is not None
    double = compute == "float64"
    relu = activation == "relu" and not double  # t is for z, which has to be that of the sums to the bit
    lanes = to_compute(compute)
    x_size, v_size, y_size = itemsize(x), itemsize(v), itemsize(y)
    c_size = 4 if compute == "float32" else 8
    alignment = min(64, LANES * y_size)

    @inner
    def gradient(xv: Any, v: Any, pm: int, p: Any, h: Any, m: Any, a: Any, b: Any, c: Any, shift: Any, q: Any) -> Any:
        t = fma(xv, p, h) + m
        if active:
            v = slope(v, fma(t, a, shift))
        rest = fma(b, t, c)
        if masked:
            rest = select(load_mask(pm), rest, lanes(0.0))
        return fma(a, v, rest) * q

    @inner
    def gradient_part(
        xv: Any, v: Any, pm: int, left: int, p: Any, h: Any, m: Any, a: Any, b: Any, c: Any, shift: Any,
        q: Any,
    ) -> Any:  # fmt: skip
        t = fma(xv, p, h) + m
        if active:
            v = slope(v, fma(t, a, shift))
        rest = fma(b, t, c)
        if masked:
            rest = select(load_mask_part(pm, left), rest, lanes(0.0))
        return fma(a, v, rest) * q

    @inner
    def run(
        px: int, pv: int, pm: int, py: int, count: int, p: Any, h: Any, m: Any, q: Any, b: Any, c: Any,
        scale: float, shift: float, stream: bool,
    ) -> None:  # fmt: skip
        a = lanes(scale)
        s = lanes(shift)
        if count >= _ALIGN_FROM:
            head = (-py & (alignment - 1)) // y_size
            if head > 0:
                v = gradient_part(load_x_part(px, head), load_v_part(pv, head), pm, head, p, h, m, a, b, c, s, q)
                store_part(py, v, head)
                px += head * x_size
                pv += head * v_size
                pm += head
                py += head * y_size
                count -= head
            if stream and py & (alignment - 1) == 0:
                while count >= LANES:
                    store_stream(py, gradient(load_x(px), load_v(pv), pm, p, h, m, a, b, c, s, q))
                    px += LANES * x_size
                    pv += LANES * v_size
                    pm += LANES
                    py += LANES * y_size
                    count -= LANES
        while count >= LANES:
            store(py, gradient(load_x(px), load_v(pv), pm, p, h, m, a, b, c, s, q))
            px += LANES * x_size
            pv += LANES * v_size
            pm += LANES
            py += LANES * y_size
            count -= LANES
        if count > 0:
            v = gradient_part(load_x_part(px, count), load_v_part(pv, count), pm, count, p, h, m, a, b, c, s, q)
            store_part(py, v, count)

    @inner
    def some_rows(
        px: int, x_step: int, pv: int, v_step: int, pm: int, m_step: int, py: int, y_step: int, rows: int, cols: int,
        coefficients: int, each: int, stream: bool, head: int,
    ) -> None:  # fmt: skip
        left = cols
        width = head
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            s = load_c(coefficients + 4 * each)
            b = load_c(coefficients + 5 * each)
            c = load_c(coefficients + 6 * each)
            q = load_c(coefficients + 7 * each) if double else p
            if width == 0:
                width = min(left, LANES)
            if width < LANES:
                for r in range(rows):
                    xr = load_x_part(px + r * x_step, width)
                    v = load_v_part(pv + r * v_step, width)
                    v = gradient_part(xr, v, pm + r * m_step, width, p, h, m, a, b, c, s, q)
                    store_part(py + r * y_step, v, width)
            elif stream:
                for r in range(rows):
                    xr = load_x(px + r * x_step)
                    v = gradient(xr, load_v(pv + r * v_step), pm + r * m_step, p, h, m, a, b, c, s, q)
                    store_stream(py + r * y_step, v)
            else:
                for r in range(rows):
                    xr = load_x(px + r * x_step)
                    v = gradient(xr, load_v(pv + r * v_step), pm + r * m_step, p, h, m, a, b, c, s, q)
                    store(py + r * y_step, v)
            coefficients += width * c_size
            px += width * x_size
            pv += width * v_size
            pm += width
            py += width * y_size
            left -= width
            width = 0

    @inner
    def folded_gradient(px: int, pv: int, pm: int, left: int, coefficients: int, each: int) -> Any:
        # A*dz + B*x + C, or with t under relu; of the first `left` lanes where that is less than a vector
        a = load_c(coefficients + 3 * each)
        b = load_c(coefficients + 5 * each)
        c = load_c(coefficients + 6 * each)
        if left >= LANES:
            xv = load_x(px)
            v = load_v(pv)
        else:
            xv = load_x_part(px, left)
            v = load_v_part(pv, left)
        power = load_c(coefficients)
        if relu:
            xv = fma(xv, power, load_c(coefficients + each)) + load_c(coefficients + 2 * each)
        if active:
            v = slope(v, fma(xv, a, load_c(coefficients + 4 * each)))
        rest = fma(b, xv, c)
        if masked:
            kept = load_mask(pm) if left >= LANES else load_mask_part(pm, left)
            rest = select(kept, rest, lanes(0.0))
        rest = fma(a, v, rest)
        return rest * power if relu else rest

    @inner
    def folded_row(
        px: int, pv: int, pm: int, py: int, cols: int, coefficients: int, each: int, stream: bool, head: int
    ) -> None:
        if head > 0:
            store_part(py, folded_gradient(px, pv, pm, head, coefficients, each), head)
            px += head * x_size
            pv += head * v_size
            pm += head
            py += head * y_size
            coefficients += head * c_size
            cols -= head
        whole = cols // LANES * LANES
        if stream:
            for j in range(0, whole, LANES):
                v = folded_gradient(px + j * x_size, pv + j * v_size, pm + j, LANES, coefficients + j * c_size, each)
                store_stream(py + j * y_size, v)
        else:
            for j in range(0, whole, LANES):
                v = folded_gradient(px + j * x_size, pv + j * v_size, pm + j, LANES, coefficients + j * c_size, each)
                store(py + j * y_size, v)
        left = cols - whole
        if left > 0:
            j = whole
            v = folded_gradient(px + j * x_size, pv + j * v_size, pm + j, left, coefficients + j * c_size, each)
            store_part(py + j * y_size, v, left)

    @inner
    def rows_kernel(
        px: int, x_step: int, pv: int, v_step: int, pm: int, m_step: int, py: int, y_step: int, rows: int, cols: int,
        coefficients: int, each: int, stream: bool, folded: bool,
    ) -> None:  # fmt: skip
        head = 0  # as in the forward's apply
        if stream and cols >= HEAD_FROM and y_step & (alignment - 1) == 0:
            head = (-py & (alignment - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (alignment - 1) == 0
        # relu's coefficients are not folded: without streaming a row at a time takes 0.78 of four rows' time
        # ((2, 320, 64, 64) channels-last, AVX-512), with streaming 1.2
        if folded or (relu and not streams):
            for r in range(rows):
                folded_row(
                    px + r * x_step, pv + r * v_step, pm + r * m_step, py + r * y_step, cols, coefficients, each,
                    streams, head,
                )  # fmt: skip
            return
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            some_rows(
                px + done * x_step, x_step, pv + done * v_step, v_step, pm + done * m_step, m_step,
                py + done * y_step, y_step, here, cols, coefficients, each, streams, head,
            )  # fmt: skip
            done += here

    return run, rows_kernel
