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
from .convert import COMPUTE, loader, storer
from .simd import F32, LANES, fma, narrow_scalar, splat

COEFFICIENTS = 5
"""Arrays of coefficients: power, minus_high, minus_low, scale, shift."""
_ROWS = 4  # rows taken together, so that five vectors of coefficients are loaded once for four of data


@cache
def to_compute(compute: str) -> Any:
    """splat of a float64 in lanes of the compute dtype."""
    if COMPUTE[compute] is F32:

        @inner
        def lanes(value: float) -> Any:
            return splat(narrow_scalar(value))

        return lanes
    return splat


@cache
def apply_kernels(x: str, y: str, compute: str, activation: str | None, x_size: int, y_size: int) -> tuple[Any, Any]:
    """run(px, py, count, five scalars, stream) and rows(px, x_step, py, y_step, rows, cols, coefficients, each,
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
    def run(
        px: int, py: int, count: int, power: float, high: float, low: float, scale: float, shift: float, stream: bool
    ) -> None:
        p = lanes(power)
        h = lanes(high)
        m = lanes(low)
        a = lanes(scale)
        b = lanes(shift)
        if stream:
            head = (-py & (alignment - 1)) // y_size
            if head * y_size == -py & (alignment - 1) and count >= head + LANES:
                if head > 0:
                    store_part(py, act(fma(fma(load_part(px, head), p, h) + m, a, b)), head)
                    px += head * x_size
                    py += head * y_size
                    count -= head
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
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool
    ) -> None:
        left = cols
        while left > 0:
            p = load_c(coefficients)
            h = load_c(coefficients + each)
            m = load_c(coefficients + 2 * each)
            a = load_c(coefficients + 3 * each)
            b = load_c(coefficients + 4 * each)
            if left < LANES:
                for r in range(rows):
                    v = load_part(px + r * x_step, left)
                    store_part(py + r * y_step, act(fma(fma(v, p, h) + m, a, b)), left)
            elif stream:
                for r in range(rows):
                    store_stream(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            else:
                for r in range(rows):
                    store(py + r * y_step, act(fma(fma(load(px + r * x_step), p, h) + m, a, b)))
            coefficients += LANES * c_size
            px += LANES * x_size
            py += LANES * y_size
            left -= LANES

    @inner
    def rows_kernel(
        px: int, x_step: int, py: int, y_step: int, rows: int, cols: int, coefficients: int, each: int, stream: bool
    ) -> None:
        # streaming needs every row aligned
        streams = stream and (py | y_step) & (alignment - 1) == 0
        done = 0
        while done < rows:
            here = min(_ROWS, rows - done)
            some_rows(px + done * x_step, x_step, py + done * y_step, y_step, here, cols, coefficients, each, streams)
            done += here

    return run, rows_kernel
