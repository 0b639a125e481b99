"""Promise: `import cugn` is light (no Numba, CuPy, Dask or array library but NumPy), and so are errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from libraries import subprocess_environment

HEAVY = ("numba", "llvmlite", "cupy", "dask", "array_api_compat", "ml_dtypes", "torch", "jax", "scipy", "cugn.dask")


def modules_after(program: str) -> set[str]:
    """Names in sys.modules of a fresh process after a program."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}\nimport sys; print('\\n'.join(sys.modules))"],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("program", ["import cugn", "from cugn import *", "import cugn.functional, cugn.family"])
def test_import_is_light(program: str) -> None:
    """Neither of the heavy packages is imported."""
    modules = modules_after(program)
    assert "numpy" in modules
    assert not modules & set(HEAVY)
    assert not modules & {"cugn.cpu.calls", "cugn.cuda", "cugn.reference"}


def test_a_call_on_numpy_arrays_imports_no_other_library() -> None:
    """A call on NumPy arrays needs Numba; CuPy, Dask and torch stay outside."""
    modules = modules_after("import numpy, cugn; cugn.group_norm(numpy.ones((2, 4, 3), 'f4'), 2)")
    assert not modules & {"cupy", "dask", "torch", "jax", "cugn.cuda", "cugn.dask"}


def test_errors_need_no_engine() -> None:
    """A wrong call is refused before an engine is imported."""
    modules = modules_after(
        "import numpy, cugn\n"
        "try: cugn.group_norm(numpy.ones((2, 4)), 3)\n"
        "except ValueError: pass\n"
        "else: raise SystemExit(1)"
    )
    assert not modules & set(HEAVY)


def test_cupy_and_dask_are_recognised_without_importing_them() -> None:
    """With CuPy and Dask unimportable, everything for NumPy works."""
    modules_after(
        "import sys\nfor name in ('cupy', 'dask', 'torch', 'jax', 'xarray'): sys.modules[name] = None\n"
        "import numpy, cugn; y = cugn.group_norm_forward(numpy.ones((2, 4, 3), 'f4'), 2)\n"
        "cugn.group_norm_backward(y.y, y.y, [0, 1, 1, 0], where=y.y == 0, activation='gelu')"
    )
