"""y = act(x_hat * weight + bias) over a run of one channel, or over rows with coefficients element by element.

x is read once and y written once. With the mean in two parts and POWER next to rstd: t = fma(x, POWER, MINUS_HIGH)
+ MINUS_LOW, y = fma(t, a, b): four roundings, <= 2e of the result's scale. Streaming stores leave y out of the
cache: 25 against 17 GB/s for arrays that would not stay there anyway.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .activate import activation_kernels
from .chunks import turn_of
from .compile import inner
from .convert import LINE, line_elements, loader, storer, to_compute
from .phases import GATES
from .simd import LANES, fma

_ALIGN_FROM = 256
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
def descends(read: int, written: int) -> bool:
    """Whether vectors are gone over from the last to the first.

    A load waits for a store before it that is not yet in the cache if the two seem to overlap in part, by the last 12
    bits of their addresses. Upwards they do where an array is written a little further on in its page than it is read:
    silu took up to 2.2 of the time.
    """
    return 0 < (written - read) & 4095 < 512


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
        whole = count // LANES
        left = count - whole * LANES
        if left > 0:
            at = whole * LANES
            store_part(py + at * y_size, element(load_part(px + at * x_size, left), p, h, m, a, b, folded), left)
        x_step, y_step = LANES * x_size, LANES * y_size
        if whole > 1 and descends(px, py):
            px += (whole - 1) * x_step
            py += (whole - 1) * y_step
            x_step, y_step = -x_step, -y_step
        if stream and count >= line and py & (LINE - 1) == 0:
            for _ in range(whole):
                store_stream(py, element(load(px), p, h, m, a, b, folded))
                px += x_step
                py += y_step
            return
        while whole >= 2:
            y0 = element(load(px), p, h, m, a, b, folded)
            y1 = element(load(px + x_step), p, h, m, a, b, folded)
            store(py, y0)
            store(py + y_step, y1)
            px += 2 * x_step
            py += 2 * y_step
            whole -= 2
        if whole > 0:
            store(py, element(load(px), p, h, m, a, b, folded))

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
    def element_of_row(px: int, left: int, coefficients: int, each: int, folded: bool) -> Any:
        # of the first `left` lanes where that is less than a vector
        if left >= LANES:
            v = load(px)
        else:
            v = load_part(px, left)
        if not folded:
            v = fma(v, load_c(coefficients), load_c(coefficients + each)) + load_c(coefficients + 2 * each)
        return act(fma(v, load_c(coefficients + 3 * each), load_c(coefficients + 4 * each)))

    @inner
    def run_of_rows(
        px: int, py: int, count: int, turn: int, coefficients: int, each: int, stream: bool, folded: bool
    ) -> None:
        # elements that lie one after another, each with coefficients of its own, which begin again after `turn` of them
        j = 0
        streams = stream and count >= HEAD_FROM
        if streams:
            head = (-py & (LINE - 1)) // y_size
            while head > 0:
                here = min(head, LANES)
                store_part(py, element_of_row(px, here, coefficients + j * c_size, each, folded), here)
                px += here * x_size
                py += here * y_size
                count -= here
                head -= here
                j = (j + here) % turn
            streams = py & (LINE - 1) == 0
        whole = count // LANES
        left = count - whole * LANES
        if left > 0:
            at, k = whole * LANES, coefficients + (j + whole * LANES) % turn * c_size
            store_part(py + at * y_size, element_of_row(px + at * x_size, left, k, each, folded), left)
        step = LANES
        if whole > 1 and descends(px, py):
            px += (whole - 1) * LANES * x_size
            py += (whole - 1) * LANES * y_size
            j = (j + (whole - 1) * LANES) % turn
            step = -LANES
        while whole > 0:
            # a vector goes on into the next row, by the coefficients that follow the last ones
            steps = min(whole, (turn - j + LANES - 1) // LANES if step > 0 else j // LANES + 1)
            k = coefficients + j * c_size
            for _ in range(steps):
                value = element_of_row(px, LANES, k, each, folded)
                if streams:
                    store_stream(py, value)
                else:
                    store(py, value)
                px += step * x_size
                py += step * y_size
                k += step * c_size
            whole -= steps
            j += steps * step
            if j >= turn:
                j -= turn
            elif j < 0:
                j += turn

    @inner
    def rows_kernel(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool,
        folded: bool, touched: int,
    ) -> None:  # fmt: skip
        lined = x_step == cols * x_size and y_step == cols * y_size
        if folded or (lined and runs_on(stream, touched, cols)):
            length = rows * cols if lined else cols
            for r in range(1 if lined else rows):
                qx, qy = px + r * x_step, py + r * y_step
                if folded:
                    run_of_rows(qx, qy, length, turn_of(cols), coefficients, each, stream, True)
                else:
                    run_of_rows(qx, qy, length, turn_of(cols), coefficients, each, stream, False)
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
