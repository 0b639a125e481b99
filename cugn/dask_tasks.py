"""What the tasks of a Dask graph compute, on the workers: calls on chunks, and the merging of their results.

An operand comes in a list where the blocks along a whole axis, of which there is one, belong to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from . import functional, threads
from .memory import result_like
from .parts import (
    Axes,
    ChannelSums,
    Part,
    PartSums,
    Statistics,
    gradient,
    gradient_sums,
    local_groups,
    merged,
    normalized,
    pick,
)

Array = Any


def _alone(block: Any) -> Any:
    while isinstance(block, list):
        (block,) = block
    return block


def item(block: Any, item: int) -> Array:
    return _alone(block)[item]


def cast_item(block: Any, item: int, to: Any) -> Array:
    with np.errstate(over="ignore"):
        return block[item].astype(to)


def attribute(block: Any, attribute: str) -> Array:
    return getattr(block, attribute)


def first(block: Any) -> Any:
    return block[0]


def last(block: Any) -> Any:
    return block[-1]


def merge_blocks(blocks: Sequence[Any], take: Any, finish: Any = None, *beside: Any) -> Any:
    result = merged(blocks if take is None else [take(block) for block in blocks])
    return result if finish is None else finish(result, *beside)


def statistics(part: Part, groups: Any, eps: float) -> Statistics:
    return part.statistics(eps, groups)


def total(part: Part, groups: Any) -> Any:
    return part.total(groups)


def given(count: Any, mean: Any, rstd: Any) -> Statistics:
    return Statistics.given(*map(_alone, (count, mean, rstd)))


def with_rstd(statistics: Statistics, rstd: Any) -> Statistics:
    return statistics.with_rstd(_alone(rstd))


def means(sums: PartSums, statistics: Statistics) -> tuple[Array, Array]:
    return sums.means(statistics.count)


def on_chunk(
    function: Any, names: Sequence[str], axes: Axes, options: dict[str, Any], x: Array, labels: Array, *arrays: Any
) -> Any:
    operands = dict(zip(names, map(_alone, arrays), strict=True))
    with threads.alone():
        return function(x, labels, axes, **operands, **options)


def normalized_block(x: Array, labels: Array, axes: Axes, **operands: Any) -> Array:
    return normalized(x, labels, axes, out=result_like(x), **operands)


def sums_block(x: Array, labels: Array, axes: Axes, dy: Array, **operands: Any) -> Any:
    return gradient_sums(dy, x, labels, axes, **operands)


def gradient_block(x: Array, labels: Array, axes: Axes, dy: Array, **operands: Any) -> Array:
    return gradient(dy, x, labels, axes, out=result_like(x), **operands)


def normalize_block(x: Array, labels: Array, axes: Axes, mean: Array, rstd: Array, **operands: Any) -> Array:
    present, groups, _ = local_groups(labels)
    mean, rstd = pick(mean, present), pick(rstd, present)
    return functional.normalize(x, mean, rstd, groups, out=result_like(x), **operands, **axes.keywords)


def moments_block(x: Array, labels: Array, axes: Axes, **operands: Any) -> Any:
    return tuple(functional.moments(x, local_groups(labels)[1], **operands, **axes.keywords))


def forward_block(x: Array, labels: Array, axes: Axes, **operands: Any) -> Any:
    groups = local_groups(labels)[1]
    return tuple(functional.group_norm_forward(x, groups, out=result_like(x), **operands, **axes.keywords))


def backward_block(x: Array, labels: Array, axes: Axes, dy: Array, **operands: Any) -> Any:
    operands = _wide(operands, x, labels)
    present, groups, _ = local_groups(labels)
    for name in {"mean", "rstd"} & operands.keys():
        operands[name] = pick(operands[name], present)
    dx, dweight, dbias = functional.group_norm_backward(dy, x, groups, out=result_like(x), **operands, **axes.keywords)
    return dx, _sums(dweight, dbias)


def jvp_block(x: Array, labels: Array, axes: Axes, tx: Array, **operands: Any) -> Array:
    groups = local_groups(labels)[1]
    return functional.group_norm_jvp(tx, x, groups, out=result_like(x), **operands, **axes.keywords)


def double_backward_block(x: Array, labels: Array, axes: Axes, ddx: Array, dy: Array, **operands: Any) -> Any:
    operands, groups = _wide(operands, x, labels), local_groups(labels)[1]
    grads = functional.group_norm_double_backward(ddx, dy, x, groups, **operands, **axes.keywords)
    return grads.gdy, grads.gx, _sums(grads.gweight, grads.gbias)


def _wide(operands: dict[str, Any], x: Array, labels: Array) -> dict[str, Any]:
    """Operands with a weight of at least float32, the dtype in which a block's gradients of the channels then come.

    Not of float64 for all: that would be another computation of dx, of other bits than the NumPy call has.
    """
    weight = operands.get("weight")
    kinds = {str(x.dtype), "" if weight is None else str(weight.dtype)}
    dtype = np.float64 if "float64" in kinds else np.float32
    weight = array_namespace(x).ones(len(labels), dtype=dtype) if weight is None else weight.astype(dtype)
    return {**operands, "weight": weight}


def _sums(dweight: Array, dbias: Array) -> ChannelSums:
    return ChannelSums(dweight.astype(np.float64), dbias.astype(np.float64))
