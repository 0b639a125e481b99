"""Promise: the tests for those with a GPU are in order before anyone runs them: one command writes a report."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import NEEDED, emulated
from gpu import test_gpu_values as on_gpu
from libraries import FLOATS, subprocess_environment
from simt import host_cupy

ROOT = Path(__file__).parents[1]


def test_report_without_a_gpu(tmp_path: Path) -> None:
    """Each test is in it, skipped with the reason; so is the machine."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", str(report)],
        cwd=ROOT,
        env={**subprocess_environment(), "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {report}" in done.stdout
    record = json.loads(report.read_text())
    assert {"python", "cugn", "no device"} <= record["machine"].keys()
    own = {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    of_engine = {f"tests/test_cuda_{what}.py" for what in ("values", "gradients", "errors", "host")}
    assert {name.partition("::")[0] for name in record["results"]} == own | of_engine
    for name, result in record["results"].items():
        assert result.startswith("skipped: "), name
        if name.partition("::")[0] in own:
            assert "no CUDA device" in result or "CuPy is not installed" in result, name


@NEEDED
@pytest.mark.parametrize("name", ["values", "large means", "conversions", "same bits", "two devices"])
def test_rehearsal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no stream or graph of a real device passes on the emulator, and so will run on one."""
    import cupy

    devices = 2 if name == "two devices" else 1
    with emulated(*[host_cupy.Properties()] * devices, mode="fast"):
        monkeypatch.setattr(cupy, "asarray", lambda a: host_cupy.to_device(a, cupy.cuda.runtime.getDevice()))
        for owner, method in ((cupy, "asnumpy"), (cupy.ndarray, "get")):
            monkeypatch.setattr(owner, method, lambda a: np.array(host_cupy.to_host(a)))
        # just beyond the shared memory of a block: the 2.4 million elements for a real device take a minute here
        monkeypatch.setitem(on_gpu.SHAPES, "split", ((1, 4, 60_000), 2))
        values = [(on_gpu.test_values, *c) for c in itertools.product(on_gpu.SHAPES, FLOATS, (False, True))]
        calls: dict[str, list[tuple[Any, ...]]] = {
            "values": values,
            "large means": [(on_gpu.test_large_means, dtype, 1e6) for dtype in ("float32", "float64")],
            "conversions": [(on_gpu.test_float16_conversions,)],
            "same bits": [(on_gpu.test_same_bits,)],
            "two devices": [(on_gpu.test_two_devices,)],
        }
        for test, *arguments in calls[name]:
            test(*arguments)
