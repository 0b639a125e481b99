"""From the type of the arrays to the engine that serves them, importing nothing that the caller has not imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from .overlap import check_out
from .plan import OPERANDS, ROLES, Groups, Plan, Spec, axes_key, checked_eps, groups_key

__all__ = ["dispatch", "resolve"]

ENGINES = {"numpy": "cugn.cpu", "cupy": "cugn.cuda", "dask": "cugn.dask"}
"""Engine of each array library; every other library of the array API standard is served by ``cugn.reference``."""

_REPLACEABLE = {
    operation: 1 + sum(ROLES[name] == "like x" for name in names[:-1]) if names[-1] == "out" else 0
    for operation, names in OPERANDS.items()
}
"""How many arrays, x first, the `out` of an operation may be; 0 where it has none."""

_recent: Any = None
"""Calls on NumPy arrays that are known again (`cpu/recent.py`).

From the first call on: a process that is forked while another thread loads a kernel cannot load any itself.
"""


def dispatch(
    operation: str,
    arrays: tuple[Any, ...],
    groups: Any,
    eps: float,
    channel_axis: int,
    batch_axis: Any,
    activation: str | None,
) -> tuple[Any, Plan]:
    """Engine and plan of one call whose arrays are x and then those of OPERANDS, None for what is not given.

    All errors about types, shapes, dtypes and `out` are raised here.
    """
    global _recent
    call = (*arrays, operation, channel_axis, batch_axis, activation, eps)
    if type(groups) is not int:
        groups = groups_key(groups)
    # an int by its value, labels by the address of their key, which stays the same object; ints below 1 are errors
    known_by = groups if type(groups) is int else -id(groups)
    plain = type(eps) is float and (type(groups) is not int or groups > 0)
    if plain and _recent is not None:
        plan, apart = _recent.find(call, known_by, _REPLACEABLE[operation])
        if plan is not None:
            if not apart:
                _check_out(operation, arrays)
            return sys.modules["cugn.cpu"], plan
    operands = tuple(zip(OPERANDS[operation], arrays[1:], strict=True))
    engine, plan = resolve(operation, arrays[0], groups, operands, eps, channel_axis, batch_axis, activation)
    _check_out(operation, arrays)
    if plain and engine.__name__ == "cugn.cpu":
        _recent = import_module("cugn.cpu.recent").recent()
        if _recent is not None:
            _recent.enter(plan, call, known_by, groups)
    return engine, plan


def _check_out(operation: str, arrays: tuple[Any, ...]) -> None:
    """Raise ValueError unless `out` may be written while the others are read."""
    count = _REPLACEABLE[operation]
    if count and arrays[-1] is not None:
        named = tuple(zip(("x", *OPERANDS[operation]), arrays[:-1], strict=False))
        check_out(arrays[-1], named[:count], named[count:])


def resolve(
    operation: str,
    x: Any,
    groups: Any,
    operands: Sequence[tuple[str, Any]],
    eps: float,
    channel_axis: int,
    batch_axis: Any,
    activation: str | None,
) -> tuple[Any, Plan]:
    """Engine and plan of one call; all its errors about types, shapes and dtypes are raised here.

    Only the types, shapes, strides and dtypes matter, so calls alike get the same plan from a cache: 1 us instead of
    30 us, which is what makes small calls cheap.
    """
    return _resolve(
        operation,
        spec_of(x),
        groups if type(groups) is int else groups_key(groups),
        tuple([(name, spec_of(array)) for name, array in operands if array is not None]),
        eps if type(eps) is float else checked_eps(eps),
        channel_axis if type(channel_axis) is int else axes_key(channel_axis, "channel_axis"),
        batch_axis if type(batch_axis) is int else axes_key(batch_axis, "batch_axis"),
        activation if activation is None else str(activation),
    )


def spec_of(array: Any) -> tuple[Any, ...]:
    """Fields of the Spec of an array, as a plain tuple (a named one would cost 0.3 us for each array)."""
    kind = type(array)
    if kind is np.ndarray:
        return (kind, array.shape, array.dtype, array.strides)
    if isinstance(array, np.memmap):  # a view of a file is an ordinary array
        return (np.ndarray, array.shape, array.dtype, array.strides)
    if kind.__module__ == "cupy" and issubclass(kind, sys.modules["cupy"].ndarray):
        return (kind, array.shape, array.dtype, array.strides, array.data.device_id)
    strides = getattr(array, "strides", None)
    return (
        kind,
        getattr(array, "shape", None),
        getattr(array, "dtype", None),
        strides if isinstance(strides, tuple) else None,
    )


@lru_cache(maxsize=1024)
def _resolve(
    operation: str,
    x: tuple[Any, ...],
    groups: Groups,
    operands: tuple[tuple[str, tuple[Any, ...]], ...],
    eps: float,
    channel_axis: int,
    batch_axis: int | tuple[int, ...] | None,
    activation: str | None,
) -> tuple[Any, Plan]:
    library = library_of("x", x[0])
    for name, spec in operands:
        other = library_of(name, spec[0])
        # A Dask array may be joined by small arrays of the library of its chunks.
        if other != library and not (library == "dask" and other in ("numpy", "cupy") and name not in ("dy", "tx")):
            raise TypeError(f"{name} is from {other} and x from {library}: all arrays must be of one library")
        if name == "out" and library in ("dask", "jax"):
            raise TypeError(f"out is from {library}, whose arrays are not written in place: leave it out")
        device, home = Spec(*spec).device, Spec(*x).device
        if None not in (device, home) and device != home:
            raise ValueError(f"{name} is on device {device} and x on device {home}: all arrays must be on one device")
    plan = Plan.of(
        Spec(*x),
        groups,
        [(name, Spec(*spec)) for name, spec in operands],
        eps=eps,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        activation=activation,
    )
    engine = import_module(ENGINES.get(library, "cugn.reference"))
    # Empty arrays and those in the other byte order go to the reference: no compiled loop has to think of them. (Of
    # what is empty on a GPU the engine makes the results, without a kernel.)
    swapped = library == "numpy" and not all(spec[2].isnative for spec in (x, *(spec for _, spec in operands)))
    if (plan.size == 0 and library not in ("dask", "cupy")) or swapped or not engine.serves(plan, operation):
        engine = import_module("cugn.reference")
    return engine, plan


@lru_cache(maxsize=256)
def library_of(name: str, kind: type) -> str:
    """Name of the array library of a type.

    Raises
    ------
    TypeError
        For anything that is not an array, or an array with a meaning beyond its values (masked, with units).
    """
    if kind is np.ndarray:
        return "numpy"
    if issubclass(kind, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: pass {name}.data, and the valid elements as where=~mask")
    if issubclass(kind, np.ndarray):
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__name__}, whose meaning would be lost: pass np.asarray({name})"
        )
    module = kind.__module__.partition(".")[0]
    if module == "cupy" and issubclass(kind, sys.modules["cupy"].ndarray):
        return "cupy"
    dask = sys.modules.get("dask.array")
    if dask is not None and issubclass(kind, dask.Array):
        return "dask"
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(kind, torch.Tensor):
        return "torch"
    if issubclass(kind, np.generic) or module == "sparse" or not hasattr(kind, "__array_namespace__"):
        raise TypeError(
            f"{name} is of type {kind.__qualname__}: it must be a NumPy, CuPy or Dask array, "
            "or another dense array of the Python array API standard"
        )
    return "jax" if module == "jaxlib" else module
