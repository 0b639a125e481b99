"""y = act(x_hat * weight + bias) over a run of one channel, or over rows with coefficients element by element.

x is read once and y written once. With the mean in two parts and POWER next to rstd: t = fma(x, POWER, MINUS_HIGH)
+ MINUS_LOW, y = fma(t, a, b): four roundings, <= 2e of the result's scale.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .chunks import turn_of
from .compile import inner, within
from .convert import LINE, line_elements, loader, storer, to_compute
from .phases import GATES
from .simd import LANES, fma
from .walk import ALIGN_FROM, ONCE, walker

HEAD_FROM = 128
"""Columns of a row from which a few of them may be stored by themselves."""


@inner
def coefficients_together(streams: bool, touched: int, coefficient_bytes: int) -> int:
    """How many rows are gone over column by column, so that coefficients are loaded once for all of them.

    From main memory one, if L1 holds the coefficients beside it: 0.66 to 0.8 of the time of four (float64). In cache
    four (one takes 1.3 of the time), and where y is streamed (1.2).
    """
    return 4 if streams or touched == 0 or coefficient_bytes > 16384 else 1


@inner
def runs_on(stream: bool, touched: int, cols: int) -> bool:
    """Whether rows that lie one after another are one run although they have all of their coefficients.

    From main memory, where the ends of rows would be parts of lines (0.7 to 0.95 of the time), and where such parts are
    most of a row. In cache it takes 1.05 to 1.3 of the time of four rows whose coefficients are in registers.
    """
    return stream or touched > 0 or cols < LANES


def folds_runs(compute: str, activation: str | None) -> bool:
    """Whether scale and shift of a run are those of x itself where they may be: a gate leaves no operation free.

    Not in float64, where it gains little: 0.94 of the time, in float32 0.8.
    """
    return activation in GATES and compute == "float32"


@cache
def apply_kernels(x: str, y: str, compute: str, activation: str | None, x_size: int, y_size: int) -> tuple[Any, Any]:
    """run(px, py, count, coefficients, stream) and rows(px, x_step, py, y_step, rows, cols, coefficients, each,
    stream).
    """
    load, load_part = loader(x, compute)
    store, store_part, store_stream = storer(y, compute)
    load_c, _ = loader(compute, compute)
    lanes = to_compute(compute)
    act = activation_kernels(compute, activation)[0]
    folds = folds_runs(compute, activation)
    c_size = 4 if compute == "float32" else 8
    line = line_elements(y)

    @inner
    def of_run(px: int, pv: int, pm: int, left: int, coefficients: int, folded: bool, values: Any) -> Any:
        p, h, m, a, b = values
        v = load(px) if left >= LANES else load_part(px, left)
        if folds and folded:
            return act(fma(v, a, b))
        return act(fma(fma(v, p, h) + m, a, b))

    @inner
    def of_row(px: int, pv: int, pm: int, left: int, coefficients: int, folded: bool, each: int) -> Any:
        v = load(px) if left >= LANES else load_part(px, left)
        if not folded:
            v = fma(v, load_c(coefficients), load_c(coefficients + each)) + load_c(coefficients + 2 * each)
        return act(fma(v, load_c(coefficients + 3 * each), load_c(coefficients + 4 * each)))

    walk_run, few = walker(of_run, x, x, y, compute)
    walk_rows, _ = walker(of_row, x, x, y, compute)

    @within
    def run(
        px: int, py: int, count: int, p: Any, h: Any, m: Any, scale: float, shift: float, stream: bool, folded: bool
    ) -> None:  # fmt: skip
        values = (p, h, m, lanes(scale), lanes(shift))
        if folds and folded:
            if count < ALIGN_FROM:
                few(px, px, 0, py, count, True, values)
            else:
                walk_run(px, px, 0, py, count, 0, ONCE, True, stream, True, values)
        elif count < ALIGN_FROM:
            few(px, px, 0, py, count, False, values)
        else:
            walk_run(px, px, 0, py, count, 0, ONCE, True, stream, False, values)

    @inner
    def some_rows(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        head: int,
    ) -> None:  # fmt: skip
        left = cols
        unstreamed = (cols - head) % line if stream else cols
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            b = load_c(coefficients + 4 * each)
            width = min(left, LANES) if head == 0 else min(head, LANES)
            if width < LANES or head > 0:
                for r in range(rows):
                    v = load_part(px + r * x_step, width)
                    store_part(py + r * y_step, act(fma(fma(v, p, h) + m, a, b)), width)
            elif left > unstreamed:
                for r in range(rows):
                    store_stream(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            else:
                for r in range(rows):
                    store(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            coefficients += width * c_size
            px += width * x_size
            py += width * y_size
            left -= width
            head = max(head - LANES, 0)

    @inner
    def rows_kernel(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        folded: bool, touched: int,
    ) -> None:  # fmt: skip
        lined = x_step == cols * x_size and y_step == cols * y_size
        if folded or (lined and runs_on(stream, touched, cols)):
            count = rows * cols if lined else cols
            head_first = stream and count >= HEAD_FROM
            for r in range(1 if lined else rows):
                qx, qy = px + r * x_step, py + r * y_step
                if folded:
                    walk_rows(qx, qx, 0, qy, count, coefficients, turn_of(cols), head_first, stream, True, each)
                else:
                    walk_rows(qx, qx, 0, qy, count, coefficients, turn_of(cols), head_first, stream, False, each)
            return
        # streaming needs whole lines: a head in each row makes all other stores such (0.7 of the time for 75 MB; within
        # the cache the heads would cost more than whole lines gain)
        head = 0
        if stream and cols >= HEAD_FROM and y_step & (LINE - 1) == 0:
            head = (-py & (LINE - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (LINE - 1) == 0
        together = coefficients_together(streams, touched, 5 * cols * c_size)
        done = 0
        while done < rows:
            here = min(together, rows - done)
            some_rows(
                px + done * x_step, x_step, py + done * y_step, y_step, here, cols, coefficients, each, streams, head
            )
            done += here

    return run, rows_kernel
