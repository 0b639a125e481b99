"""Channels-last, from main memory and from cache: time with rows touched in the order of memory over that without.

    python asv_bench/row_order.py            # three minutes; prints the table of docs/design/cpu.md
    python asv_bench/row_order.py --quick    # one small shape, for a test

Both ways of a row run in turn in one process. From memory: each call has other arrays, more than any cache holds. From
cache: each call has the same, if they fit in.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import cugn
from cugn.cpu import geometry

SHAPES = [(8, 32, 32, 64), (2, 56, 56, 128), (2, 56, 56, 256), (2, 64, 64, 320), (8, 112, 112, 64), (32, 56, 56, 128)]
DTYPES = ("float16", "float32", "float64")
GROUPS = 32
MEMORY = 256 << 20
"""Bytes of all arrays that calls from main memory go through."""


def calls(shape: tuple[int, ...], dtype: str, copies: int) -> dict[tuple[str, bool], Callable[[int], Any]]:
    """Forward and backward of the k-th copy of the arrays, touched and not: plans that differ in eps alone."""
    rng = np.random.default_rng(0)
    x, dy, out = ([a.copy() for _ in range(copies)] for a in rng.standard_normal((3, *shape)).astype(dtype))
    weight, bias = rng.standard_normal((2, shape[-1])).astype(dtype)
    made: dict[tuple[str, bool], Callable[[int], Any]] = {}
    usual = geometry.TOUCHED_FROM
    for touched in (False, True):
        keywords: dict[str, Any] = {"channel_axis": -1, "eps": 1.001e-5 if touched else 1e-5}
        known = [cugn.group_norm_forward(a, GROUPS, **keywords)[1:] for a in x]

        def forward(k: int, keywords: dict[str, Any] = keywords) -> None:
            cugn.group_norm(x[k % copies], GROUPS, weight, bias, out=out[k % copies], **keywords)

        def backward(k: int, keywords: dict[str, Any] = keywords, known: Any = known) -> None:
            mean, rstd = known[k % copies]
            arrays = (dy[k % copies], x[k % copies], GROUPS, weight, bias)
            cugn.group_norm_backward(*arrays, mean=mean, rstd=rstd, out=out[k % copies], **keywords)

        geometry.TOUCHED_FROM = 0 if touched else 1 << 60
        try:
            for name, function in (("forward", forward), ("backward", backward)):
                function(0)  # which makes its plan
                made[name, touched] = function
        finally:
            geometry.TOUCHED_FROM = usual
    return made


def ratio(functions: list[Callable[[int], Any]], rounds: int) -> float:
    """Median time of the second over that of the first; each goes on where the other stopped."""
    times: list[list[float]] = [[], []]
    k = 0
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            for _ in range(2):
                start = time.perf_counter()
                functions[which](k)
                if number:
                    times[which].append(time.perf_counter() - start)
                k += 1
    return median(times[1]) / median(times[0])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    print("| shape | dtype | x, MB | from memory: forward | backward | from cache: forward | backward |")
    print("|---|---|---|---|---|---|---|")
    for shape in [(1, 4, 4, 64)] if options.quick else SHAPES:
        for dtype in DTYPES[1:2] if options.quick else DTYPES:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            copies = 2 if options.quick else max(2, math.ceil(MEMORY / (3 * size)))
            cells = []
            for count in (copies, 1):
                of = calls(shape, dtype, count)
                pairs = ([of[name, touched] for touched in (False, True)] for name in ("forward", "backward"))
                cells += [f"{ratio(pair, options.rounds):.2f}" for pair in pairs]
            print(f"| {' × '.join(map(str, shape))} | {dtype} | {size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
