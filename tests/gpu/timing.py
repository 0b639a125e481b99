"""Times of calls on a GPU, by events, beside a device-to-device copy and torch; the cases of the tables in the docs.

``python -m tests.gpu.timing [results.json]`` prints the table and writes it; ``--features`` adds labels, masks and
activations beside the plain call.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import cugn


class Case(NamedTuple):
    """A shape (N, C, S), or (N, S, C) where the channels are last, and a number of groups."""

    name: str
    shape: tuple[int, ...]
    groups: int
    last: bool = False


CASES = [
    Case("table", (64, 256), 32),
    Case("table, layer norm", (16_384, 1024), 1),
    Case("cells x genes", (100_000, 128), 8),
    Case("ResNet 7x7", (32, 2048, 49), 32),
    Case("ResNet 56x56", (32, 256, 3136), 32),
    Case("ResNet 112x112", (32, 64, 12_544), 32),
    Case("ResNet 7x7", (32, 49, 2048), 32, True),
    Case("ResNet 56x56", (32, 3136, 256), 32, True),
    Case("U-Net 16x16", (8, 1280, 256), 32),
    Case("U-Net 64x64", (8, 320, 4096), 32),
    Case("U-Net 16x16", (8, 256, 1280), 32, True),
    Case("U-Net 64x64", (8, 4096, 320), 32, True),
    Case("VAE 512x512", (1, 128, 512 * 512), 32),
    Case("VAE 512x512", (1, 512 * 512, 128), 32, True),
    Case("volume 128^3", (1, 32, 128**3), 8),
    Case("instance norm 256x256", (8, 64, 65_536), 64),
    Case("61 channels of 47x47, layer norm", (32, 61, 2209), 1),
]
DTYPES = ("float32", "float16")
FEATURES = ("plain", "labels", "mask", "mask of positions", "relu", "silu")


def flush() -> Callable[[], Any]:
    """What empties the second-level cache, and keeps the device busy until a call is queued: a read of 1 GiB."""
    import cupy

    large = cupy.zeros(1 << 28, cupy.float32)
    return large.max


def milliseconds(call: Callable[[], Any], before: Callable[[], Any], repeats: int = 20) -> float:
    """Median by events: of the device's work, however long the host takes, with cold caches."""
    import cupy

    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        before()
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return sorted(times)[len(times) // 2]


def measure(case: Case, dtype: str, before: Callable[[], Any]) -> dict[str, float | None]:
    """Milliseconds of the copy of x, and of the forward and the backward (statistics given) of cugn and torch."""
    import cupy

    axis = -1 if case.last else 1
    rng = cupy.random.default_rng(0)
    x, dy = (rng.standard_normal(case.shape, dtype=cupy.float32).astype(dtype) for _ in range(2))
    out, w, b = cupy.empty_like(x), cupy.ones(case.shape[axis], dtype), cupy.zeros(case.shape[axis], dtype)
    options: dict[str, Any] = {"channel_axis": axis, "out": out}
    _, mean, rstd = cugn.group_norm_forward(x, case.groups, w, b, channel_axis=axis)
    found: dict[str, float | None] = {
        "bytes": x.nbytes,
        "copy": milliseconds(
            lambda: out.data.copy_from_device_async(x.data, x.nbytes, cupy.cuda.get_current_stream()), before
        ),
        "forward": milliseconds(lambda: cugn.group_norm(x, case.groups, w, b, **options), before),
        "backward": milliseconds(
            lambda: cugn.group_norm_backward(dy, x, case.groups, w, b, mean=mean, rstd=rstd, **options), before
        ),
    }
    return found | torch_times(case, x, dy, w, b, before)


def measure_feature(case: Case, feature: str, before: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the forward and the backward of float32 with one of `FEATURES`."""
    import cupy

    axis = -1 if case.last else 1
    rng = cupy.random.default_rng(0)
    x, dy = (rng.standard_normal(case.shape, dtype=cupy.float32) for _ in range(2))
    C = case.shape[axis]
    out, w, b = cupy.empty_like(x), cupy.ones(C, x.dtype), cupy.zeros(C, x.dtype)
    groups: Any = np.arange(C) * 7 % case.groups if feature == "labels" else case.groups
    options: dict[str, Any] = {"channel_axis": axis}
    if feature.startswith("mask"):
        positions = tuple(1 if k == axis % x.ndim else n for k, n in enumerate(case.shape))
        options["where"] = rng.random(case.shape if feature == "mask" else positions) < 0.7
    elif feature in ("relu", "silu"):
        options["activation"] = feature
    _, mean, rstd = cugn.group_norm_forward(x, groups, w, b, **options)
    given = {"mean": mean, "rstd": rstd, "out": out}
    return {
        "forward": milliseconds(lambda: cugn.group_norm(x, groups, w, b, out=out, **options), before),
        "backward": milliseconds(lambda: cugn.group_norm_backward(dy, x, groups, w, b, **given, **options), before),
    }


def torch_times(case: Case, x: Any, dy: Any, w: Any, b: Any, before: Callable[[], Any]) -> dict[str, float | None]:
    """The same of torch's group_norm and autograd, on the same memory and stream; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return {"torch forward": None, "torch backward": None}
    if not torch.cuda.is_available():
        return {"torch forward": None, "torch backward": None}
    import cupy

    if torch.cuda.current_stream().cuda_stream != cupy.cuda.get_current_stream().ptr:
        raise RuntimeError("torch and CuPy are on different streams: events of one do not time the other")
    t, g, tw, tb = (torch.from_dlpack(a) for a in (x, dy, w, b))
    if case.last:
        t, g = t.movedim(-1, 1), g.movedim(-1, 1)
    group_norm = torch.nn.functional.group_norm
    forward = milliseconds(lambda: group_norm(t, case.groups, tw, tb), before)
    leaves = [a.detach().requires_grad_() for a in (t, tw, tb)]
    y = group_norm(leaves[0], case.groups, *leaves[1:])
    backward = milliseconds(lambda: torch.autograd.grad(y, leaves, g, retain_graph=True), before)
    return {"torch forward": forward, "torch backward": backward}


def table(results: dict[str, Any]) -> str:
    """Markdown: microseconds, and how many times as fast as torch."""
    lines = [
        "| case | dtype | MB | copy | forward | torch / cugn | backward | torch / cugn |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        t = row["milliseconds"]
        cells = [f"{row['case']} {tuple(row['shape'])} G={row['groups']}", row["dtype"], f"{t['bytes'] / 1e6:.1f}"]
        cells.append(f"{1e3 * t['copy']:.0f}")
        for name in ("forward", "backward"):
            peer = t[f"torch {name}"]
            cells += [f"{1e3 * t[name]:.0f}", "" if peer is None else f"{peer / t[name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def features_table(results: dict[str, Any]) -> str:
    """Markdown: forward and backward with each feature in times of the plain call."""
    names = [name for name in FEATURES if name != "plain"]
    lines = [f"| case | {' | '.join(names)} |", f"|---{'|--:' * len(names)}|"]
    for row in results["features"]:
        t, plain = row["milliseconds"], row["milliseconds"]["plain"]
        cells = [" / ".join(f"{t[name][which] / plain[which]:.2f}" for which in plain) for name in names]
        lines.append(f"| {row['case']} {tuple(row['shape'])} G={row['groups']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(features: bool) -> dict[str, Any]:
    """All cases; the device's name beside them."""
    import cupy

    before = flush()
    versions = {"cupy": cupy.__version__, "cugn": cugn.__version__}
    try:
        import torch

        versions["torch"] = torch.__version__
    except ImportError:
        pass
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    results: dict[str, Any] = {"device": device, "versions": versions, "rows": []}
    for case in CASES:
        about = {
            "case": case.name + (", channels last" if case.last else ""),
            "shape": case.shape,
            "groups": case.groups,
        }
        for dtype in DTYPES:
            results["rows"].append({**about, "dtype": dtype, "milliseconds": measure(case, dtype, before)})
        if features:
            times = {feature: measure_feature(case, feature, before) for feature in FEATURES}
            results.setdefault("features", []).append({**about, "milliseconds": times})
    return results


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.timing", description="Times of calls on a GPU.")
    parser.add_argument("results", nargs="?", help="JSON file to write")
    parser.add_argument(
        "--features", action="store_true", help="labels, masks and activations beside the plain call, too"
    )
    chosen = parser.parse_args()
    results = run(chosen.features)
    if chosen.results:
        with open(chosen.results, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    print(f"{results['device']}, {results['versions']}; microseconds")
    print(table(results))
    if chosen.features:
        print(features_table(results))


if __name__ == "__main__":
    main()
