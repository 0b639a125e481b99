"""Arrays that no dense layout describes: worked on in dense copies of some groups of some samples, piece by piece.

Samples that are dense, of batch axes that cannot be run through as one, are copied whole and as they are: the bits of a
sample may not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..layout import Layout
from ..plan import INTEGERS, Plan
from .launches import added_rows
from .strided import copy, dtype_of

__all__ = ["Piece", "Statistics", "Sums", "pieces"]

Array = Any

PIECE_BYTES = 8 << 20
"""Arrays that no dense layout describes are copied in pieces of an eighth of x, or of this size if that is more."""


class Piece(NamedTuple):
    """Some groups of some samples, copied to dense arrays (n, outer, channels, inner)."""

    plan: Plan
    arrays: dict[str, Array]
    where: Array
    samples: slice
    groups: slice
    channels: slice
    axes: tuple[int, ...]
    """Those of the whole arrays, in the order of the piece's."""
    place: tuple[slice, ...]
    """Of the piece in an array whose axes are so permuted."""

    def of(self, parameter: Array) -> Array:
        """Its channels of a weight or bias."""
        return None if parameter is None else parameter[self.channels]

    def store(self, dense: Array, out: Array) -> None:
        """Copy what was computed for it to where it belongs."""
        target = out.transpose(self.axes)[self.place]
        copy(dense.reshape(target.shape), target)


def pieces(plan: Plan, arrays: dict[str, Array], where: Array) -> Iterator[Piece]:
    """Cut a call into pieces. A group of a sample is the least, all of its channels where the groups are labelled.

    Where there are gradients, integers become float32 (or float64 with float64 gradients), and the gradients, too.
    """
    import cupy

    layout = plan.layout
    assert layout is not None
    whole = layout.kind == "samples"
    axes = layout.axes if whole else (*plan.batch_axes, plan.channel_axis, *plan.spatial_axes)
    outer, inner = (layout.outer, layout.inner) if whole else (1, plan.S)
    views = {name: array.transpose(axes) for name, array in arrays.items()}
    mask = None if where is None else cupy.broadcast_to(where, plan.shape).transpose(axes)
    lead = next((i for i, n in enumerate(plan.batch_shape) if n > 1), None)
    count = 1 if lead is None else plan.batch_shape[lead]
    size = plan.size * next(iter(arrays.values())).itemsize
    budget = max(PIECE_BYTES, size // 8)
    step = max(1, budget * count // size)
    dtype = plan.x_dtype
    if dtype in INTEGERS and len(arrays) > 1:
        dtype = "float64" if plan.y_dtype == "float64" else "float32"
    group_step = plan.G
    if plan.labels is None and not whole and size // count > budget:
        group_step = max(1, budget * count * plan.G // size)
    D = plan.C // plan.G if plan.labels is None else 0
    for start in range(0, count, step):
        stop = min(start + step, count)
        rest = plan.N // count
        for g in range(0, plan.G, group_step):
            groups = slice(g, min(g + group_step, plan.G))
            channels = slice(groups.start * D, groups.stop * D) if D else slice(0, plan.C)
            index = [slice(None)] * len(axes)
            if lead is not None:
                index[lead] = slice(start, stop)
            index[axes.index(plan.channel_axis)] = channels
            n, C = (stop - start) * rest, channels.stop - channels.start

            def dense(
                view: Array,
                dtype: Any,
                index: tuple[slice, ...] = tuple(index),
                shape: tuple[int, ...] = (n, outer, C, inner),
            ) -> Array:
                part = view[index]
                result = cupy.empty(part.shape, dtype)
                copy(part, result)
                return result.reshape(shape)

            yield Piece(
                _piece_plan(plan, (n, outer, C, inner), groups.stop - groups.start, dtype),
                {name: dense(view, dtype_of(dtype)) for name, view in views.items()},
                None if mask is None else dense(mask, np.bool_),
                slice(start * rest, stop * rest),
                groups,
                channels,
                axes,
                tuple(index),
            )


@lru_cache(maxsize=256)
def _piece_plan(plan: Plan, shape: tuple[int, int, int, int], G: int, dtype: str) -> Plan:
    """The plan of a dense piece (n, outer, channels, inner), x in this dtype."""
    n, outer, C, inner = shape
    dense = Layout("dense", (0, 1, 2, 3), *shape, ((outer * C * inner, C * inner),) * 4)
    return replace(
        plan,
        shape=shape,
        batch_axes=(0,),
        channel_axis=2,
        spatial_axes=(1, 3),
        batch_shape=(n,),
        N=n,
        C=C,
        G=G,
        stats_shape=(n, G),
        layout=dense,
        x_dtype=dtype,
        y_dtype=plan.y_dtype if dtype == plan.x_dtype else dtype,
    )


class Statistics:
    """Statistics of all groups, put together from those of the pieces."""

    def __init__(self, plan: Plan, *dtypes: Any) -> None:
        import cupy

        self.shape = plan.stats_shape
        self.arrays = [cupy.empty((plan.N, plan.G), dtype) for dtype in dtypes]

    def store(self, piece: Piece, of_piece: Sequence[Array]) -> None:
        """Copy those of a piece to where they belong."""
        for part, whole in zip(of_piece, self.arrays, strict=True):
            copy(part, whole[piece.samples, piece.groups])

    def results(self) -> tuple[Array, ...]:
        """In the shape that the caller sees."""
        return tuple(array.reshape(self.shape) for array in self.arrays)


class Sums:
    """dweight and dbias, put together from those of the pieces, by the channels that they hold."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parts: dict[tuple[int, int], list[tuple[Array, Array]]] = {}

    def store(self, piece: Piece, call: dict[str, Array]) -> None:
        """Keep those of a piece, in float64."""
        key = (piece.channels.start, piece.channels.stop)
        self.parts.setdefault(key, []).append((call["dweight"], call["dbias"]))

    def results(self) -> tuple[Array, Array]:
        """Add them up, in the order of the samples."""
        import cupy

        plan = self.plan
        (rows,) = {len(parts) for parts in self.parts.values()}  # the same samples for all channels
        partial = cupy.empty((rows, plan.C, 2), np.float64)
        for (start, stop), parts in self.parts.items():
            for (dweight, dbias), row in zip(parts, partial, strict=True):
                copy(dbias, row[start:stop, 0])
                copy(dweight, row[start:stop, 1])
        dtype = plan.weight_dtype
        results = {name: cupy.empty(plan.C, dtype_of(dtype)) for name in ("dweight", "dbias")}
        added_rows(rows, plan.C, np.float64, dtype)({"partial": partial, **results})
        return results["dweight"], results["dbias"]
