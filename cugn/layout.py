"""How the large arrays of one call lie in memory: as (N, outer, C, inner) in every one of them, or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The common memory order of the arrays of a call.

    With the axes permuted to ``axes`` (batch, outer spatial, channel, inner spatial) a dense array is
    ``(N, outer, C, inner)`` with element strides ``(sn, so, inner, 1)``. Channels-first is ``outer == 1``,
    channels-last is ``inner == 1``, and batch norm of a channels-first array is ``N == 1`` with the samples as
    ``outer``. A contiguous group of D channels is then ``outer`` runs of ``D * inner`` contiguous elements in each
    case, so that one set of loops serves them all.

    Where each sample is so, but the batch axes cannot be run through as one (``x[:, ::2]`` of two), the kind is
    "samples": the same loops, since the bits of a sample may not depend on the batch, and another way to its start.
    """

    kind: Literal["dense", "samples", "strided"]
    axes: tuple[int, ...]
    N: int
    outer: int
    C: int
    inner: int
    strides: tuple[tuple[int, int], ...]
    """(sn, so) of each array in elements, in the order in which the arrays were given; empty if strided.

    Of "samples", sn is that of an array whose batch axes can be run through, else 0.
    """

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        batch_axes: Sequence[int],
        channel_axis: int,
        strides: Sequence[Sequence[int]],
    ) -> Layout:
        """Find the layout that arrays of one shape share; `strides` holds their strides in elements, x first."""
        spatial = [axis for axis in range(len(shape)) if axis != channel_axis and axis not in batch_axes]
        # Axes of size 1 have arbitrary strides and no effect: they go to the front of the outer axes.
        spatial.sort(key=lambda axis: (shape[axis] != 1, -abs(strides[0][axis])))
        C = shape[channel_axis]
        channel_stride = abs(strides[0][channel_axis])
        if C == 1:  # either side of the only channel is as good: prefer the side that makes `inner` contiguous
            splits = [0, len(spatial)]
        else:
            splits = [sum(shape[axis] == 1 or abs(strides[0][axis]) > channel_stride for axis in spatial)]
        for split in splits:
            outer, inner = spatial[:split], spatial[split:]
            axes = (*batch_axes, *outer, channel_axis, *inner)
            sizes = [math.prod(shape[axis] for axis in part) for part in (batch_axes, outer, inner)]
            rows = [_row_stride(shape, s, outer, channel_axis, inner) for s in strides]
            if None not in rows:
                samples = [_merged_stride(shape, s, batch_axes, math.prod(sizes[1:]) * C) for s in strides]
                pairs = tuple((sn or 0, so or 0) for sn, so in zip(samples, rows, strict=True))
                return cls("samples" if None in samples else "dense", axes, sizes[0], sizes[1], C, sizes[2], pairs)
        return cls("strided", axes, sizes[0], sizes[1], C, sizes[2], ())


def _row_stride(
    shape: Sequence[int], strides: Sequence[int], outer: Sequence[int], channel_axis: int, inner: Sequence[int]
) -> int | None:
    """`so` of one array in elements, or None where its samples are not dense in this order of the axes."""
    C = shape[channel_axis]
    inner_size = math.prod(shape[axis] for axis in inner)
    if _merged_stride(shape, strides, inner, 1) != 1 or (C > 1 and strides[channel_axis] != inner_size):
        return None
    return _merged_stride(shape, strides, outer, C * inner_size)


def _merged_stride(shape: Sequence[int], strides: Sequence[int], axes: Sequence[int], default: int) -> int | None:
    """Stride of `axes` run through as one axis, None if they cannot be; `default` where they hold one element."""
    merged = extent = 0
    for axis in reversed(axes):
        if shape[axis] == 1:
            continue
        if not extent:
            merged, extent = strides[axis], shape[axis]
        elif strides[axis] == merged * extent:
            extent *= shape[axis]
        else:
            return None
    return merged if extent else default
