"""Group norm of cugn, torch, jax and onnxruntime side by side in one run, and against the copy of the same array.

    python asv_bench/peers.py             # every case, about 30 minutes
    python asv_bench/peers.py --quick     # a few cases, two minutes

Each library runs in a process of its own, with two threads on the same two cores, and holds the data of the case. They
are asked in turn, round after round, so that a slow moment of the machine hits all alike; whoever is not asked is
stopped (where there are signals for it), since idle threads of onnxruntime, jax and OpenMP spin, and would take a core
from the next one. A turn begins with a call that is not timed, which brings the library's data into the caches and
wakes its threads. Each other call is timed by itself; the median of a turn, then of the rounds, counts; there are more
rounds while the times scatter. Before anything is timed the results of all libraries are compared: one that computes
something else is told and left out of that case, as are libraries that are not installed. Prints every case, then a
summary; saves JSON and a figure. Run it on an idle machine: code that waits for two threads suffers most from others.
Where that cannot be had: ``chrt -r 20 python asv_bench/peers.py`` (Linux, as root; others then wait).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from comparison import PEERS, TABLE, Problem, Unsupported, as_numpy
from tqdm import tqdm

THREADS = 2
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("channels_first", "channels_last")

SHAPES = {
    "tiny": ((1, 32, 8, 8), 8),
    "tiny batch": ((4, 16, 5, 5), 4),
    "odd 17x23": ((1, 24, 17, 23), 6),
    "table 64x256": ((64, 256), 32),
    "table 4096x512": ((4096, 512), 32),
    "table 1e5x128": ((100_000, 128), 8),
    "layer 8192x64": ((8192, 64), 1),
    "layer 4096x768": ((4096, 768), 1),
    "ResNet 56x56": ((2, 256, 56, 56), 32),
    "ResNet 14x14": ((8, 1024, 14, 14), 32),
    "ResNet 7x7": ((8, 2048, 7, 7), 32),
    "ResNet stem": ((32, 64, 112, 112), 32),
    "U-Net 64x64": ((2, 320, 64, 64), 32),
    "U-Net 16x16": ((2, 1280, 16, 16), 32),
    "U-Net 8x8": ((2, 1280, 8, 8), 32),
    "VAE 64x64": ((1, 512, 64, 64), 32),
    "VAE 512x512": ((1, 128, 512, 512), 32),
    "volume 24^3": ((2, 64, 24, 24, 24), 8),
    "volume 96^3": ((1, 32, 96, 96, 96), 8),
    "odd 61x47": ((3, 90, 61, 47), 6),
    "odd 61x47 G=1": ((3, 90, 61, 47), 1),
    "odd 61x47 G=C": ((3, 90, 61, 47), 90),
    "400 MB": ((1, 128, 1024, 768), 32),
}
"""Name -> shape as channels-first, groups."""
QUICK = ("tiny", "table 64x256", "ResNet 56x56", "U-Net 16x16", "odd 61x47", "volume 96^3")
ROUNDS = (7, 31)  # at least, and at most while times scatter
PATIENCE = 10.0  # seconds for the rounds of one case, once there are five
LARGEST = 420e6  # bytes of one array: the float64 of the largest shape is left out, as five processes hold three each


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    operation: str
    shape: tuple[int, ...]
    groups: int
    dtype: str
    layout: str

    @property
    def problem(self) -> Problem:
        return Problem(tuple(self.shape), self.groups, self.dtype, self.layout)


def cases(names: tuple[str, ...], dtypes: tuple[str, ...], layouts: tuple[str, ...]) -> list[Case]:
    """Every operation, dtype and layout of the named shapes; tables (S = 1) have one layout."""
    product = itertools.product(names, dtypes, layouts, TABLE)
    every = [Case(name, operation, *SHAPES[name], dtype, layout) for name, dtype, layout, operation in product]
    return [c for c in every if c.problem.nbytes <= LARGEST and (len(c.shape) > 2 or c.layout == layouts[0])]


def serve(library: str) -> None:
    """Answer one JSON line for each on standard input: prepare a case, or time the prepared one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    gc.disable()
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                call = None  # the data of the case before goes first
                case = Case(**request["case"])
                call = TABLE[case.operation][library](case.problem)
                answer: dict[str, Any] = {
                    "sample": _sample(case.problem, call()),
                    "seconds": min(_times(call, 20, 0.2)),
                }
            else:
                answer = {"seconds": median(_times(call, request["calls"]))}
        except Unsupported as reason:
            answer = {"unsupported": str(reason)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _times(call: Any, calls: int, limit: float = math.inf) -> list[float]:
    """Seconds of single calls, after one that is not timed; reading the clock adds 60 ns to each."""
    call()
    times: list[float] = []
    while len(times) < calls and sum(times) < limit:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) * 1e-9)
    return times


