"""dx of a run of one channel, or of rows with coefficients element by element: the loops of the backward's last phase.

x and dy are read once and dx written once: dx = DX_POWER * (A*dz + B*t + C), with t = x_hat / RATIO and
dz = dy * act'(z). Under a mask B*t + C is for the elements that are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .apply import HEAD_FROM, rows_together
from .compile import inner
from .convert import LINE, itemsize, line_elements, loader, mask_loader, storer, to_compute
from .simd import LANES, fma, select

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
    lanes = to_compute(compute)
    x_size, v_size, y_size = itemsize(x), itemsize(v), itemsize(y)
    c_size = 4 if compute == "float32" else 8
    line = line_elements(y)

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
            head = (-py & (LINE - 1)) // y_size
            while head > 0:
                here = min(head, LANES)
                v = gradient_part(load_x_part(px, here), load_v_part(pv, here), pm, here, p, h, m, a, b, c, s, q)
                store_part(py, v, here)
                px += here * x_size
                pv += here * v_size
                pm += here
                py += here * y_size
                count -= here
                head -= here
            if stream and py & (LINE - 1) == 0:
                while count >= line:
                    for j in range(0, line, LANES):
                        xr, vr = load_x(px + j * x_size), load_v(pv + j * v_size)
                        store_stream(py + j * y_size, gradient(xr, vr, pm + j, p, h, m, a, b, c, s, q))
                    px += line * x_size
                    pv += line * v_size
                    pm += line
                    py += line * y_size
                    count -= line
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
        unstreamed = (cols - head) % line if stream else cols
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            s = load_c(coefficients + 4 * each)
            b = load_c(coefficients + 5 * each)
            c = load_c(coefficients + 6 * each)
            q = load_c(coefficients + 7 * each) if double else p
            width = min(left, LANES) if head == 0 else min(head, LANES)
            if width < LANES or head > 0:
                for r in range(rows):
                    xr = load_x_part(px + r * x_step, width)
                    v = load_v_part(pv + r * v_step, width)
                    v = gradient_part(xr, v, pm + r * m_step, width, p, h, m, a, b, c, s, q)
                    store_part(py + r * y_step, v, width)
            elif left > unstreamed:
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
            head = max(head - LANES, 0)

    @inner
    def folded_gradient(px: int, pv: int, pm: int, left: int, coefficients: int, each: int) -> Any:
        # A*dz + B*x + C, of the first `left` lanes where that is less than a vector
        a = load_c(coefficients + 3 * each)
        b = load_c(coefficients + 5 * each)
        c = load_c(coefficients + 6 * each)
        if left >= LANES:
            xv = load_x(px)
            v = load_v(pv)
        else:
            xv = load_x_part(px, left)
            v = load_v_part(pv, left)
        if active:
            v = slope(v, fma(xv, a, load_c(coefficients + 4 * each)))
        rest = fma(b, xv, c)
        if masked:
            kept = load_mask(pm) if left >= LANES else load_mask_part(pm, left)
            rest = select(kept, rest, lanes(0.0))
        return fma(a, v, rest)

    @inner
    def folded_row(
        px: int, pv: int, pm: int, py: int, cols: int, coefficients: int, each: int, stream: bool, head: int
    ) -> None:
        while head > 0:
            here = min(head, LANES)
            store_part(py, folded_gradient(px, pv, pm, here, coefficients, each), here)
            px += here * x_size
            pv += here * v_size
            pm += here
            py += here * y_size
            coefficients += here * c_size
            cols -= here
            head -= here
        whole = cols // LANES * LANES
        streamed = cols // line * line if stream else 0
        for j in range(0, streamed, LANES):
            v = folded_gradient(px + j * x_size, pv + j * v_size, pm + j, LANES, coefficients + j * c_size, each)
            store_stream(py + j * y_size, v)
        for j in range(streamed, whole, LANES):
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
        coefficients: int, each: int, stream: bool, folded: bool, touched: int,
    ) -> None:  # fmt: skip
        head = 0  # as in the forward's apply
        if stream and cols >= HEAD_FROM and y_step & (LINE - 1) == 0:
            head = (-py & (LINE - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (LINE - 1) == 0
        if folded:
            for r in range(rows):
                folded_row(
                    px + r * x_step, pv + r * v_step, pm + r * m_step, py + r * y_step, cols, coefficients, each,
                    streams, head,
                )  # fmt: skip
            return
        together = rows_together(streams, touched, (7 + double) * cols * c_size)
        done = 0
        while done < rows:
            here = min(together, rows - done)
            some_rows(
                px + done * x_step, x_step, pv + done * v_step, v_step, pm + done * m_step, m_step,
                py + done * y_step, y_step, here, cols, coefficients, each, streams, head,
            )  # fmt: skip
            done += here

    return run, rows_kernel
