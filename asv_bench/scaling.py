"""Dask arrays against the NumPy call: cost by chunks, size, threads and processes; graphs and traffic for a cluster.

    python asv_bench/scaling.py            # about 5 minutes and 6 GB; writes docs/figures/scaling.png
    python asv_bench/scaling.py --quick    # small arrays, no figure

Both sides compute in turn, round after round, on chunks that lie in memory already; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.callbacks import Callback
from distributed import Client, LocalCluster, wait

import cugn
from cugn.dask import FAN_IN

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "scaling.png"
GROUPS = 8
SHAPE = (4, 32, 128, 128, 128)  # 1.07 GB of float32
CHUNKS = (1, 8, 64, 64, 64)  # 128 chunks of 8 MB
CHUNKINGS = [
    (1, 32, 128, 128, 128),  # samples: no group is cut
    (1, 32, 64, 128, 128),
    (1, 16, 64, 128, 64),
    CHUNKS,
    (1, 8, 32, 32, 64),
    (1, 4, 32, 32, 32),
    (1, 2, 32, 16, 32),
]


class Seconds(NamedTuple):
    """Of a call: all of it, and from the moment on when Dask began with its first task."""

    whole: float
    work: float


class FirstTask(Callback):
    """When Dask's local scheduler began with the first task of a computation."""

    at: float | None = None

    def _pretask(self, *_: Any) -> None:
        if self.at is None:
            self.at = time.perf_counter()