def _sample(problem: Problem, results: tuple[Any, ...]) -> list[list[float]]:
    """Some elements of each result, the same ones in every library and layout."""
    rng = np.random.default_rng(5)
    sampled = []
    for result in results:
        array = as_numpy(problem, result)
        where = tuple(rng.integers(0, n, 50) for n in array.shape)
        sampled.append(array[where].astype(float).tolist())
    return sampled


class Library:
    """A library in its process."""

    def __init__(self, name: str):
        self.name = name
        count = str(THREADS)
        threads = dict.fromkeys(
            ("CUGN_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count
        )
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **threads, "JAX_PLATFORMS": "cpu"},
        )
        if hasattr(os, "sched_setaffinity"):  # jax sizes its pool by the cores that it may use
            os.sched_setaffinity(self.process.pid, set(sorted(os.sched_getaffinity(0))[:THREADS]))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal("SIGCONT")
        self.process.stdin.write(json.dumps(request) + "\n")
        line = self.process.stdout.readline()
        self._signal("SIGSTOP")
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(f"{self.name}: {answer['failed']}")
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):
            self.process.send_signal(getattr(signal, name))

    def close(self) -> None:
        self._signal("SIGCONT")
        self.process.communicate()  # an end of its input ends it


def others(case: Case, samples: dict[str, list[list[float]]]) -> dict[str, float]:
    """Libraries that computed something else, and by what part of the maximum: what is timed must be group norm."""
    # The peers' own errors decide: float32 sums for 16-bit types, and an eps rounded to float32 in ONNX.
    tolerance = {"float32": 1e-4, "float64": 1e-6, "float16": 2e-2, "bfloat16": 1e-1}[case.dtype]
    found = {}
    for library, sampled in samples.items():
        for values, wanted in zip(sampled, samples["cugn"], strict=False):
            difference = float(np.max(np.abs(np.subtract(values, wanted))) / np.max(np.abs(wanted)))
            if not difference <= tolerance:
                found[library] = difference
    return found


def measure(case: Case, libraries: list[Library]) -> dict[str, float]:
    """Median seconds of each library that has the operation."""
    answers = {library: library.ask(case=asdict(case)) for library in libraries}
    timed = {library: answer["seconds"] for library, answer in answers.items() if "unsupported" not in answer}
    sampled = {library.name: answers[library]["sample"] for library in timed if library.name != "copy"}
    for name, difference in others(case, sampled).items():
        told = f"{name} differs from cugn by {difference:.2g} of the maximum in {case}"
        if name not in PEERS:
            raise RuntimeError(told)
        tqdm.write(f"left out: {told}", file=sys.stdout)
        timed = {library: took for library, took in timed.items() if library.name != name}
    # A turn is 2 ms, at least three calls, or one where that takes long.
    calls = {library: max(3, math.ceil(2e-3 / took)) if took < 0.05 else 1 for library, took in timed.items()}
    times: dict[str, list[float]] = {library.name: [] for library in timed}
    start = time.perf_counter()
    for done in range(1, ROUNDS[1] + 1):
        for library in timed:
            times[library.name].append(library.ask(calls=calls[library])["seconds"])
        settled = done >= ROUNDS[0] and all(map(steady, times.values()))
        if settled or (done >= 5 and time.perf_counter() - start > PATIENCE):
            break
    return {name: median(values) for name, values in times.items()}


