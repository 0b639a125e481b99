"""``python -m cugn`` tells what can run here, and its exit status is 1 when anything is wrong."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import cugn.cpu
import cugn.reference
import cugn.report
from cugn.__main__ import main


@pytest.fixture(autouse=True)
def small_timing(monkeypatch):
    monkeypatch.setattr(cugn.report, "SAMPLE", (32, 8, 8))
    monkeypatch.setattr(cugn.report, "BYTES", 2 * 32 * 8 * 8 * 8)  # two samples of float64


def test_everything_is_right_here(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all right"
    assert max(map(len, lines)) < 80
    rows = [tuple(line.split()[:2]) for line in lines]
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert ("cpu", dtype) in rows
    assert ("reference", "float32") in rows
    assert any(engine == "cuda" for engine, *_ in filter(None, rows))
    assert not any("FAIL" in line for line in lines)


def test_report_is_the_default_command(capsys):
    assert main(["report"]) == 0
    assert "all right" in capsys.readouterr().out


@pytest.mark.parametrize("engine", [cugn.cpu, cugn.reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(("operation", "spoiled"), [("forward", 0), ("backward", 0), ("backward", 1), ("backward", 2)])
def test_a_small_error_is_found(engine, operation, spoiled, monkeypatch, capsys):
    """200 eps of the largest element; the bounds are 3 or 4 eps, for sums of 2109 terms 60 eps of the largest sum."""
    right = getattr(engine, operation)

    def wrong(*arguments):
        results = [np.array(result) for result in right(*arguments)]
        largest = np.abs(results[spoiled]).max()
        results[spoiled] += results[spoiled].dtype.type(200 * 1.2e-7 * largest)
        return tuple(results)

    monkeypatch.setattr(engine, operation, wrong)
    assert main([]) == 1
    printed = capsys.readouterr().out
    name = engine.__name__.rpartition(".")[2]
    assert f"FAIL  {name} float32 {operation}" in printed
    assert "all right" not in printed


def test_not_a_number_is_found(monkeypatch, capsys):
    right = cugn.cpu.forward

    def wrong(*arguments):
        y, mean, rstd = right(*arguments)
        y.flat[7] = np.nan
        return y, mean, rstd

    monkeypatch.setattr(cugn.cpu, "forward", wrong)
    assert main([]) == 1
    assert "nan times the bound" in capsys.readouterr().out


def test_an_engine_that_raises_is_told(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(cugn.cpu, "backward", broken)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  cpu float32 backward: RuntimeError: no such luck" in printed
    assert "cpu float32 forward" not in printed


def test_missing_packages_are_named(monkeypatch, capsys):
    for package in ("cupy", "dask", "dask.array"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "GPU none: CuPy is not installed (pip install 'cugn[cuda13]')" in printed
    assert "dask not here: Dask is not installed (pip install 'cugn[dask]')" in printed


class Cuda:
    """What CuPy tells of a GPU."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, count):
        self.count, self.runtime = count, self

    def getDeviceCount(self):
        if self.count is None:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver: driver version is insufficient")
        return self.count

    def Device(self):
        return SimpleNamespace(id=0)

    def getDeviceProperties(self, device):
        return {"name": b"A card", "major": 9, "minor": 0}


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (1, "A card, compute capability 9.0, CuPy 14"),
        (0, "none: CuPy 14 finds no device"),
        (None, "none: CuPy 14 says driver version is insufficient"),
    ],
)
def test_the_gpu_or_why_there_is_none(count, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=Cuda(count), __version__="14"))
    assert dict(cugn.report._environment())["GPU"] == says


def test_a_copy_that_fails_is_told(monkeypatch, capsys):
    """An engine whose arrays cannot even be copied is wrong, and the others are still looked at."""
    copy_speed = cugn.report._copy_speed

    def broken(host):
        if host.engine == "cpu":
            raise MemoryError("no room")
        return copy_speed(host)

    monkeypatch.setattr(cugn.report, "_copy_speed", broken)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  cpu: MemoryError: no room" in printed
    assert "\nreference" in printed


def test_a_processor_without_a_name(monkeypatch):
    """Where /proc is not there, the name is Python's."""
    monkeypatch.setattr("builtins.open", Mock(side_effect=FileNotFoundError))
    monkeypatch.setattr(cugn.report.platform, "processor", lambda: "")
    monkeypatch.setattr(cugn.report.platform, "machine", lambda: "a machine")
    assert cugn.report._cpu_name() == "a machine"


def test_normalize_is_a_command(tmp_path):
    def normalize(source):  # in a process of its own: the memory that it may take counts what the process has already
        command = [sys.executable, "-m", "cugn", "normalize", source, tmp_path / "y.npy", "--groups", "2", "--quiet"]
        return subprocess.run(command, capture_output=True, text=True)

    x = np.random.default_rng(0).normal(5, 2, (2, 4, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert normalize(tmp_path / "x.npy").returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), cugn.group_norm(x, 2))
    missing = normalize(tmp_path / "missing.npy")
    assert missing.returncode == 1
    assert str(tmp_path / "missing.npy") in missing.stderr


def test_unknown_command():
    result = subprocess.run([sys.executable, "-m", "cugn", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "nonsense" in result.stderr