def numpy_calls(x: Any, dy: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The two calls on whole arrays."""
    _, mean, rstd = cugn.group_norm_forward(x, GROUPS)
    return (
        lambda: cugn.group_norm_forward(x, GROUPS),
        lambda: cugn.group_norm_backward(dy, x, GROUPS, mean=mean, rstd=rstd),
    )


def dask_calls(x: Any, dy: Any, chunks: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same on chunks, each in memory of its own; the results stay in chunks."""
    lazy_x, lazy_dy = (da.from_array(a, chunks).map_blocks(np.array).persist() for a in (x, dy))
    mean, rstd = dask.compute(*cugn.group_norm_forward(lazy_x, GROUPS)[1:])
    return (
        lambda: dask.persist(*cugn.group_norm_forward(lazy_x, GROUPS)),
        lambda: dask.persist(*cugn.group_norm_backward(lazy_dy, lazy_x, GROUPS, mean=mean, rstd=rstd)),
    )


def alternating(calls: list[Callable[[], Any]], rounds: int) -> list[Seconds]:
    """Median times of each call, called in turn."""
    times: list[list[Seconds]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, mine in zip(calls, times, strict=True):
            with FirstTask() as first:
                start = time.perf_counter()
                result = call()
                end = time.perf_counter()
            del result  # before the next one asks for memory
            mine.append(Seconds(end - start, end - (first.at or start)))
    # the first round compiles and warms up
    return [Seconds(*map(median, zip(*mine[1:], strict=True))) for mine in times]


def arrays(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """x with an offset, and dy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    x += 1e4
    return x, rng.standard_normal(shape, dtype=np.float32)


def against(x: Any, dy: Any, chunks: Any, rounds: int) -> list[tuple[Seconds, Seconds]]:
    """Of the forward and the backward: the NumPy call's seconds and Dask's."""
    plain, lazy = numpy_calls(x, dy), dask_calls(x, dy, chunks)
    seconds = alternating([plain[0], lazy[0], plain[1], lazy[1]], rounds)
    return [(seconds[0], seconds[1]), (seconds[2], seconds[3])]


def graph(shape: tuple[int, ...], chunks: Any) -> tuple[int, int, float]:
    """Number of chunks, tasks a forward and a backward together have, seconds to build them."""
    x = da.zeros(shape, chunks=chunks, dtype=np.float32)
    start = time.perf_counter()
    y, mean, rstd = cugn.group_norm_forward(x, GROUPS)
    grads = cugn.group_norm_backward(x, x, GROUPS, mean=mean, rstd=rstd)
    seconds = time.perf_counter() - start
    tasks = len(dict(dask.optimize([y, *grads])[0][0].__dask_graph__()))
    return x.npartitions, tasks - x.npartitions, seconds


def exchanged(shape: tuple[int, ...], chunks: Any) -> tuple[int, int, int]:
    """Bytes of all partial results of a forward and a backward, levels of the tree, bytes of x."""
    counts = [math.ceil(n / c) for n, c in zip(shape, chunks, strict=True)]
    depth, parts = 0, math.prod(counts[1:])  # of a sample
    while parts > 1:
        depth, parts = depth + 1, math.ceil(parts / FAN_IN)
    groups_of_chunk = max(1, chunks[1] * GROUPS // shape[1])
    per_chunk = 8 * (5 + 2) * chunks[0] * groups_of_chunk + 8 * 2 * chunks[1]
    return math.prod(counts) * per_chunk, depth, 4 * math.prod(shape)


def on_workers(shape: tuple[int, ...], chunks: Any, rounds: int) -> dict[str, float]:
    """Seconds of a forward and a backward by threads of one process and by processes of one thread."""
    seconds = {}
    for processes in (False, True):
        for count in (1, 2):
            options = {"n_workers": count if processes else 1, "threads_per_worker": 1 if processes else count}
            with (
                LocalCluster(processes=processes, dashboard_address=None, **options) as cluster,
                Client(cluster),
                dask.config.set({"array.chunk-size": "8MiB"}),
            ):
                x = da.random.default_rng(0).normal(1e4, 1, shape, chunks=chunks).astype(np.float32).persist()
                wait(x)

                eps = itertools.count(1)

                def call(x: Any = x, eps: Iterator[int] = eps) -> None:
                    # another graph each time: the scheduler would find results of the last one that are still there
                    y, mean, rstd = cugn.group_norm_forward(x, GROUPS, eps=1e-5 * next(eps))
                    grads = cugn.group_norm_backward(x, x, GROUPS, mean=mean, rstd=rstd)
                    wait(dask.persist(y, *grads))

                plural = ("es" if processes else "s") if count > 1 else ""
                name = f"{count} {'process' if processes else 'thread'}{plural}"
                seconds[name] = alternating([call], rounds)[0].whole
    return seconds


def main() -> None:
    """Measure, print tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small arrays, no figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["chunks"], help="only the chunks of the large array")
    options = parser.parse_args()
    shape = (2, 32, 32, 64, 64) if options.quick else SHAPE
    dask.config.set(scheduler="threads", num_workers=min(2, os.cpu_count() or 1))
    print(f"{os.cpu_count()} processors, x {shape} float32, {4 * math.prod(shape) / 1e6:.0f} MB, G = {GROUPS}\n")

    x, dy = arrays(shape)
    by_chunks = []
    print(
        "| chunks | MB each | number | forward / NumPy | from the first task | backward / NumPy | from the first task |"
    )
    print("|---|---|---|---|---|---|---|")
    for chunks in CHUNKINGS[: 4 if options.quick else None]:
        chunks = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
        number = math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True))
        megabytes = 4e-6 * math.prod(chunks)
        passes = against(x, dy, chunks, options.rounds)
        by_chunks.append((megabytes, *(lazy.whole / plain.whole for plain, lazy in passes)))
        cells = [f"{value / plain.whole:.2f}" for plain, lazy in passes for value in lazy]
        print(f"| {chunks} | {megabytes:.2f} | {number} | {' | '.join(cells)} |", flush=True)
    if options.only:
        return

    by_size = []
    print("\n| MB of x | NumPy forward, backward | Dask forward, backward |\n|---|---|---|")
    for n in (1, 2) if options.quick else (1, 2, 4):
        for z in (shape[2] // 2, shape[2]) if n == 1 else (shape[2],):
            part = tuple(np.ascontiguousarray(a[:n, :, :z]) for a in (x, dy))
            passes = against(*part, CHUNKS, options.rounds)
            by_size.append((part[0].nbytes / 1e6, *(side.whole for both in zip(*passes, strict=True) for side in both)))
            times = [f"{seconds:.2f} s" for seconds in by_size[-1][1:]]
            print(f"| {by_size[-1][0]:.0f} | {times[0]}, {times[1]} | {times[2]}, {times[3]} |", flush=True)

    workers = on_workers((shape[0] // 2, *shape[1:]), CHUNKS, options.rounds)
    print("\n| workers | forward and backward |\n|---|---|")
    for name, seconds in workers.items():
        print(f"| {name} | {seconds:.2f} s |")

    graphs = []
    print("\n| chunks | tasks | tasks a chunk | seconds to build | levels | bytes exchanged | of x |")
    print("|---|---|---|---|---|---|---|")
    for edge in (64, 128, 256, 512, 1024):
        big = (4, 32, edge, 128, 128)
        number, tasks, seconds = graph(big, CHUNKS)
        moved, depth, nbytes = exchanged(big, CHUNKS)
        graphs.append((number, tasks, seconds))
        print(f"| {number} | {tasks} | {tasks / number:.1f} | {seconds:.2f} | {depth} | {moved / 1e3:.0f} kB | "
              f"{moved / nbytes:.1e} |")  # fmt: skip
    if not options.quick:
        draw(by_chunks, by_size, workers, graphs)


def draw(by_chunks: Any, by_size: Any, workers: dict[str, float], graphs: Any) -> None:
    """Four panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    forward, backward, grey = "#0072B2", "#D55E00", "#777777"
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
        chunks, size, pool, graph_axes = axes.flat
        columns = list(zip(*by_chunks, strict=True))
        chunks.semilogx(columns[0], columns[1], "o-", color=forward, label="forward")
        chunks.semilogx(columns[0], columns[2], "s-", color=backward, label="backward")
        chunks.axhline(1, color=grey, lw=1)
        chunks.set(xlabel="MB a chunk", ylabel="time of Dask / time of NumPy", title="Chunks of 1 GB", ylim=0)
        chunks.legend()
        columns = list(zip(*by_size, strict=True))
        size.loglog(columns[0], columns[3], "o-", color=forward, label="forward, Dask")
        size.loglog(columns[0], columns[1], "o--", color=forward, label="forward, NumPy")
        size.loglog(columns[0], columns[4], "s-", color=backward, label="backward, Dask")
        size.loglog(columns[0], columns[2], "s--", color=backward, label="backward, NumPy")
        size.set(xlabel="MB of x, in chunks of 8 MB", ylabel="seconds", title="Size")
        size.legend()
        pool.bar(list(workers), list(workers.values()), color=[forward, forward, backward, backward])
        pool.set(ylabel="seconds, forward and backward", title="Threads and processes")
        columns = list(zip(*graphs, strict=True))
        graph_axes.loglog(columns[0], columns[1], "o-", color=forward)
        graph_axes.set(xlabel="chunks", ylabel="tasks, forward and backward", title="Graph")
        right = graph_axes.twinx()
        right.loglog(columns[0], columns[2], "s-", color=backward)
        right.set_ylabel("seconds to build", color=backward)
        right.spines["right"].set_visible(True)
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURE, dpi=130)


if __name__ == "__main__":
    main()
