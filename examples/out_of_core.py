"""Batch norm of a file that is larger than memory: one pass for the moments, one to apply them.

    python examples/out_of_core.py [FILE.npy]

The file is mapped into memory, so that a slice of it is read when it is used. ``python -m cugn normalize`` does as much
for group norm, with a progress bar; here is how it goes by hand.
"""

from __future__ import annotations

import sys
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

import cugn


def streamed_moments(x: Any, samples: int) -> cugn.Moments:
    """Moments of each channel over all samples of an (N, C, ...) array, `samples` at a time."""
    channels = x.shape[1]
    starts = range(0, len(x), samples)
    parts = (cugn.moments(x[i : i + samples], channels, batch_axis=None) for i in starts)
    return reduce(cugn.Moments.merge, parts)


def normalize_into(y: Any, x: Any, moments: cugn.Moments, samples: int, eps: float = 1e-5) -> None:
    """Write the normalized x to y, `samples` at a time."""
    rstd = moments.rstd(eps)
    for i in range(0, len(x), samples):
        part = slice(i, i + samples)
        cugn.normalize(x[part], moments.mean, rstd, x.shape[1], batch_axis=None, out=y[part])


def main(source: Path) -> None:
    """Normalize a file beside itself."""
    x = np.load(source, mmap_mode="r")
    target = source.with_name(f"{source.stem}_normalized.npy")
    y = np.lib.format.open_memmap(target, mode="w+", dtype=x.dtype, shape=x.shape)
    samples = max(1, (16 << 20) // x[0].nbytes)
    moments = streamed_moments(x, samples)
    normalize_into(y, x, moments, samples)
    y.flush()
    print(f"{source} ({x.nbytes / 1e6:.0f} MB, {x.shape[1]} channels) -> {target}")
    print("means", moments.mean.round(3), "standard deviations", np.sqrt(moments.var).round(3))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "series.npy")
            steps = np.random.default_rng(0).normal([[[5.0], [-2.0], [1e4]]], [[[1.0], [30.0], [0.1]]], (2000, 3, 1000))
            np.save(path, steps.astype(np.float32))
            del steps
            main(path)
