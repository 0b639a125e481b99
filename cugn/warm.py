"""Kernels of the CPU engine made before they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import functional, threads
from .plan import ACTIVATIONS, FLOATS, INTEGERS, OPERANDS, ROLES
from .progress import Progress

__all__ = ["warmup"]

Call = Callable[..., object]

LAYOUTS = ("channels_first", "channels_last", "table", "strided")
C = 64


def warmup(
    dtypes: str | Sequence[str] = "float32",
    operations: str | Sequence[str] = ("forward", "backward"),
    layouts: str | Sequence[str] = ("channels_first", "channels_last", "table"),
    *,
    activations: str | Sequence[str | None] | None = None,
    labels: bool = False,
    masks: bool = False,
    progress: bool = False,
) -> int:
    """Load the kernels for NumPy arrays now, compiling those that are not on disk yet, and start the threads.

    Else the first call of its kind does that: half a second with a warm cache, some seconds with a cold one. Shapes do
    not matter, with these exceptions, which have kernels of their own: the gradients of groups of at most 32 elements
    in arrays that are no tables, and those for float64 weights of narrower arrays. On a GPU the sizes do matter: call
    once with arrays of yours.

    Parameters
    ----------
    dtypes : str or sequence of str, optional
        Of x: float16, bfloat16, float32, float64, int8, uint8, int16, uint16 (the integers in the forward, in moments
        and in normalize).
    operations : str or sequence of str, optional
        Of "forward", "backward", "jvp", "double_backward", "moments", "normalize", "backward_sums", "backward_apply".
    layouts : str or sequence of str, optional
        Of "channels_first", "channels_last", "table" (N, C), "strided" (any other strides).
    activations : None, str or sequence of them, optional
        As in `group_norm`.
    labels : bool, optional
        Also with groups by labels.
    masks : bool, optional
        Also with `where`, for the operations that have one.
    progress : bool, optional
        Show progress on standard error.

    Returns
    -------
    int
        How many kernels were loaded or compiled; 0 where all of them were there.

    Raises
    ------
    ValueError
        For a name that is none of these.
    MemoryError
        Where there is not enough memory to compile.

    Examples
    --------
    >>> import cugn
    >>> made = cugn.warmup("float32", "forward", "channels_first")
    >>> cugn.warmup("float32", "forward", "channels_first")
    0
    """
    from .cpu.calls import kernels_loaded

    chosen = {
        "dtypes": _listed("dtypes", dtypes, FLOATS + INTEGERS),
        "operations": _listed("operations", operations, tuple(_FUNCTIONS)),
        "layouts": _listed("layouts", layouts, LAYOUTS),
        "activations": _listed("activations", activations, ACTIVATIONS),
    }
    before = kernels_loaded()
    calls: list[Call] = []
    for dtype, operation, layout, activation in itertools.product(*chosen.values()):
        if dtype in INTEGERS and operation not in _OF_INTEGERS:
            continue
        if operation == "moments" and activation != chosen["activations"][0]:
            continue
        with_mask = masks and "where" in OPERANDS[operation]
        for labelled, masked in itertools.product([False, True][: 1 + labels], [False, True][: 1 + with_mask]):
            calls += _calls(operation, dtype, layout, activation, labelled, masked)
    with Progress(progress, len(calls) + 1, "calls") as bar:
        for call in calls:
            call()
            bar.update(1)
        threads.start()
        bar.update(1)
    return kernels_loaded() - before


def _listed(name: str, given: Any, allowed: tuple[Any, ...]) -> tuple[Any, ...]:
    values = (given,) if given is None or isinstance(given, str) else tuple(given)
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} holds {value!r}: it must be one of {', '.join(map(repr, allowed))}")
    if not values:
        raise ValueError(f"{name} is empty: at least one of {', '.join(map(repr, allowed))}")
    return values


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        import ml_dtypes  # 10 ms, which an import of cugn has no need of

        return np.zeros(shape, ml_dtypes.bfloat16)
    return np.zeros(shape, dtype)


def _calls(
    operation: str, dtype: str, layout: str, activation: str | None, labelled: bool, masked: bool
) -> Iterator[Call]:
    """Calls that meet every kernel of a kind, with the statistics that a backward may be given and without."""
    shape, axis = {
        "channels_first": ((2, C, 64), 1),
        "channels_last": ((2, 64, C), -1),
        "table": ((32, C), 1),
        "strided": ((2, C, 64), 1),
    }[layout]
    x, like_x = _zeros(shape, dtype), _zeros(shape, "float32" if dtype in INTEGERS else dtype)
    if layout == "strided":
        x, like_x = (np.repeat(array, 2, -1)[..., ::2] for array in (x, like_x))
    # tables do large groups otherwise than small ones
    for G in (1, C // 8) if layout == "table" else (2,):
        by_role = {"like x": like_x, "statistics": np.ones((shape[0], G))}
        if masked:
            by_role["mask"] = np.ones(shape, bool)
        arrays = {name: by_role[ROLES[name]] for name in OPERANDS[operation] if ROLES[name] in by_role}
        arrays.pop("out", None)
        options: dict[str, Any] = {"groups": list(np.arange(C) % G) if labelled else G, "channel_axis": axis}
        if operation != "moments":
            options["activation"] = activation
        function = _FUNCTIONS[operation]
        yield partial(function, x=x, **arrays, **options)
        if operation == "backward":
            yield partial(function, x=x, **{**arrays, "mean": None, "rstd": None}, **options)


_FUNCTIONS: dict[str, Call] = {
    "forward": functional.group_norm,
    "backward": functional.group_norm_backward,
    "jvp": functional.group_norm_jvp,
    "double_backward": functional.group_norm_double_backward,
    "moments": functional.moments,
    "normalize": functional.normalize,
    "backward_sums": functional.backward_sums,
    "backward_apply": functional.backward_apply,
}
_OF_INTEGERS = tuple(
    operation for operation, names in OPERANDS.items() if not any(ROLES[n] == "like x" for n in names if n != "out")
)
