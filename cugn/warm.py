"""Kernels of the CPU engine made before they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import functional, threads
from .plan import ACTIVATIONS, FLOATS, INTEGERS
from .progress import Progress

__all__ = ["warmup"]

Array = Any
Call = Callable[[], object]

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
        "operations": _listed("operations", operations, tuple(_CALLS)),
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
        with_mask = masks and operation in _WITH_MASK
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
    made = {"x": _zeros(shape, dtype)}
    made["dy"] = _zeros(shape, "float32" if dtype in INTEGERS else dtype)
    if layout == "strided":
        made = {name: np.repeat(array, 2, -1)[..., ::2] for name, array in made.items()}
    where = np.ones(shape, bool) if masked else None
    # tables do large groups otherwise than small ones
    for G in (1, C // 8) if layout == "table" else (2,):
        groups: Any = list(np.arange(C) % G) if labelled else G
        statistics = np.zeros((shape[0], G)), np.ones((shape[0], G))
        options = {"channel_axis": axis, "activation": activation, "where": where}
        yield from _CALLS[operation](made["x"], made["dy"], groups, statistics, options)


def _forward(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    yield lambda: functional.group_norm(x, groups, **options)


def _backward(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    mean, rstd = statistics
    yield lambda: functional.group_norm_backward(dy, x, groups, **options)
    yield lambda: functional.group_norm_backward(dy, x, groups, mean=mean, rstd=rstd, **options)


def _jvp(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    yield lambda: functional.group_norm_jvp(dy, x, groups, **options)


def _double_backward(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    yield lambda: functional.group_norm_double_backward(dy, dy, x, groups, **options)


def _moments(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    yield lambda: functional.moments(x, groups, channel_axis=options["channel_axis"], where=options["where"])


def _normalize(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    mean, rstd = statistics
    rest = {name: options[name] for name in ("channel_axis", "activation")}
    yield lambda: functional.normalize(x, mean, rstd, groups, **rest)


def _backward_sums(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    mean, rstd = statistics
    rest = {name: options[name] for name in ("channel_axis", "activation")}
    yield lambda: functional.backward_sums(dy, x, mean, rstd, groups, **rest)


def _backward_apply(x: Array, dy: Array, groups: Any, statistics: Any, options: dict[str, Any]) -> Iterator[Call]:
    mean, rstd = statistics
    yield lambda: functional.backward_apply(dy, x, mean, rstd, mean, rstd, groups, **options)


_CALLS: dict[str, Callable[..., Iterator[Call]]] = {
    "forward": _forward,
    "backward": _backward,
    "jvp": _jvp,
    "double_backward": _double_backward,
    "moments": _moments,
    "normalize": _normalize,
    "backward_sums": _backward_sums,
    "backward_apply": _backward_apply,
}
_OF_INTEGERS = ("forward", "moments", "normalize")
_WITH_MASK = ("forward", "backward", "jvp", "double_backward", "moments", "backward_apply")
