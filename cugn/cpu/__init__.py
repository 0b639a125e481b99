"""The CPU engine: Numba-compiled loops for NumPy arrays.

A call goes `calls.py` (what a plan needs, prepared once) -> `geometry.py` (how the arrays are cut) -> a kernel:
`schedule.py` hands out the work, `kernel_forward.py` and `kernel_backward.py` say what it is, on the vectors of
`simd.py`.
"""

from __future__ import annotations

from typing import Any

from ..plan import Plan

__all__ = ["backward", "forward", "serves"]

Array = Any


def serves(plan: Plan, operation: str) -> bool:
    """Whether a compiled path exists for this call; the reference takes the others."""
    return operation in ("forward", "backward") and plan.labels is None and not plan.masked and plan.activation is None


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output, mean and rstd."""
    from .calls import forward as call

    return call(plan, x, weight, bias, out)


def backward(
    plan: Plan, dy: Array, x: Array, weight: Array, bias: Array, mean: Array, rstd: Array, where: Array, out: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias."""
    from .calls import backward as call

    return call(plan, dy, x, weight, bias, mean, rstd, out)
