"""Sessions: every Python, both ends of the dependencies, wheel and sdist outside the tree, other suites."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lowest", "sdist"]

PYTHONS = ["3.11", "3.12", "3.13"]
# The lower ends that pyproject.toml names, and the oldest of the test extras that know them.
LOWEST = ["numpy==2.0.*", "numba==0.61.*", "array-api-compat==1.11.*", "ml_dtypes==0.5.0", "dask==2024.8.*"]
# What needs the source tree (examples, docs, benchmarks, builds) is tested in the tree, not beside an installed wheel.
OF_THE_TREE = ("examples", "docs", "asv", "peers", "wheel", "simt", "cuda", "example_digits", "claims", "readme")


def _outside(session: nox.Session) -> Path:
    """A copy of the tests without the package beside them."""
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "tests", ignore_errors=True)
    shutil.copytree("tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "gpu"))
    shutil.copytree("examples", folder / "examples", dirs_exist_ok=True)  # which tests of shards import
    shutil.copy("pyproject.toml", folder / "pyproject.toml")
    for name in OF_THE_TREE:
        for path in folder.glob(f"tests/test_{name}*.py"):
            path.unlink()
    return folder


def _test(session: nox.Session) -> None:
    folder = _outside(session)
    session.run("python", "-m", "pip", "list")
    with session.chdir(folder):
        session.run("python", "-c", "import cugn; assert 'site-packages' in cugn.__file__, cugn.__file__")
        session.run("python", "-m", "pytest", "-q", "tests", *session.posargs)


def _built(session: nox.Session, kind: str) -> str:
    """Path of the wheel or sdist, built here."""
    session.install("build")
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder), ".")
    (path,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return str(path)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Test the wheel with the newest dependencies."""
    session.install(f"{_built(session, 'wheel')}[test]")
    _test(session)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Test the wheel with the lowest dependencies that it names."""
    session.install(f"{_built(session, 'wheel')}[test]", *LOWEST)
    _test(session)


@nox.session(python=PYTHONS[0])
def sdist(session: nox.Session) -> None:
    """Test what the sdist installs."""
    session.install(f"{_built(session, 'sdist')}[test]")
    _test(session)


@nox.session(python=PYTHONS[0])
def conformance(session: nox.Session) -> None:
    """Run ONNX's and torch's own cases, and the calls of other libraries."""
    session.install(
        f"{_built(session, 'wheel')}[test,conformance]", "torch", "expecttest", "onnxruntime", "jax", "scipy"
    )
    session.install("scikit-learn", "flax", "keras")
    folder = _outside(session)
    with session.chdir(folder):
        session.run("python", "-m", "pytest", "-q", "tests/conformance", "tests/test_migration.py", *session.posargs)


@nox.session(python=PYTHONS[0])
def coverage(session: nox.Session) -> None:
    """Count the lines that no test runs; not in CI, since counting slows the compiling of the kernels by a third."""
    session.install("-e", ".[test,emulator,examples,docs,bench,conformance]")
    session.run("python", "-m", "pytest", "-q", "-n", "auto", "--cov=cugn", "--cov-report=", *session.posargs)
    session.run("python", "-m", "coverage", "report", "--skip-covered", "--fail-under=95")


@nox.session(python=PYTHONS[0])
def long(session: nox.Session) -> None:
    """Run all cases, those that need kernels of their own too, the random calls 20,000 times, a million for leaks."""
    session.install(".[test]")
    session.run(
        *("python", "-m", "pytest", "-q", *session.posargs),
        env={"CUGN_HYPOTHESIS_PROFILE": "long", "CUGN_SOAK_CALLS": "1000000", "CUGN_TESTS": "all"},
    )
