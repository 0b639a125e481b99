"""Array libraries as the tests use them: arrays from NumPy's, and back; and why one is not here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cugn
import cugn.reference
from cugn import engines, functional
from cugn.cpu import recent

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ("float16", "bfloat16", "float32", "float64")
EVERYTHING = os.environ.get("CUGN_TESTS") == "all"
"""Whether cases run that need kernels of their own: the compiler takes a second or two for each of the CPU engine's."""


def is_rare(dtype: str, labels: bool = False, masks: bool = False, strides: bool = False) -> bool:
    """For rare(when=...): the 16-bit types, which differ in how elements are converted, share what has its own loops.

    bfloat16 meets masks and strides, float16 labels; together they are met in float32 and float64.
    """
    return (dtype == "float16" and (masks or strides)) or (dtype == "bfloat16" and labels)


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy dtype of a name, bfloat16 included."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class Library:
    """An array library: its arrays from NumPy's, and back."""

    name: str
    array: Callable[[Any], Any]
    numpy: Callable[[Any], np.ndarray]
    floats: tuple[str, ...] = FLOATS
    writable: bool = True


def _numpy() -> Library:
    return Library("numpy", np.array, np.asarray)


def _array_api_strict() -> Library:
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    return Library("array_api_strict", lambda a: strict.asarray(np.array(a)), np.asarray, ("float32", "float64"))


def _torch() -> Library:
    torch = _imported("torch")

    def array(a: Any) -> Any:
        a = np.array(a)
        if a.dtype == BFLOAT16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    def numpy(a: Any) -> np.ndarray:
        return a.view(torch.int16).numpy().view(BFLOAT16) if a.dtype == torch.bfloat16 else a.numpy()

    return Library("torch", array, numpy)


def _jax() -> Library:
    jax = _imported("jax")
    jax.config.update("jax_enable_x64", True)
    return Library("jax", lambda a: jax.numpy.asarray(np.array(a)), np.asarray, writable=False)


def _cupy() -> Library:
    cupy = _imported("cupy")
    if not cupy.is_available():
        pytest.skip("cupy: no CUDA device")
    return Library("cupy", cupy.array, cupy.asnumpy)


def _imported(name: str) -> Any:
    with warnings.catch_warnings():  # their own imports may warn
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


LIBRARIES = {
    "numpy": _numpy,
    "array_api_strict": _array_api_strict,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
}


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve every call by `cugn.reference`."""
    monkeypatch.setattr(functional, "dispatch", lambda *call: (cugn.reference, engines.dispatch(*call)[1]))


def forget_plans() -> None:
    """Let the next call of each kind be planned anew, as the first one was."""
    engines._resolve.cache_clear()
    engines._recent = None
    recent.recent.cache_clear()


def subprocess_environment(**variables: str) -> dict[str, str]:
    """Environment of a child that imports the cugn under test."""
    path = os.pathsep.join(p for p in (str(Path(cugn.__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, **variables}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the CPU engine use `count` threads."""
    if not hasattr(cugn, "set_num_threads"):
        yield  # no compiled engine here: the reference has one thread
        return
    before = cugn.get_num_threads()
    cugn.set_num_threads(count)
    try:
        yield
    finally:
        cugn.set_num_threads(before)
