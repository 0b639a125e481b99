"""The command ``python -m cugn normalize``: its arguments, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

from .files import FileError, normalize_file
from .formats import Array, Memory, NpySource, one_line
from .functional import group_norm


def _bytes(text: str) -> int:
    """Bytes of "512MB", "2GiB", "1e9"."""
    match = re.fullmatch(r"([0-9.eE+]+)\s*([kMGT]?)(i?)B?", text.strip())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < 1e18:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 512MB or 2GiB")
    return int(number * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def _integers(text: str) -> int | tuple[int, ...] | None:
    """An integer, several with commas between them, or "none"."""
    if text.lower() == "none":
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer and no list of integers such as 0,0,1,1") from None
    return values if "," in text else values[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m cugn normalize``."""
    parser.description = "Normalize a .npy file or a Zarr array of any size, block by block."
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help=".npy file, or folder of a Zarr array")
    add("target", metavar="OUT", type=Path, help="of the same kind; appears when it is complete")
    add("--groups", metavar="G", type=_integers, required=True, help="number of groups, or C labels such as 0,0,1,1")
    add("--channel-axis", metavar="A", type=int, default=1, help="axis of the channels (1)")
    add("--batch-axis", metavar="A", type=_integers, default=0, help='axis or axes of the samples, or "none" (0)')
    add("--eps", type=float, default=1e-5, help="added to the variance (1e-5)")
    add("--dtype", choices=["float16", "float32", "float64"], help="of OUT (IN's; float32 for integers)")
    add("--activation", choices=["relu", "silu", "gelu", "gelu_tanh"], help="applied to the result")
    add("--weight", metavar="F", type=Path, help=".npy file of C scales")
    add("--bias", metavar="F", type=Path, help=".npy file of C shifts")
    add("--memory", metavar="SIZE", type=_bytes, default="512MB", help="that the process shall not exceed (512MB)")
    add("--stats", metavar="F", type=Path, help="apply these statistics, of an earlier --save-stats")
    add("--save-stats", metavar="F", type=Path, help="save the statistics of IN as .npz")
    add("--threads", metavar="N", type=int, help="blocks in work at a time (one a processor, at most 4)")
    add("--quiet", action="store_true", help="no progress bar and no closing line")


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for, and give the exit status."""
    start = time.perf_counter()
    group_norm(np.zeros((1, 2), np.float32), 1)  # so that the memory of the engine and its compiled code is counted
    try:
        weight, bias = (None if path is None else _vector(path) for path in (options.weight, options.bias))
        passes = normalize_file(
            options.source,
            options.target,
            options.groups,
            weight=weight,
            bias=bias,
            eps=options.eps,
            channel_axis=options.channel_axis,
            batch_axis=options.batch_axis,
            activation=options.activation,
            dtype=options.dtype,
            memory=max(0, options.memory - _resident()),
            stats=options.stats,
            save_stats=options.save_stats,
            threads=options.threads,
            progress=not options.quiet,
        )
    except (FileError, TypeError, ValueError, MemoryError) as error:
        print(f"cugn normalize: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cugn normalize: {options.target}: interrupted, nothing was left", file=sys.stderr)
        return 130
    if not options.quiet:
        seconds = time.perf_counter() - start
        print(f"{options.target}: {passes} {'pass' if passes == 1 else 'passes'}, {seconds:.1f} s")
    return 0


def _resident() -> int:
    """Bytes of memory that the process has; 250 MB where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 250 << 20


def _vector(path: Path) -> Array:
    """A small .npy file."""
    source = NpySource(path)
    if len(source.shape) != 1:
        raise FileError(f"{path}: holds an array of shape {source.shape}: it must be one value for each channel")
    values = source.read((slice(0, source.shape[0]),), Memory())
    return values.copy()
