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
from .convert import loader, storer, to_compute
from .simd import LANES, fma

_ALIGN_FROM = 256
HEAD_FROM = 128
"""Columns of a row from which a few of them may be stored by themselves."""
_ROWS = 4  # rows taken together, so that five vectors of coefficients are loaded once for four of data


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
    c_size = 4 if compute == "float32" else 8
    alignment = min(64, LANES * y_size)

    @inner
    def run(px: int, py: int, count: int, p: Any, h: Any, m: Any, scale: float, shift: float, stream: bool) -> None:
        a = lanes(scale)
        b = lanes(shift)
        if count >= _ALIGN_FROM:
            # NumPy's arrays lie 16 bytes off a cache line: a head makes all stores, and mostly the loads, whole lines
            head = (-py & (alignment - 1)) // y_size
            if head > 0:
                store_part(py, act(fma(fma(load_part(px, head), p, h) + m, a, b)), head)
                px += head * x_size
                py += head * y_size
                count -= head
            if stream and py & (alignment - 1) == 0:
                while count >= LANES:
                    store_stream(py, act(fma(fma(load(px), p, h) + m, a, b)))
                    px += LANES * x_size
                    py += LANES * y_size
                    count -= LANES
        while count >= 2 * LANES:
            y0 = act(fma(fma(load(px), p, h) + m, a, b))
            y1 = act(fma(fma(load(px + LANES * x_size), p, h) + m, a, b))
            store(py, y0)
            store(py + LANES * y_size, y1)
            px += 2 * LANES * x_size
            py += 2 * LANES * y_size
            count -= 2 * LANES
        if count >= LANES:
            store(py, act(fma(fma(load(px), p, h) + m, a, b)))
            px += LANES * x_size
            py += LANES * y_size
            count -= LANES
        if count > 0:
            store_part(py, act(fma(fma(load_part(px, count), p, h) + m, a, b)), count)

    @inner
    def some_rows(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        head: int,
    ) -> None:  # fmt: skip
        left = cols
        width = head
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            b = load_c(coefficients + 4 * each)
            if width == 0:
                width = min(left, LANES)
            if width < LANES:
                for r in range(rows):
                    v = load_part(px + r * x_step, width)
                    store_part(py + r * y_step, act(fma(fma(v, p, h) + m, a, b)), width)
            elif stream:
                for r in range(rows):
                    store_stream(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            else:
                for r in range(rows):
                    store(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            coefficients += width * c_size
            px += width * x_size
            py += width * y_size
            left -= width
            width = 0

    @inner
    def folded_row(px: int, py: int, cols: int, a: int, b: int, stream: bool, head: int) -> None:
        # one row of A*x + B; each coefficient is loaded for each element, and no two rows get in each other's way
        if head > 0:
            store_part(py, act(fma(load_part(px, head), load_c(a), load_c(b))), head)
            px += head * x_size
            py += head * y_size
            a += head * c_size
            b += head * c_size
            cols -= head
        whole = cols // LANES
        if stream:
            for j in range(whole):
                value = act(
                    fma(load(px + j * LANES * x_size), load_c(a + j * LANES * c_size), load_c(b + j * LANES * c_size))
                )
                store_stream(py + j * LANES * y_size, value)
        else:
            for j in range(whole):
                value = act(
                    fma(load(px + j * LANES * x_size), load_c(a + j * LANES * c_size), load_c(b + j * LANES * c_size))
                )
                store(py + j * LANES * y_size, value)
        left = cols - whole * LANES
        if left > 0:
            j = whole * LANES
            value = act(fma(load_part(px + j * x_size, left), load_c(a + j * c_size), load_c(b + j * c_size)))
            store_part(py + j * y_size, value, left)

    @inner
    def rows_kernel(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        folded: bool,
    ) -> None:  # fmt: skip
        # streaming needs whole lines: a head in each row makes all other stores such (0.7 of the time for 75 MB; within
        # the cache the heads would cost more than whole lines gain)
        head = 0
        if stream and cols >= HEAD_FROM and y_step & (alignment - 1) == 0:
            head = (-py & (alignment - 1)) // y_size
        streams = stream and ((py + head * y_size) | y_step) & (alignment - 1) == 0
        if folded:
            a = coefficients + 3 * each
            for r in range(rows):
                folded_row(px + r * x_step, py + r * y_step, cols, a, a + each, streams, head)
            return
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            some_rows(
                px + done * x_step, x_step, py + done * y_step, y_step, here, cols, coefficients, each, streams, head
            )
            done += here

    return run, rows_kernel