def steady(values: list[float]) -> bool:
    """Whether the middle half of the values lies within 10 % of the median."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return bool(high - low <= 0.2 * middle)


def run(chosen: list[Case], peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each case with the median seconds of each library."""
    libraries = [Library(name) for name in ("copy", "cugn", "cugn fresh", *peers)]
    rows = []
    print(heading(peers))
    try:
        for case in tqdm(chosen, unit=" cases", disable=None):
            row = {**asdict(case), "nbytes": case.problem.nbytes, "seconds": measure(case, libraries)}
            tqdm.write(line(row, peers), file=sys.stdout)
            rows.append(row)
    finally:
        for library in libraries:
            library.close()
    return rows


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Best peer / cugn, the same with a fresh result, and cugn / copy."""
    seconds = row["seconds"]
    best = min((seconds[peer] for peer in PEERS if peer in seconds), default=math.nan)
    return {
        "peer / cugn": best / seconds["cugn"],
        "peer / fresh": best / seconds["cugn fresh"],
        "cugn / copy": seconds["cugn"] / seconds["copy"],
    }


def heading(peers: tuple[str, ...]) -> str:
    names = ("copy", "cugn", "fresh", *peers)
    columns = "".join(f"{name:>12s}" for name in (*names, "peer/cugn", "peer/fresh", "cugn/copy"))
    return f"microseconds; cugn: with out=, fresh: without\n{'shape':15s} {'dtype':9s}{'layout':7s}{'pass':9s}{columns}"


def line(row: dict[str, Any], peers: tuple[str, ...]) -> str:
    """One line of the table of all cases."""
    names = ("copy", "cugn", "cugn fresh", *peers)
    times = "".join(f"{row['seconds'][n] * 1e6:12.1f}" if n in row["seconds"] else f"{'-':>12s}" for n in names)
    quotients = "".join(f"{ratio:12.2f}" for ratio in ratios(row).values())
    layout = row["layout"].removeprefix("channels_")
    return f"{row['name']:15s} {row['dtype']:9s}{layout:7s}{row['operation']:9s}{times}{quotients}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Geometric mean and worst case of the ratios by pass and dtype, then of all, as a Markdown table."""
    names = (
        "pass",
        "dtype",
        "cases",
        "best peer / cugn: mean",
        "worst",
        "fresh result: mean",
        "worst",
        "cugn / copy, >= 16 MB",
    )
    lines = ["|".join(("", *(f" {name} " for name in names), "")), "|---" * len(names) + "|"]
    kinds = sorted(
        {(row["operation"], row["dtype"]) for row in rows}, key=lambda k: (k[0] != "forward", DTYPES.index(k[1]))
    )
    for operation, dtype in [*kinds, ("both", "all")]:
        of_kind = [r for r in rows if operation == "both" or (r["operation"], r["dtype"]) == (operation, dtype)]
        cells = []
        for quotient in ("peer / cugn", "peer / fresh"):
            values = [ratios(row)[quotient] for row in of_kind]
            cells += [f"{geometric_mean(values):.2f}", f"{min(values):.2f}"]
        large = [ratios(row)["cugn / copy"] for row in of_kind if row["nbytes"] >= 16e6]
        cells.append(f"{geometric_mean(large):.2f}" if large else "-")
        lines.append(f"| {operation} | {dtype} | {len(of_kind)} | {' | '.join(cells)} |")
    worst = min(rows, key=lambda row: ratios(row)["peer / cugn"])
    described = f"{worst['name']} {tuple(worst['shape'])} G={worst['groups']}, {worst['dtype']}, {worst['layout']}"
    return "\n".join([*lines, "", f"Worst case: {worst['operation']} of {described}."])


def machine(peers: tuple[str, ...]) -> dict[str, str]:
    """Where the figures come from."""
    names = ("cugn", "numpy", "numba", *peers)
    about = {name: _version(name) for name in names}
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": _cpu(), "system": system, "threads": str(THREADS), "load before": busy, **about}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # cugn from its source tree
        module = importlib.import_module(package)
        return str(module.__version__)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def figure(rows: list[dict[str, Any]], path: Path, about: dict[str, str]) -> None:
    """Best peer / cugn and cugn / copy of every case against the size of the array."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    colors = dict(zip(DTYPES, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))  # Okabe and Ito
    markers = {"forward": "o", "backward": "^"}
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey="row", layout="constrained")
    for column, layout in zip(axes.T, LAYOUTS, strict=True):
        column[0].set_title(layout.replace("_", "-"), loc="left", weight="bold")
        for panel, name in zip(column, ("peer / cugn", "cugn / copy"), strict=True):
            panel.axhline(1, color="#444444", linewidth=1)
            for row in (row for row in rows if row["layout"] == layout):
                filled = colors[row["dtype"]]
                panel.plot(
                    row["nbytes"], ratios(row)[name], markers[row["operation"]], color=filled, alpha=0.7, ms=6, mew=0
                )
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_major_formatter(EngFormatter("B"))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(color="#e5e5e5")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel("size of x")
    axes[0, 0].set_ylabel("time of the best peer / cugn\n(above 1: cugn is faster)")
    axes[1, 0].set_ylabel("time of cugn / one-thread copy\n(backward: / np.add)")
    present = {row["dtype"] for row in rows}
    shown = [Line2D([], [], marker="s", linestyle="", color=colors[d], label=d) for d in DTYPES if d in present]
    shown += [Line2D([], [], marker=m, linestyle="", color="#444444", label=o) for o, m in markers.items()]
    fig.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    fig.supxlabel(", ".join(f"{k} {v}" if k[0] != "c" or k == "cugn" else v for k, v in about.items()), fontsize=7)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, float32 and bfloat16: two minutes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help="these shapes only")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="NAME", help="these dtypes only")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, metavar="NAME", help="these layouts only")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="NAME", help="these libraries only")
    parser.add_argument(
        "--output", type=Path, default=Path("out/peers"), help="of .json and .png (default: %(default)s)"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return
    names = tuple(options.shapes or (QUICK if options.quick else SHAPES))
    dtypes = tuple(options.dtypes or (("float32", "bfloat16") if options.quick else DTYPES))
    wanted = PEERS if options.peers is None else options.peers
    peers = tuple(peer for peer in wanted if importlib.util.find_spec(peer))
    about = machine(peers)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = run(cases(names, dtypes, tuple(options.layouts or LAYOUTS)), peers)
    if peers:
        print(f"\n{summary(rows)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps({"machine": about, "cases": rows}, indent=1))
    figure(rows, options.output.with_suffix(".png"), about)
    print(f"\n{options.output}.json and .png saved")


if __name__ == "__main__":
    main()
