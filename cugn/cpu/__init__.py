"""The CPU engine: Numba-compiled loops for NumPy arrays.

A call goes `calls.py` (what a plan needs, prepared once) -> `geometry.py` (how the arrays are cut) -> a kernel:
`schedule.py` hands out the work, `kernel_forward.py` and `kernel_backward.py` say what it is, on the vectors of
`simd.py`.
"""

from __future__ import annotations

from ..plan import Plan
from .calls import backward, forward

__all__ = ["backward", "forward", "serves"]


def serves(plan: Plan, operation: str) -> bool:
    """Whether a compiled path exists for this call; the reference takes the others."""
    return operation in ("forward", "backward") and plan.labels is None and not plan.masked and plan.activation is None
