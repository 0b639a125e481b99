"""What an operation consists of: its phases, and the kernels, compiled one by one, that they are made of.

A phase goes over the chunks of a task with one kernel and may finish the task with another. Kernels are for dtypes,
layouts and activations; an operation is a table of their addresses (`entries.py`), so that operations share them: the
moments of a forward, a backward and a jvp, under any activation, are one kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

GATES = ("silu", "gelu", "gelu_tanh")
"""Activations whose slope changes with z."""


def keeps_dz(compute: str, activation: str | None, masked: bool) -> bool:
    """Whether a backward makes dz once, where it has room to keep it, and not in both of its phases."""
    return compute == "float32" and activation in GATES and not masked


class Kind(NamedTuple):
    """What the kernels of a call are compiled for; everything else is in the words of a geometry."""

    x: str
    """dtype of x."""
    y: str
    """dtype of the other large arrays: y, dy, dx, tangents."""
    compute: str
    """dtype of the lanes."""
    activation: str | None
    by_rows: bool
    """Coefficients element by element of a row; else channels are runs."""
    dense: bool
    """Arrays are known to be used in place; else their geometry says it."""
    labelled: bool
    masked: bool
    table: bool = False
    """One row a sample, done group by group."""
    lanes: bool = False
    """Sixteen of them at a time."""


class Kernel(NamedTuple):
    """A native function of its own: kernel(geometry, call, task, chunk, store, scratch).

    `factory(*options)` in that module of the engine makes its Python function.
    """

    module: str
    factory: str
    options: tuple[Any, ...]


class Phase(NamedTuple):
    """One pass over the chunks of a task."""

    run: Kernel | None
    """What is done with each chunk."""
    finish: Kernel | None = None
    """What follows when all chunks of the task are done, with -1 in the place of a chunk."""


def _moments(kind: Kind) -> Phase:
    """Moments of each group, then records of them."""
    if kind.table:
        return Phase(Kernel("table", "moments_sample", (kind.x, kind.compute)))
    options = (kind.x, kind.compute, kind.by_rows, kind.dense, kind.labelled, kind.masked)
    if kind.compute == "float64":  # which may have to go over the chunks again: one kernel, with the loops in it once
        both = Kernel("groups", "moments_kernel", options)
        return Phase(both, both)
    finish = Kernel("groups", "moments_finish", (kind.labelled, kind.masked))
    return Phase(Kernel("groups", "moments_chunk", options), finish)


def _loops(kind: Kind) -> tuple[Any, ...]:
    """What the loops over a chunk's elements are compiled for."""
    return (kind.x, kind.y, kind.compute, kind.activation, kind.by_rows, kind.dense)


def _apply(kind: Kind) -> Phase:
    if kind.table:
        return Phase(Kernel("table", "apply_sample", (kind.x, kind.y, kind.compute, kind.activation)))
    return Phase(Kernel("forward_phases", "apply_chunk", _loops(kind)))


def _gradient(kind: Kind) -> tuple[Kernel, Kernel]:
    """Of a chunk: sums, dx.

    Rows have their groups in their coefficients. Runs that looked theirs up, as the forward's do, took 1.07 of the
    time for channels of 49 elements (medians of six runs, 1.05 to 1.15; AVX2).
    """
    options = (*_loops(kind), kind.labelled and not kind.by_rows, kind.masked)
    return Kernel("backward_phases", "sums_chunk", options), Kernel("backward_phases", "dx_chunk", options)


def _block(module: str, factory: str, *options: Any) -> list[Phase]:
    """All phases at once."""
    return [Phase(Kernel(module, factory, options))]


def forward(kind: Kind) -> list[Phase]:
    """x is read twice and y written once; a group that fits in cache is read from memory once."""
    if kind.lanes:
        return _block("lane_phases", "forward_block", *kind[:4], kind.labelled, kind.masked)
    if kind.table:
        return _block("table", "forward_sample", *kind[:4])
    return [_moments(kind), _apply(kind)]


def moments(kind: Kind) -> list[Phase]:
    """The forward's first phase alone."""
    if kind.lanes:
        return _block("lane_phases", "moments_block", kind.x, kind.y, kind.labelled, kind.masked)
    return [_moments(kind)]


def normalize(kind: Kind) -> list[Phase]:
    """The forward's second phase, with records of the statistics that were given."""
    if kind.lanes:
        return _block("lane_phases", "normalize_block", *kind[:4], kind.labelled)
    return [Phase(None, Kernel("groups", "given_finish", (kind.compute,))), _apply(kind)]


def backward(kind: Kind, given: bool) -> list[Phase]:
    """Moments if they were not given, sums of dz and dz*x_hat, dx: dy and x are read twice and dx written once."""
    if kind.lanes:
        return _block("lane_backward", "backward_block", *kind[:4], kind.labelled, kind.masked)
    if kind.table:
        gradient = [Phase(Kernel("table", "backward_sample", (kind.x, kind.y, kind.compute, kind.activation)))]
    else:
        gated = kind.compute == "float64" and kind.activation in GATES
        finish = Kernel("backward_phases", "sums_finish", (kind.compute, kind.labelled, kind.masked, gated))
        sums, dx = _gradient(kind)
        gradient = [Phase(sums, finish), Phase(dx)]
    return gradient if given else [_moments(kind), *gradient]


def backward_sums(kind: Kind) -> list[Phase]:
    """The sums of a backward by themselves, with statistics that were given."""
    sums, _ = _gradient(kind)
    return [Phase(sums, Kernel("backward_phases", "parts_sums", (kind.compute, kind.labelled)))]


def backward_apply(kind: Kind) -> list[Phase]:
    """The last phase of a backward, with statistics and the means of such sums that were given."""
    _, dx = _gradient(kind)
    return [Phase(None, Kernel("backward_phases", "parts_means", (kind.compute,))), Phase(dx)]


def tangent(kind: Kind, second: bool) -> list[Phase]:
    """Of a jvp, or of the double backward: moments, sums of products for each channel, linear combinations."""
    types, layout = kind[:3], (kind.by_rows, kind.masked)
    activation = kind.activation if second else None  # the slope itself is for the last phase
    run = Kernel("tangent_phases", "sums_chunk", (*types, activation, *layout, second))
    finish = Kernel("tangent_phases", "sums_finish", (activation in GATES, kind.labelled, second))
    apply = Kernel("tangent_phases", "apply_chunk", (*types, kind.activation, *layout, second))
    return [_moments(kind), Phase(run, finish), Phase(apply)]
