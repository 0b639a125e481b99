"""What labels, masks and activations cost: time of the call with them over that of the plain call, on the same arrays.

    python asv_bench/features.py            # a minute; prints the table of docs/performance.md
    python asv_bench/features.py --quick    # one small shape, for a test

All calls of a row run in turn, round after round, into given outputs; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import cugn

SHAPES = {
    "U-Net 64x64": ((2, 320, 64, 64), 32),
    "ResNet 56x56": ((8, 256, 56, 56), 32),
    "ResNet 7x7": ((64, 2048, 7, 7), 32),
    "volume 96^3": ((1, 32, 96, 96, 96), 8),
    "table": ((20_000, 256), 32),
}
FEATURES = ("labels", "mask", "mask of channels", "relu", "silu", "gelu")
BOUNDS = {"labels": 1.5, "mask": 1.5, "mask of channels": 1.5, "relu": 1.25, "silu": 1.25}


def calls(shape: tuple[int, ...], groups: int, last: bool) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """A forward and a backward: plain, and with each feature. The mask leaves 80 % of the elements."""
    rng = np.random.default_rng(0)
    channels = shape[1]

    def laid_out(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(a, 1, -1)) if last else a

    x, dy = (laid_out(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
    weight, bias = rng.standard_normal((2, channels), dtype=np.float32)
    axis = -1 if last else 1
    positions = rng.random((shape[0], 1, *shape[2:])) < 0.8
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (groups, {}),
        "labels": (np.arange(channels) // (channels // groups) * 5 % groups, {}),
        "mask": (groups, {"where": laid_out(positions)}),
        "mask of channels": (groups, {"where": laid_out(rng.random(shape) < 0.8)}),
        **{name: (groups, {"activation": name}) for name in ("relu", "silu", "gelu") if name in FEATURES},
    }
    if len(shape) == 2:  # one position: a mask of positions would leave out whole samples
        del options["mask"]
    out = np.empty_like(x)

    def pair(groups: Any, keywords: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        keywords = {**keywords, "channel_axis": axis}
        _, mean, rstd = cugn.group_norm_forward(x, groups, weight, bias, **keywords)
        known = {**keywords, "mean": mean, "rstd": rstd}
        return (
            lambda: cugn.group_norm(x, groups, weight, bias, out=out, **keywords),
            lambda: cugn.group_norm_backward(dy, x, groups, weight, bias, out=out, **known),
        )

    return {name: pair(*option) for name, option in options.items()}


def ratios(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each call over that of the first one."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if k:  # the first round compiles and warms up
                times[name].append(time.perf_counter() - start)
    first = median(next(iter(times.values())))
    return {name: median(values) / first for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args(arguments)
    shapes = {"small": ((2, 8, 9, 9), 4)} if options.quick else SHAPES
    print(f"float32, {cugn.get_num_threads()} threads; time over that of the plain call\n")
    print(f"| shape | layout | pass | {' | '.join(FEATURES)} |\n|---|---|---|{'---|' * len(FEATURES)}")
    above = []
    for name, (shape, groups) in shapes.items():
        for last in (False, True)[: 1 + (len(shape) > 2)]:
            of = calls(shape, groups, last)
            for k, direction in enumerate(("forward", "backward")):
                ratio = ratios({feature: pair[k] for feature, pair in of.items()}, options.rounds)
                cells = [f"{ratio[feature]:.2f}" if feature in ratio else "-" for feature in FEATURES]
                layout = "channels last" if last else "channels first"
                print(f"| {name} | {layout} | {direction} | {' | '.join(cells)} |", flush=True)
                above += [
                    f"{feature} of {name}, {layout}, {direction}: {ratio[feature]:.2f}"
                    for feature, bound in BOUNDS.items()
                    if ratio.get(feature, 0) > bound
                ]
    print("\nAbove 1.5 (labels, masks) or 1.25 (relu, silu):", "; ".join(above) or "none")


if __name__ == "__main__":
    main()
