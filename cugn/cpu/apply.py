"""y = act(x_hat * weight + bias) over a run of one channel, or over rows with coefficients element by element.

x is read once and y written once. With the mean in two parts and POWER next to rstd: t = fma(x, POWER, MINUS_HIGH)
+ MINUS_LOW, y = fma(t, a, b): four roundings, <= 2e of the result's scale. Streaming stores leave y out of the
cache: 25 against 17 GB/s for arrays that would not stay there anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .compile import inner
from .convert import LINE, line_elements, loader, storer, to_compute
from .phases import GATES
from .simd import LANES, fma

_ALIGN_FROM = 256
HEAD_FROM = 128
"""Columns of a row from which a few of them may be stored by themselves."""


@inner
def rows_together(streams: bool, touched: int, coefficient_bytes: int) -> int:
    """How many rows are gone over column by column, so that coefficients are loaded once for all of them.

    From main memory one, if L1 holds the coefficients beside it: 0.66 to 0.8 of the time of four (float64). In cache
    four (one takes 1.3 of the time), and where y is streamed (1.2).
    """
    return 4 if streams or touched == 0 or coefficient_bytes > 16384 else 1


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
    def element(v: Any, p: Any, h: Any, m: Any, a: Any, b: Any, folded: bool) -> Any:
        if folds and folded:
            return act(fma(v, a, b))
        return act(fma(fma(v, p, h) + m, a, b))

    @inner
    def run(
        px: int, py: int, count: int, p: Any, h: Any, m: Any, scale: float, shift: float, stream: bool, folded: bool
    ) -> None:  # fmt: skip
        a = lanes(scale)
        b = lanes(shift)
        if count >= _ALIGN_FROM:
            # NumPy's arrays lie 16 bytes off a cache line: a head makes all stores, and mostly the loads, whole lines
            head = (-py & (LINE - 1)) // y_size
            while head > 0:
                here = min(head, LANES)
                store_part(py, element(load_part(px, here), p, h, m, a, b, folded), here)
                px += here * x_size
                py += here * y_size
                count -= here
                head -= here
            if stream and py & (LINE - 1) == 0:
                while count >= line:
                    for j in range(0, line, LANES):
                        store_stream(py + j * y_size, element(load(px + j * x_size), p, h, m, a, b, folded))
                    px += line * x_size
                    py += line * y_size
                    count -= line
        while count >= 2 * LANES:
            y0 = element(load(px), p, h, m, a, b, folded)
            y1 = element(load(px + LANES * x_size), p, h, m, a, b, folded)
            store(py, y0)
            store(py + LANES * y_size, y1)
            px += 2 * LANES * x_size
            py += 2 * LANES * y_size
            count -= 2 * LANES
        if count >= LANES:
            store(py, element(load(px), p, h, m, a, b, folded))
            px += LANES * x_size
            py += LANES * y_size
            count -= LANES
        if count > 0:
            store_part(py, element(load_part(px, count), p, h, m, a, b, folded), count)

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
    def folded_row(px: int, py: int, cols: int, a: int, b: int, stream: bool, head: int) -> None:
        # one row of A*x + B; each coefficient is loaded for each element, and no two rows get in each other's way
        while head > 0:
            here = min(head, LANES)
            store_part(py, act(fma(load_part(px, here), load_c(a), load_c(b))), here)
            px += here * x_size
            py += here * y_size
            a += here * c_size
            b += here * c_size
            cols -= here
            head -= here
        whole = cols // LANES * LANES
        streamed = cols // line * line if stream else 0
        for j in range(0, streamed, LANES):
            value = act(fma(load(px + j * x_size), load_c(a + j * c_size), load_c(b + j * c_size)))
            store_stream(py + j * y_size, value)
        for j in range(streamed, whole, LANES):
            value = act(fma(load(px + j * x_size), load_c(a + j * c_size), load_c(b + j * c_size)))
            store(py + j * y_size, value)
        left = cols - whole
        if left > 0:
            j = whole
            value = act(fma(load_part(px + j * x_size, left), load_c(a + j * c_size), load_c(b + j * c_size)))
            store_part(py + j * y_size, value, left)

    @inner
    def rows_kernel(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        folded: bool, touched: int,
    ) -> None:  # fmt: skip
        # streaming needs whole lines: a head in each row makes all other stores such (0.7 of the time for 75 MB; within
        # the cache the heads would cost more than whole lines gain)
        head = 0
        if stream and cols >= HEAD_FROM and y_step & (LINE - 1) == 0:
            head = (-py & (LINE - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (LINE - 1) == 0
        if folded:
            a = coefficients + 3 * each
            for r in range(rows):
                folded_row(px + r * x_step, py + r * y_step, cols, a, a + each, streams, head)
            return
        together = rows_together(streams, touched, 5 * cols * c_size)
        done = 0
        while done < rows:
            here = min(together, rows - done)
            some_rows(
                px + done * x_step, x_step, py + done * y_step, y_step, here, cols, coefficients, each, streams, head
            )
            done += here

    return run, rows_kernel
