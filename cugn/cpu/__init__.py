"""The CPU engine: Numba-compiled loops for NumPy arrays.

A call goes `calls.py` (what a plan needs, prepared once) -> `geometry.py` (how the arrays are cut) and `phases.py`
(what is done with them) -> native code: `entries.py` takes the arrays, `schedule.py` hands out the work,
`*_phases.py` say what it is, on the vectors of `simd.py`.
"""

from __future__ import annotations

from ..plan import Plan
from .calls import backward, forward
from .parts import backward_apply, backward_sums, moments, normalize
from .tangents import double_backward, jvp

__all__ = [
    "backward",
    "backward_apply",
    "backward_sums",
    "double_backward",
    "forward",
    "jvp",
    "moments",
    "normalize",
    "serves",
]


def serves(plan: Plan, operation: str) -> bool:
    """Everything is served."""
    return True
