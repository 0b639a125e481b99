"""A few of many combinations that meet what all of them meet, pair by pair.

What goes wrong with one value of an option mostly goes wrong with any of the others, and what needs two mostly needs no
third: where a test's dtypes, layouts and options are independent, it meets each pair of their values, and the whole
product under CUGN_TESTS=all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from heapq import heapify, heapreplace
from itertools import combinations, product
from typing import Any, TypeVar

import pytest
from libraries import EVERYTHING

T = TypeVar("T")


def covering(everything: Sequence[T], meets: Callable[[T], Collection[Hashable]]) -> list[T]:
    """Some of `everything`, which together meet all that there is to meet: again and again the one that adds most."""
    met = [frozenset(meets(one)) for one in everything]
    missing = set().union(*met)
    chosen = []
    # What one adds only becomes less, so the first whose number still holds adds most.
    heap = [(-len(new), i) for i, new in enumerate(met)]
    heapify(heap)
    while missing:
        adds, i = heap[0]
        now = -len(met[i] & missing)
        if now == adds:
            missing -= met[i]
            chosen.append(everything[i])
        heapreplace(heap, (now if now != adds else 0, i))
    return chosen


def pairwise(*factors: Sequence[Any]) -> list[Any]:
    """The product of `factors` for `pytest.mark.parametrize`, skipped but for rows that meet each pair of values."""
    rows = list(product(*(range(len(values)) for values in factors)))
    chosen = set(covering(rows, lambda row: list(combinations(enumerate(row), 2))))
    skipped = pytest.mark.skipif(not EVERYTHING, reason="each pair of values is met by others: set CUGN_TESTS=all")
    return [
        pytest.param(
            *(values[i] for values, i in zip(factors, row, strict=True)), marks=() if row in chosen else skipped
        )
        for row in rows
    ]
