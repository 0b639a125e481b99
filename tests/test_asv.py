"""Every benchmark runs, over the full product of its parameters, at tiny sizes."""

import importlib
import inspect
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("asv_runner", reason="asv is not installed (pip install '.[bench]')")

import benchmarks
from asv_runner.benchmarks.mark import SkipNotImplemented
from libraries import EVERYTHING

KINDS = ("time_", "timeraw_", "track_", "peakmem_")


def all_benchmarks():
    for module in pkgutil.iter_modules(benchmarks.__path__, "benchmarks."):
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name:
                for method in dir(kind):
                    if method.startswith(KINDS):
                        yield pytest.param(kind, method, id=f"{module.name.rpartition('.')[2]}.{name}.{method}")


BENCHMARKS = list(all_benchmarks())


def tiny(shape):
    return (min(shape[0], 2), 32, *(min(n, 6) for n in shape[2:]))


def run(kind, method, parameters):
    benchmark = kind()
    if parameters:
        benchmark.setup(*parameters)
    result = getattr(benchmark, method)(*parameters)
    if method.startswith("track_"):
        # An eps is the spacing above 1: what is promised is below 9 of them, and an exact result is suspicious.
        assert 0 < result < 9, parameters
    if method.startswith("timeraw_"):
        subprocess.run([sys.executable, "-W", "error", "-c", result], check=True)


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
@pytest.mark.parametrize(("kind", "method"), BENCHMARKS)
def test_benchmark(kind, method, engine):
    if not hasattr(kind, "params"):
        if engine == "cuda":
            pytest.skip("has no engine parameter: it ran as cpu")
        run(kind, method, ())
        return
    assert kind.param_names == ("shape", "groups", "dtype", "layout", "engine")
    if engine not in kind.params[-1]:
        pytest.skip(f"measures nothing of {engine}")
    shapes = {tiny(shape) for shape in kind.params[0]}
    for parameters in itertools.product(shapes, *kind.params[1:-1], [engine]):
        if kind.__name__ == "SecondOrder" and parameters[2] in ("float16", "bfloat16") and not EVERYTHING:
            continue  # kernels of its own
        try:
            run(kind, method, parameters)
        except SkipNotImplemented as reason:
            assert engine == "cuda"
            pytest.skip(str(reason))
        except Exception as error:
            error.add_note(f"parameters: {parameters}")
            raise


def test_all_that_is_promised_is_measured():
    measured = {method for _, method in (p.values for p in BENCHMARKS)}
    assert {"time_forward", "time_backward", "time_forward_and_backward", "timeraw_import_cugn"} <= measured
    assert {"track_forward_error", "track_backward_error", "peakmem_forward", "peakmem_backward"} <= measured
    for kind, _ in (p.values for p in BENCHMARKS):
        if hasattr(kind, "params"):  # the tiny shapes have 32 channels, whatever the real ones have
            assert all(shape[1] % groups == 0 for shape in kind.params[0] for groups in kind.params[1])


def test_configuration_names_what_is_there():
    root = Path(benchmarks.__file__).parent.parent
    configuration = json.loads((root / "asv.conf.json").read_text())
    assert (root / configuration["benchmark_dir"] / "__init__.py").is_file()
    assert (root / configuration["repo"] / "pyproject.toml").is_file()


def test_features_prints_a_table(capsys, monkeypatch):
    import features

    if not EVERYTHING:
        monkeypatch.setattr(features, "FEATURES", [name for name in features.FEATURES if name != "gelu"])
    features.main(["--quick", "--rounds", "1"])
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| small")]
    assert len(rows) == 4  # two layouts, two passes
    assert all(float(cell) > 0 for row in rows for cell in row[4:-1])
    assert "Above 1.5 (labels, masks) or 1.25 (relu, silu):" in printed


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_files_prints_a_table(capsys, tmp_path, monkeypatch):
    import files

    monkeypatch.setattr("sys.argv", ["files.py", "--gigabytes", "0.002", "--rounds", "1", "--folder", str(tmp_path)])
    files.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == ["source", "cold", "warm"]
    assert list(tmp_path.iterdir()) == []


def test_row_order_prints_a_table(capsys):
    import row_order

    usual = row_order.geometry.TOUCHED_FROM
    row_order.main(["--quick", "--rounds", "1"])
    assert usual == row_order.geometry.TOUCHED_FROM
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1:4] == [" 1 × 4 × 4 × 64 ", " float32 ", " 0.0 "]
    assert len(row) == 9
    assert all(float(cell) > 0 for cell in row[4:-1])
