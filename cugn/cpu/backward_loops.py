"""dx of a run of one channel, or of rows with coefficients element by element: the loops of the backward's last phase.

x and dy are read once and dx written once: dx = DX_POWER * (A*dz + B*t + C), with t = x_hat / RATIO and
dz = dy * act'(z). Under a mask B*t + C is for the elements that are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .apply import HEAD_FROM, coefficients_together, runs_on
from .chunks import turn_of
from .compile import inner, within
from .convert import LINE, itemsize, line_elements, loader, mask_loader, storer, to_compute
from .simd import LANES, fma, select
from .walk import ALIGN_FROM, ONCE, walker


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
    def of_run(px: int, pv: int, pm: int, left: int, coefficients: int, folded: bool, values: Any) -> Any:
        p, h, m, a, b, c, s, q = values
        if left >= LANES:
            return gradient(load_x(px), load_v(pv), pm, p, h, m, a, b, c, s, q)
        return gradient_part(load_x_part(px, left), load_v_part(pv, left), pm, left, p, h, m, a, b, c, s, q)

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
    def of_row(px: int, pv: int, pm: int, left: int, coefficients: int, folded: bool, each: int) -> Any:
        # of the first `left` lanes where that is less than a vector; A*dz + B*x + C if folded
        a = load_c(coefficients + 3 * each)
        s = load_c(coefficients + 4 * each)
        b = load_c(coefficients + 5 * each)
        c = load_c(coefficients + 6 * each)
        if left >= LANES:
            t = load_x(px)
            v = load_v(pv)
        else:
            t = load_x_part(px, left)
            v = load_v_part(pv, left)
        if not folded:
            t = fma(t, load_c(coefficients), load_c(coefficients + each)) + load_c(coefficients + 2 * each)
        if active:
            v = slope(v, fma(t, a, s))
        rest = fma(b, t, c)
        if masked:
            kept = load_mask(pm) if left >= LANES else load_mask_part(pm, left)
            rest = select(kept, rest, lanes(0.0))
        dx = fma(a, v, rest)
        if not folded:
            dx = dx * load_c(coefficients + 7 * each if double else coefficients)
        return dx

    walk_run, few = walker(of_run, x, v, y, compute)
    walk_rows, _ = walker(of_row, x, v, y, compute)

    @within
    def run(
        px: int, pv: int, pm: int, py: int, count: int, p: Any, h: Any, m: Any, q: Any, b: Any, c: Any,
        scale: float, shift: float, stream: bool,
    ) -> None:  # fmt: skip
        values = (p, h, m, lanes(scale), b, c, lanes(shift), q)
        if count < ALIGN_FROM:
            few(px, pv, pm, py, count, False, values)
        else:
            walk_run(px, pv, pm, py, count, 0, ONCE, True, stream, False, values)

    @inner
    def rows_kernel(
        px: int, x_step: int, pv: int, v_step: int, pm: int, m_step: int, py: int, y_step: int, rows: int, cols: int,
        coefficients: int, each: int, stream: bool, folded: bool, touched: int,
    ) -> None:  # fmt: skip
        lined = x_step == cols * x_size and v_step == cols * v_size and y_step == cols * y_size
        if masked:
            lined = lined and m_step == cols
        if folded or (lined and runs_on(stream, touched, cols)):
            count = rows * cols if lined else cols
            head_first = stream and count >= HEAD_FROM
            for r in range(1 if lined else rows):
                qx, qv, qm, qy = px + r * x_step, pv + r * v_step, pm + r * m_step, py + r * y_step
                if folded:
                    walk_rows(qx, qv, qm, qy, count, coefficients, turn_of(cols), head_first, stream, True, each)
                else:
                    walk_rows(qx, qv, qm, qy, count, coefficients, turn_of(cols), head_first, stream, False, each)
            return
        head = 0  # as in the forward's apply
        if stream and cols >= HEAD_FROM and y_step & (LINE - 1) == 0:
            head = (-py & (LINE - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (LINE - 1) == 0
        together = coefficients_together(streams, touched, (7 + double) * cols * c_size)
        done = 0
        while done < rows:
            here = min(together, rows - done)
            some_rows(
                px + done * x_step, x_step, pv + done * v_step, v_step, pm + done * m_step, m_step,
                py + done * y_step, y_step, here, cols, coefficients, each, streams, head,
            )  # fmt: skip
            done += here

    return run, rows_kernel
