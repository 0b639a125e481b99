"""Promise: wheel and sdist hold all that they must, and the wheel works by itself, outside the source tree."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from libraries import subprocess_environment

import cugn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cugn"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist, and the wheel that is built from it."""
    pytest.importorskip("build", reason="build is not installed")
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests do not run beside the source tree here")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def sources() -> set[str]:
    """Files of the package that git would not ignore."""
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".nbi", ".nbc")
    }


def test_wheel_holds_the_package_whole(built: tuple[Path, Path]) -> None:
    """Every module, the CUDA sources and py.typed; the licence; nothing else."""
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    inside = {name for name in names if name.startswith("cugn/")}
    assert inside == sources()
    assert "cugn/py.typed" in inside
    assert any(name.endswith(".cu") for name in inside)
    assert any(name.endswith(".cuh") for name in inside)
    rest = {name.partition("/")[2] for name in names - inside}
    assert rest == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"} | (rest & {"entry_points.txt"})


def test_metadata(built: tuple[Path, Path]) -> None:
    """Version, licence, Python and the extras that the docs name."""
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
        (name,) = (n for n in wheel.namelist() if n.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: true" in wheel.read(name)
    assert metadata["Version"] == cugn.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"cuda12", "cuda13", "dask", "test", "docs", "bench", "examples", "conformance"} <= extras
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    names = {r.split(">")[0].strip().replace("_", "-") for r in required}
    assert names == {"numpy", "numba", "array-api-compat", "ml-dtypes"}


def test_sdist_holds_what_a_packager_needs(built: tuple[Path, Path]) -> None:
    """Sources, tests, docs, the build's own files; the tests in it are those of the tree."""
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert sources() <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert {str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("*.py")} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".git/")]


def test_the_wheel_works_by_itself(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Unpacked elsewhere, with the tree out of reach: forward and backward give the right values."""
    site = tmp_path / "site"
    shutil.unpack_archive(built[1], site, format="zip")
    program = (
        "import numpy as np, cugn, pathlib, sys\n"
        f"assert pathlib.Path(cugn.__file__).is_relative_to({str(site)!r}), cugn.__file__\n"
        "x = np.random.default_rng(0).normal(3, 2, (2, 8, 50)).astype('f4')\n"
        "y, mean, rstd = cugn.group_norm_forward(x, 4)\n"
        "parts = x.astype(float).reshape(2, 4, -1)\n"
        "hat = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)\n"
        "assert abs(y - hat.reshape(x.shape)).max() < 1e-5\n"
        "assert abs(cugn.group_norm_backward(x, x, 4, mean=mean, rstd=rstd).dx).max() < 1e-3\n"
        "print(cugn.__version__)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**subprocess_environment(), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == cugn.__version__
