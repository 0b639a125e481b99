"""How the terms of a sum in float64 lanes are added: plainly, with what the roundings lose, or in any order."""

from __future__ import annotations

from functools import cache
from typing import Any

from .compile import inner
from .convert import loader, storer
from .simd import fma, rounding, splat
from .units import from_units, in_units, no_units, product_in_units

_load64, _ = loader("float64", "float64")
_store64, _, _ = storer("float64", "float64")


@inner
def add_kept(total: Any, lost: Any, term: Any) -> Any:
    """One term more, and what that loses of the sum."""
    moved = total + term
    return moved, lost + rounding(total, term, moved)


@inner
def add_to(total: int, lost: int, term: Any) -> None:
    """Add a vector to one in memory, what the sum loses to another."""
    before = _load64(total)
    moved = before + term
    _store64(lost, _load64(lost) + rounding(before, term, moved))
    _store64(total, moved)


@cache
def adder(exact: bool, ordered: bool = True) -> tuple[Any, Any, Any]:
    """begin() -> a sum of nothing; add(state, a, b, large): a*b more; total(state, terms, large).

    `exact`: with what the additions lose. Not `ordered`: the same bits in any order of the terms. Each is then rounded
    to the last digit of `large` (`units.in_units`), and what that leaves, if it counts, to its last but 52.
    """
    if ordered:

        @inner
        def begin() -> Any:
            return splat(0.0), splat(0.0)

        @inner
        def add(state: Any, a: Any, b: Any, large: Any) -> Any:
            total, lost = state
            if exact:
                return add_kept(total, lost, a * b)
            return fma(a, b, total), lost

        @inner
        def total_of(state: Any, terms: int, large: Any) -> Any:
            return state[0] + state[1] if exact else state[0]

        return begin, add, total_of

    @inner
    def begin_units() -> Any:
        return no_units(), no_units()

    @inner
    def add_units(state: Any, a: Any, b: Any, large: Any) -> Any:
        units, rests = state
        if exact:
            term = a * b
            rest = term - ((term + large) - large)
            return units + in_units(term, large), rests + in_units(rest, large * splat(2.0**-52))
        return units + product_in_units(a, b, large), rests

    @inner
    def total_of_units(state: Any, terms: int, large: Any) -> Any:
        total = from_units(state[0], terms, large)
        return total + from_units(state[1], terms, large * splat(2.0**-52)) if exact else total

    return begin_units, add_units, total_of_units
