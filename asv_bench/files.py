"""`python -m cugn normalize` against `cp` of the same file, in turn, each brought to the disk.

    python asv_bench/files.py              # 4 GB: needs 12 GB on the disk, some minutes
    python asv_bench/files.py --gigabytes 0.1 --rounds 1

The source comes from the disk ("cold", its pages are given back before) or from the system's memory ("warm").
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

SAMPLES, CHANNELS, GROUPS = 8, 32, 8
PROGRAM = """
import sys
from cugn.__main__ import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def create(path: Path, nbytes: int) -> None:
    """Write samples of float32."""
    positions = nbytes // (4 * SAMPLES * CHANNELS)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (SAMPLES, CHANNELS, positions))
    noise = np.random.default_rng(0).standard_normal(positions, dtype=np.float32)
    for n in range(SAMPLES):
        for c in range(CHANNELS):
            x[n, c] = noise * (1 + c / 8) + c
    x.flush()


def settle(source: Path, target: Path, cold: bool) -> None:
    """Have nothing under way to the disk, and the source's pages in memory or not."""
    target.unlink(missing_ok=True)
    os.sync()
    with open(source, "rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


def copy(source: Path, target: Path) -> None:
    """With the system's means, and brought to the disk."""
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--memory", default="512MB", help="of the command")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the system's for such files")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        source, target = folder / "x.npy", folder / "y.npy"
        create(source, int(options.gigabytes * 1e9))
        peaks = []

        def normalize() -> None:
            arguments = ["normalize", source, target, "--groups", str(GROUPS), "--memory", options.memory]
            command = [sys.executable, "-c", PROGRAM, *arguments]
            result = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            peaks.append(int(result.stdout.split()[-2]) * 1024)

        normalize()  # compiles, if it has to
        sides: dict[str, Callable[[], None]] = {"cp": lambda: copy(source, target), "cugn": normalize}
        print(f"{source.stat().st_size / 1e9:.1f} GB, medians of {options.rounds} rounds in turn\n")
        print("| source | cp, s | cugn, s | cp / cugn | of single rounds |\n|---|---|---|---|---|")
        for cold in (True, False):
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.rounds):
                for name, call in sides.items():
                    settle(source, target, cold)
                    start = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - start)
            ratios = sorted(a / b for a, b in zip(seconds["cp"], seconds["cugn"], strict=True))
            cells = [f"{median(seconds[name]):.1f}" for name in sides]
            cells += [f"{median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"]
            print(f"| {'cold' if cold else 'warm'} | {' | '.join(cells)} |", flush=True)
        print(f"\nlargest memory of the command: {max(peaks) / 1e6:.0f} MB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
