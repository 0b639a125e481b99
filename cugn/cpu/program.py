"""What a kernel is compiled for (`Kind`), and what it is made of (`Program`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

GATES = ("silu", "gelu", "gelu_tanh")
"""Activations whose slope changes with z."""


class Kind(NamedTuple):
    """What a kernel is compiled for; everything else is in the words of a geometry."""

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


class Program(NamedTuple):
    """A kernel by its parts; `helpers.entry_of` makes one native function of them."""

    start: Callable[..., Any]
    """start(geometry, call, arrays by their ids ...): their addresses into the call; returns the first phase."""
    run_chunk: Any
    """run_chunk(phase, geometry, call, task, chunk, store, scratch)."""
    finish: Any
    """finish(phase, geometry, call, task, store, scratch), after each phase of a task but the last."""
    last: int
    """The last phase."""
    gradients: bool = False
    """Whether dweight and dbias are gathered at the end."""
