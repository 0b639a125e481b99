"""Sphinx extension: cugn's speed commit by commit, from ``asv_bench/results``: asv's site beside the pages, a figure.

`asv publish` reads the results that are stored with the source tree, and the history that git has of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from page_parts import DOCS, write

BENCH = DOCS.parent / "asv_bench"
RESULTS = BENCH / "results"
SITE = "asv"
SERIES = {"forward": "speed.Forward.time_forward", "backward": "speed.Backward.time_backward"}
COPY = "speed.Forward.time_copy"


def measured() -> list[dict[str, Any]]:
    """Results of all commits, oldest first: date, hash, machine, and seconds by benchmark and parameters."""
    found = []
    for path in sorted(RESULTS.glob("*/*-*.json")):
        stored = json.loads(path.read_text())
        seconds = {}
        for name, row in stored["results"].items():
            values, parameters = row[0], row[1]
            for key, value in zip(itertools.product(*parameters), values or [], strict=False):
                if isinstance(value, float) and value == value:
                    seconds[name, key] = value
        about = {"date": stored["date"], "commit": stored["commit_hash"][:7], **stored["params"]}
        found.append({**about, "times": seconds})
    return sorted(found, key=lambda one: one["date"])


def figure(commits: list[dict[str, Any]], path: Path) -> None:
    """Time of a forward and a backward of float32 over that of the copy in the same run, commit by commit."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    newest = commits[-1]["times"]
    cases = [key for name, key in newest if name == SERIES["forward"] and key[1] == "32" and (COPY, key) in newest]
    shapes = list(dict.fromkeys(key[0] for key in cases))
    colors = dict(zip(shapes, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=False))  # Okabe and Ito
    fig, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey="row", layout="constrained")
    for row, (operation, name) in zip(axes, SERIES.items(), strict=True):
        for panel, layout in zip(row, ("channels_first", "channels_last"), strict=True):
            for key in (key for key in cases if key[3] == f"'{layout}'"):
                points = [
                    (k, one["times"][name, key] / one["times"][COPY, key])
                    for k, one in enumerate(commits)
                    if {(name, key), (COPY, key)} <= one["times"].keys()
                ]
                panel.plot(*zip(*points, strict=True), "o-", ms=4, color=colors[key[0]], label=key[0])
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(color="#e5e5e5")
            panel.spines[["top", "right"]].set_visible(False)
            if operation == "forward":
                panel.set_title(layout.replace("_", "-"), loc="left", weight="bold")
        row[0].set_ylabel(f"{operation} / copy")
    for panel in axes[1]:
        days = [f"{datetime.fromtimestamp(one['date'] / 1000, UTC):%Y-%m-%d}" for one in commits]
        names = [f"{one['commit']}\n{day}" for one, day in zip(commits, days, strict=True)]
        panel.set_xticks(range(len(commits)), names, fontsize=7)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def publishable() -> bool:
    """Whether asv is there, and results, of commits that this checkout's history has (a shallow one has not)."""
    commits = [json.loads(path.read_text())["commit_hash"] for path in RESULTS.glob("*/*-*.json")]
    if not commits or not importlib.util.find_spec("asv") or not shutil.which("git"):
        return False
    asked = (["git", "-C", str(DOCS), "merge-base", "--is-ancestor", commit, "HEAD"] for commit in commits)
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in asked)


def make_part(app: Any) -> None:
    """Write the part of the performance page."""
    commits = measured()
    if not commits:
        write("asv.inc.md", "No results are stored with this source tree: `cd asv_bench && asv run`.\n")
        return
    figure(commits, DOCS / "_static" / "asv.png")
    about = f"{commits[-1]['cpu']}, {commits[-1]['num_cpu']} cores"
    site = f'<a href="{SITE}/index.html">the asv site</a>' if publishable() else "`asv publish`, in a full checkout"
    write(
        "asv.inc.md",
        f"float32 in 32 groups, on {about}, both times of one run; one round of each, which scatters by "
        f"a third. Each benchmark by itself, with the changes between commits: {site}.\n\n"
        "```{image} _static/asv.png\n"
        ":alt: Time of forward and backward over that of a copy, for four shapes and two layouts, against commits\n"
        "```\n",
    )


def publish(app: Any, exception: Exception | None) -> None:
    """Put asv's site beside the pages."""
    if exception or app.builder.format != "html" or not publishable():
        return
    configuration = json.loads((BENCH / "asv.conf.json").read_text())
    for name in ("repo", "benchmark_dir", "results_dir"):
        configuration[name] = str((BENCH / configuration[name]).resolve())
    configuration["branches"] = ["HEAD"]  # whatever is checked out here
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asv.conf.json"
        path.write_text(json.dumps(configuration))
        site = Path(app.outdir).resolve() / SITE
        command = [sys.executable, "-m", "asv", "publish", "--config", str(path), "--html-dir", str(site)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"asv publish: {done.stdout}{done.stderr}")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", make_part)
    app.connect("build-finished", publish)
    return {"parallel_read_safe": True}
