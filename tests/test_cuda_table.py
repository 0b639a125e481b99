"""Promise: ``python -m cugn.cuda`` tells what the compiler gave each kernel, and models its time by its bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from cugn.cuda import __main__ as table
from cugn.cuda.compile import Specialisation
from cugn.cuda.config import Device

SPECIALISATION = Specialisation("forward")


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (90, 256, 32, 0, 8),  # 2048 threads
        (90, 256, 64, 0, 4),  # 65,536 registers
        (90, 256, 33, 0, 6),  # a warp takes them by 256: 40 a thread
        (90, 256, 255, 0, 1),
        (90, 256, 32, 100 << 10, 2),  # 228 KB, 1 KB of them the system's for each block
        (75, 256, 32, 0, 4),  # 1024 threads
        (75, 32, 32, 0, 16),  # blocks
        (90, 32, 32, 0, 32),
        (86, 1024, 32, 0, 1),  # 1536 threads hold one
    ],
)
def test_occupancy(architecture: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    """As NVIDIA's occupancy calculator has it."""
    assert table.blocks_per_multiprocessor(architecture, threads, registers, shared) == blocks


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bytes_of_an_element(dtype: str, last: bool) -> None:
    """A resident group is read and written once (x and dy read once); a split one is read once more."""
    device, item = Device(227 << 10), {"float16": 2, "float32": 4, "float64": 8}[dtype]
    for arrays, resident, split in ((1, 2, 3), (2, 3, 5)):
        small = table.launches(table.problem_of(2, 64, 16, 8, last, dtype, arrays), device)
        large = table.launches(table.problem_of(1, 64, 512 * 512, 2, last, dtype, arrays), device)
        assert (len(small), len(large)) == (1, 2)
        assert sum(launch[-1] for launch in small) == resident * item
        assert sum(launch[-1] for launch in large) == split * item


def compiler() -> None:
    """Skip unless a kernel can be compiled and looked at."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        table.cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each kernel that the shapes launch: registers of the machine code, time of the bytes."""
    compiler()
    monkeypatch.setattr(table, "SHAPES", ((2, 64, 16, 8, False), (1, 64, 512 * 512, 2, False)))
    monkeypatch.setattr(sys, "argv", ["cugn.cuda", "--arch", "90", "--dtype", "float32", "--bandwidth", "1000"])
    table.main()
    head, *lines, note = capsys.readouterr().out.splitlines()
    keys = re.split(r"\s{2,}", head.strip())
    rows: list[dict[str, Any]] = [dict(zip(keys, re.split(r"\s{2,}", line.strip()), strict=True)) for line in lines]
    kernels = ["forward", "backward", "moments", "apply_statistics", "backward_sums", "backward_apply"]
    assert [row["kernel"] for row in rows] == kernels
    for row in rows:
        assert 16 <= int(row["registers"]) <= 255
        assert row["local bytes"] == "0"
        assert 0 < int(row["occupancy"].rstrip("%")) <= 100
        assert row["architecture"] == "sm_90"
    # 16.8 million elements at 1000 GB/s: 4, 8, 8 and 12 bytes each
    assert [float(row["modelled us"]) for row in rows[2:]] == [67.1, 134.2, 134.2, 201.3]
    assert "modelled, not measured" in note


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own message."""
    compiler()
    monkeypatch.setattr(table, "source", lambda file: "this is no C++;")
    with pytest.raises(RuntimeError, match=r"forward\.cu\(1\): error"):
        table.compiled(SPECIALISATION, 90)


def test_without_cuobjdump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package that has it is named."""
    monkeypatch.setattr(table.shutil, "which", lambda name: None)
    monkeypatch.setattr(table.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-cuobjdump"):
        table.cuobjdump()
