"""Parts of pages that are made from the code itself when the docs are built."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DOCS = Path(__file__).parent
OPERATIONS = ("forward", "backward", "jvp", "double_backward", "moments", "normalize")
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "jvp": "jvp",
    "double_backward": "double backward",
    "moments": "moments",
    "normalize": "normalize",
}


def write(name: str, text: str) -> None:
    """Write a part, and leave an unchanged one alone (Sphinx would read its page again)."""
    path = DOCS / name
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def serving_table() -> str:
    """What each compiled engine serves, asked of the engines themselves.

    A cell is "yes" if the engine serves all dtypes and activations of a row, else what it leaves to the reference.
    """
    import cugn.cpu
    import cugn.cuda

    forms = {
        "channels first": {},
        "channels last": {"layout": "last"},
        "batch norm": {"batch_norm": True},
        "label groups": {"labels": True},
        "`where`": {"where": True},
        "label groups and `where`": {"labels": True, "where": True},
        "other strides": {"layout": "strided"},
        "int8, uint8, int16, uint16": {"integers": True},
    }
    lines = []
    for engine, title in ((cugn.cpu, "NumPy"), (cugn.cuda, "CuPy")):
        lines += [
            f"**{title}**",
            "",
            "| | " + " | ".join(NAMES.values()) + " |",
            "|---|" + "---|" * len(OPERATIONS),
        ]
        for form, settings in forms.items():
            cells = [_cell(engine, operation, **settings) for operation in OPERATIONS]
            lines.append(f"| {form} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(engine: Any, operation: str, **settings: Any) -> str:
    from cugn.engines import resolve

    integers = ("int8", "uint8", "int16", "uint16")
    dtypes = integers if settings.get("integers") else ("float16", "bfloat16", "float32", "float64")
    activations = (None,) if operation == "moments" else (None, "relu", "silu", "gelu", "gelu_tanh")
    if settings.get("where") and operation == "normalize":
        return "–"
    left = []
    for dtype, activation in itertools.product(dtypes, activations):
        plan = resolve(*_call(operation, dtype, activation, **settings))[1]
        if not engine.serves(plan, operation):
            left.append((dtype, activation))
    if not left:
        return "yes"
    if len(left) == len(dtypes) * len(activations):
        return "reference"
    if left == list(itertools.product(dtypes, activations[1:])):
        return "without activation"
    return "not " + ", ".join(f"{dtype} {activation or ''}".strip() for dtype, activation in left)


def _call(operation: str, dtype: Any, activation: str | None, **settings: Any) -> tuple[Any, ...]:
    """Arguments of `engines.resolve` for a call on a (4, 8, 6, 10) array."""
    from cugn.plan import Each

    shape = (4, 6, 10, 8) if settings.get("layout") == "last" else (4, 8, 6, 10)
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x = np.ones(shape, dtype)
    if settings.get("layout") == "strided":
        x = np.ones((4, 8, 6, 20), dtype)[..., ::-2]
    like_x = x.astype(np.float32) if settings.get("integers") else x
    groups: Any = [0, 1, 0, 1, 0, 1, 2, 2] if settings.get("labels") else 4
    if settings.get("batch_norm"):
        groups = Each.CHANNEL_OF_BATCH
    stats = np.ones((8,) if settings.get("batch_norm") else (4, 3 if settings.get("labels") else 4))
    operands = {
        "forward": [],
        "backward": [("dy", like_x)],
        "jvp": [("tx", like_x)],
        "double_backward": [("ddx", like_x), ("dy", like_x)],
        "moments": [],
        "normalize": [("mean", stats), ("rstd", stats)],
    }[operation]
    if settings.get("where"):
        operands = [*operands, ("where", np.ones(shape, bool))]
    channel_axis = -1 if settings.get("layout") == "last" else 1
    return operation, x, groups, operands, 1e-5, channel_axis, 0, activation


def peers_part() -> str:
    """Summary, figure and all cases of the comparison with other libraries that is stored in ``figures/peers.json``."""
    stored = DOCS / "figures" / "peers.json"
    if not stored.exists():
        return (
            "No measurement is stored with this source tree: `python asv_bench/peers.py --output docs/figures/peers`."
        )
    sys.path.insert(0, str(DOCS.parent / "asv_bench"))
    import peers

    measured = json.loads(stored.read_text())
    rows, about = measured["cases"], measured["machine"]
    peers.figure(rows, DOCS / "_static" / "peers.png", about)
    libraries = tuple(name for name in peers.PEERS if any(name in row["seconds"] for row in rows))
    cases = "\n".join([peers.heading(libraries), *(peers.line(row, libraries) for row in rows)])
    return "\n".join(
        [
            "Measured with " + ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
            "",
            peers.summary(rows),
            "",
            "```{image} _static/peers.png",
            ":alt: Ratios of the time of the best other library, and of a copy, to the time of cugn, against size",
            "```",
            "",
            "````{dropdown} All cases",
            "```text",
            cases,
            "```",
            "````",
            "",
        ]
    )


def gpu_part(bandwidth: float = 3350.0) -> str:
    """Launches on an H100 and the time that their traffic takes at the bandwidth of its memory, in GB/s."""
    from cugn.cuda import __main__ as model

    device = model.Device(model.ARCHITECTURES[90][0] << 10)
    lines = [
        "| N, C, S, G | channels | dtype | pass | kernels (blocks × threads) | bytes an element | modelled time |",
        "|---|---|---|---|---|---|---|",
    ]
    for (N, C, S, G, last), dtype, arrays in itertools.product(model.SHAPES, ("float32", "float16"), (1, 2)):
        launches = model.launches(model.problem_of(N, C, S, G, last, dtype, arrays), device)
        kernels = ", ".join(f"{kernel} ({box.tiles} × {box.threads})" for kernel, box, _, _ in launches)
        traffic = sum(bytes_each for *_, bytes_each in launches)
        time = N * C * S * traffic / bandwidth / 1e3
        lines.append(
            f"| {N}, {C}, {S}, {G} | {'last' if last else 'first'} | {dtype} "
            f"| {'forward' if arrays == 1 else 'backward'} | {kernels} | {traffic:g} | {time:.3g} µs |"
        )
    return "\n".join(lines) + "\n"


def gpu_times_part() -> str:
    """Table and figure of the times on a GPU that are stored in ``figures/gpu.json``."""
    stored = DOCS / "figures" / "gpu.json"
    if not stored.exists():
        return "No measurement is stored with this source tree: `python -m tests.gpu.timing docs/figures/gpu.json`."
    sys.path.insert(0, str(DOCS.parent))
    from tests.gpu import timing

    measured = json.loads(stored.read_text())
    gpu_figure(measured["rows"], DOCS / "_static" / "gpu.png", measured["device"])
    return "\n".join(
        [
            f"Measured on an {measured['device']} with "
            + ", ".join(f"{name} {value}" for name, value in measured["versions"].items())
            + ". Microseconds of the device's work, medians of 20, the second-level cache emptied before each.",
            "",
            "```{image} _static/gpu.png",
            ":alt: Bytes a second that forward and backward move on the GPU, beside torch and a copy, for each case",
            "```",
            "",
            timing.table(measured),
            "",
            *(_gpu_features(timing.features_table(measured)) if "features" in measured else ()),
            measured.get("notes", ""),
            "",
        ]
    )


def _gpu_features(table: str) -> tuple[str, ...]:
    title = "Labels, masks and activations in float32: forward / backward, in times of the plain call."
    return (title, "", table, "")


def gpu_figure(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Throughput of cugn, torch and the copy for each float32 case, of the bytes that have to be moved at least."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["dtype"] == "float32"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.34 * len(rows) + 1.2), sharey=True, layout="constrained")
    labels = [f"{row['case']} {tuple(row['shape'])}" for row in rows]
    for axis, name, arrays in zip(axes, ("forward", "backward"), (2, 3), strict=True):
        styles = {"copy": ("#9a9a9a", "|"), f"torch {name}": ("#d1495b", "o"), name: ("#2e6f95", "o")}
        for source, (color, marker) in styles.items():
            moved = 2 if source == "copy" else arrays
            points = [
                (moved * row["milliseconds"]["bytes"] / row["milliseconds"][source] / 1e9, k)
                for k, row in enumerate(rows)
                if row["milliseconds"][source]
            ]
            label = {"copy": "copy", name: "cugn"}.get(source, "torch")
            axis.scatter(*zip(*points, strict=True), color=color, marker=marker, s=60, label=label)
        axis.set(title=name, xlabel="TB/s of what has to be moved, float32", xlim=(0, None))
        axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
    axes[1].invert_yaxis()
    axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    axes[1].legend(loc="lower right")
    figure.suptitle(device)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def make_parts(app: Any) -> None:
    """Write all parts."""
    write("guide/paths.inc.md", serving_table())
    write("peers.inc.md", peers_part())
    write("gpu_model.inc.md", gpu_part())
    write("gpu.inc.md", gpu_times_part())


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", make_parts)
    return {"parallel_read_safe": True}
