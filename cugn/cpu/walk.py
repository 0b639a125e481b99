"""Over elements that lie one after another, each read once and written once: in what order, and past the cache or not.

NumPy's arrays lie 16 bytes off a cache line. A head makes all stores, and mostly the loads, whole lines; streaming
stores need that, and leave y out of the cache: 25 against 17 GB/s for arrays that would not stay there anyway.
"""

from __future__ import annotations

from typing import Any

from .compile import inner, within
from .convert import LINE, itemsize, line_elements, storer
from .simd import LANES

ALIGN_FROM = 256
"""Elements of a run from which it has a head."""
ONCE = 1 << 40
"""Coefficients that never begin again: there are none."""


@inner
def descends(read: int, written: int) -> bool:
    """Whether vectors are gone over from the last to the first.

    A load waits for a store before it that is not yet in the cache if the two seem to overlap in part, by the last 12
    bits of their addresses. Upwards they do where an array is written a little further on in its page than it is read:
    silu took up to 2.2 of the time.
    """
    return 0 < (written - read) & 4095 < 512


def walker(element: Any, x: str, v: str, y: str, compute: str) -> tuple[Any, Any]:
    """walk(px, pv, pm, py, count, coefficients, turn, lined, stream, folded, values): y of `count` elements.

    Each vector, or part of one, is element(px, pv, pm, left, coefficients, folded, values), of the addresses of its
    elements in x, in a second array and in a mask, and of its coefficients, which begin again after `turn` elements;
    they go on for a vector after that, for one that begins before. With `lined` there is a head.

    few(px, pv, pm, py, count, folded, values): the same of short runs, upwards, without coefficients: of 64 elements
    what stands around them in the other, and its call, took 1.25 of a forward's time.
    """
    store, store_part, store_stream = storer(y, compute)
    x_size, v_size, y_size, c_size = itemsize(x), itemsize(v), itemsize(y), itemsize(compute)
    line = line_elements(y)

    @inner
    def walk(
        px: int, pv: int, pm: int, py: int, count: int, coefficients: int, turn: int, lined: bool, stream: bool,
        folded: bool, values: Any,
    ) -> None:  # fmt: skip
        j = 0
        if lined:
            head = (-py & (LINE - 1)) // y_size
            while head > 0:
                here = min(head, LANES)
                at = coefficients + j * c_size
                store_part(py, element(px, pv, pm, here, at, folded, values), here)
                px += here * x_size
                pv += here * v_size
                pm += here
                py += here * y_size
                count -= here
                head -= here
                j = (j + here) % turn
        streams = stream and lined and py & (LINE - 1) == 0
        whole = count // line * (line // LANES) if streams else count // LANES
        done = whole * LANES
        while done < count:
            here = min(count - done, LANES)
            at = coefficients + (j + done) % turn * c_size
            value = element(px + done * x_size, pv + done * v_size, pm + done, here, at, folded, values)
            store_part(py + done * y_size, value, here)
            done += here
        step = LANES
        if whole > 1 and (descends(px, py) or descends(pv, py)):
            done = (whole - 1) * LANES
            px += done * x_size
            pv += done * v_size
            pm += done
            py += done * y_size
            j = (j + done) % turn
            step = -LANES
        while whole > 0:
            # as far as the coefficients go: a vector's may begin before their end
            steps = min(whole, (turn - j + LANES - 1) // LANES if step > 0 else j // LANES + 1)
            at = coefficients + j * c_size
            for _ in range(steps):
                value = element(px, pv, pm, LANES, at, folded, values)
                if streams:
                    store_stream(py, value)
                else:
                    store(py, value)
                px += step * x_size
                pv += step * v_size
                pm += step
                py += step * y_size
                at += step * c_size
            whole -= steps
            j += steps * step
            if j >= turn:
                j -= turn
            elif j < 0:
                j += turn

    @within
    def few(px: int, pv: int, pm: int, py: int, count: int, folded: bool, values: Any) -> None:
        while count >= 2 * LANES:
            qx, qv = px + LANES * x_size, pv + LANES * v_size
            first = element(px, pv, pm, LANES, 0, folded, values)
            second = element(qx, qv, pm + LANES, LANES, 0, folded, values)
            store(py, first)
            store(py + LANES * y_size, second)
            px = qx + LANES * x_size
            pv = qv + LANES * v_size
            pm += 2 * LANES
            py += 2 * LANES * y_size
            count -= 2 * LANES
        if count >= LANES:
            store(py, element(px, pv, pm, LANES, 0, folded, values))
            px += LANES * x_size
            pv += LANES * v_size
            pm += LANES
            py += LANES * y_size
            count -= LANES
        if count > 0:
            store_part(py, element(px, pv, pm, count, 0, folded, values), count)

    return walk, few
