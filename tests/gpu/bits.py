"""Checksums of results, from the emulator and from a device: no bit may differ where no exponential comes in.

``python -m tests.gpu.bits`` writes those of the emulator to ``emulated.json``, for `test_gpu_bits` on a device and
`test_cuda_values` on the emulator to hold against their own.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from libraries import FLOATS, Library, dtype_of

import cugn

EMULATED = Path(__file__).with_name("emulated.json")
LABELS = [0, 1, 0, 2, 2, 2, 1, 0, 2, 2, 2, 2]


class Case(NamedTuple):
    """One call: shape and groups, with or without a mask, an activation."""

    shape: tuple[int, ...]
    groups: Any
    masked: bool = False
    activation: str | None = None


CASES = [
    Case((3, 12, 49), 4),
    Case((33, 64), 32),
    Case((5, 8), 2),
    Case((4, 16), 16),
    Case((2, 64, 200), 32, activation="relu"),
    Case((3, 32, 1000), 8),
    Case((1, 8, 70_001), 2),
    Case((2, 2, 60_000), 1, activation="relu"),
    Case((3, 12, 35), LABELS),
    Case((3, 12, 35), 4, masked=True),
    Case((3, 12, 35), LABELS, masked=True, activation="relu"),
]


def digests(library: Library, case: Case, dtype: str, last: bool) -> dict[str, int]:
    """CRC-32 of every result of the functions of arrays."""
    rng = np.random.default_rng(7)
    shape = case.shape
    axis = {"channel_axis": -1 if last else 1}
    turn: Callable[[Any], Any] = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)

    def array(*shape: int) -> Any:
        values = rng.integers(-(1 << 20), 1 << 20, shape) / (1 << 18)  # exact in every float64, the same everywhere
        return values.astype(dtype_of(dtype))

    x, dy, ddx, tx = (library.array(turn(array(*shape))) for _ in range(4))
    w, b, dw, db = (library.array(array(shape[1])) for _ in range(4))
    where = library.array(turn(rng.random(shape) < 0.7)) if case.masked else None
    options = {**axis, "where": where, "activation": case.activation}
    y, mean, rstd = cugn.group_norm_forward(x, case.groups, w, b, **options)
    dx, dweight, dbias = cugn.group_norm_backward(dy, x, case.groups, w, b, mean=mean, rstd=rstd, **options)
    ty = cugn.group_norm_jvp(tx, x, case.groups, w, b, tweight=dw, tbias=db, **options)
    double = cugn.group_norm_double_backward(ddx, dy, x, case.groups, w, b, ddweight=dw, ddbias=db, **options)
    count, means, m2 = cugn.moments(x, case.groups, where=where, **axis)
    results = {"y": y, "mean": mean, "rstd": rstd, "dx": dx, "dweight": dweight, "dbias": dbias, "ty": ty}
    results |= {"gdy": double.gdy, "gx": double.gx, "gweight": double.gweight, "gbias": double.gbias}
    results |= {"count": count, "means": means, "m2": m2}
    found = {}
    for name, value in results.items():
        if value is not None:
            found[name] = zlib.crc32(np.ascontiguousarray(library.numpy(value)).tobytes())
    return found


def names() -> dict[str, tuple[Case, str, bool]]:
    """Every case, dtype and layout, by its name in the file."""
    return {
        f"{case.shape} {'labels' if isinstance(case.groups, list) else case.groups}{' masked' * case.masked}"
        f"{' relu' if case.activation else ''} {dtype} {'last' if last else 'first'}": (case, dtype, last)
        for case in CASES
        for dtype in FLOATS
        for last in (False, True)
    }


def recorded() -> dict[str, dict[str, int]]:
    """Those of the emulator."""
    return json.loads(EMULATED.read_text())


def main() -> None:
    """Write the file."""
    from cuda_on_cpu import emulated

    with emulated(mode="fast", flush_subnormals=None) as library:
        found = {name: digests(library, *case) for name, case in names().items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    EMULATED.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(found)} cases: {EMULATED}")


if __name__ == "__main__":
    main()
