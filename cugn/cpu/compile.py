"""How the engine's functions are compiled: inner ones are inlined into kernels, a kernel is entered from Python by int64 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Callable[..., Any]) -> Any:
    """A function that only kernels call: compiled for the types that come, without a Python entry."""
    return numba.njit(**_OPTIONS)(function)
