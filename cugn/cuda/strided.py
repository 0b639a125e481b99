"""Arrays of any strides: copies by a kernel of our own, memory orders of new arrays and masks, and dtypes by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..layout import Layout
from ..plan import Plan
from .compile import Specialisation, kernel

__all__ = [
    "DTYPES",
    "contiguous",
    "copy",
    "dtype_of",
    "float64",
    "grouping",
    "like",
    "mask_of",
    "name_of",
]

Array = Any

DTYPES = {
    "float16": 0,
    "bfloat16": 1,
    "float32": 2,
    "float64": 3,
    "int8": 4,
    "uint8": 5,
    "int16": 6,
    "uint16": 7,
}
"""As in kernels/types.cuh."""

MOST_AXES = 6
THREADS = 256


@lru_cache(maxsize=64)
def name_of(dtype: Any) -> str:
    """Name of a dtype of CuPy's, ml_dtypes' included."""
    return str(np.dtype(dtype).name)


@lru_cache(maxsize=64)
def dtype_of(name: str) -> Any:
    """NumPy dtype of a name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def copy(source: Array, target: Array) -> None:
    """target[...] = source, of equal shape, rounded once where target has another (float) dtype."""
    axes = [
        (n, s // source.itemsize, t // target.itemsize)
        for n, s, t in zip(source.shape, source.strides, target.strides, strict=True)
        if n != 1
    ]
    axes.sort(key=lambda axis: -abs(axis[2]))
    merged: list[tuple[int, int, int]] = []
    for n, s, t in axes:
        if merged and merged[-1][1:] == (s * n, t * n):
            merged[-1] = (merged[-1][0] * n, s, t)
        else:
            merged.append((n, s, t))
    if source.size == 0:
        return
    if len(merged) > MOST_AXES:
        longest = max(range(source.ndim), key=lambda axis: source.shape[axis])
        for i in range(source.shape[longest]):
            at = (slice(None),) * longest + (slice(i, i + 1),)
            copy(source[at], target[at])
        return
    merged = [(1, 0, 0)] * (MOST_AXES - len(merged)) + merged
    sizes, froms, tos = zip(*merged, strict=True)
    values = tuple(np.int64(v) for v in (source.size, *sizes[1:], *froms, *tos))
    name, how = "copy_elements", [np.int32(source.itemsize)]
    if source.dtype != target.dtype:
        name, how = "convert_elements", [np.int32(DTYPES[name_of(a.dtype)]) for a in (source, target)]
    function = kernel(Specialisation.of(name), 0)
    function((-(-source.size // THREADS),), (THREADS,), (source, target, *how, *values))


def contiguous(array: Array) -> Array:
    """The array itself if it is C-contiguous, or a copy."""
    import cupy

    if array.flags.c_contiguous:
        return array
    result = cupy.empty(array.shape, array.dtype)
    copy(array, result)
    return result


def float64(array: Array) -> Array:
    """C-contiguous float64: the array itself if it is, or a copy."""
    import cupy

    if array.dtype == np.float64:
        return contiguous(array)
    result = cupy.empty(array.shape, np.float64)
    copy(array, result)
    return result


def like(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, dtype: Any, layout: Layout
) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """Strides in bytes (None for C order) of a new array in the memory order of x, and its (sn, so) in elements.

    Where that order is not the layout's (a broadcast axis goes last there) the array is in the layout's.
    """
    of_x = sorted(range(len(shape)), key=lambda axis: (-abs(strides[axis]), axis))
    if _packed(shape, range(len(shape))) == [stride // itemsize for stride in strides]:
        of_x = list(range(len(shape)))
    for order in (of_x, layout.axes):
        packed = _packed(shape, order)
        sn, so, sc, si = (_merged(shape, packed, part) for part in _parts(layout, len(shape), shape))
        if sn is None or so is None or not (layout.inner == 1 or si == 1):
            continue
        if layout.C == 1 or sc == layout.inner:
            in_order = list(order) == list(range(len(shape)))
            return None if in_order else tuple(stride * dtype.itemsize for stride in packed), (sn, so)
    raise AssertionError(f"no new array of {layout}")


def _packed(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Strides of an array without gaps whose axes lie in memory in this order, the last one densest."""
    strides, stride = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= shape[axis]
    return strides


def mask_of(where: Array, plan: Plan) -> tuple[Array, tuple[int, ...]]:
    """The mask and its strides along samples, outer, channels and inner; a mask of no such strides is copied."""
    import cupy

    strides = _mask_strides(plan, where.shape, where.strides)
    if strides is not None:
        return where, strides
    layout = plan.layout
    assert layout is not None
    dense = cupy.empty([plan.shape[axis] for axis in layout.axes], np.bool_)  # one byte an element of x
    copy(cupy.broadcast_to(where, plan.shape).transpose(layout.axes), dense)
    row = layout.C * layout.inner
    return dense, (layout.outer * row, row, layout.inner, 1)


@lru_cache(maxsize=1024)
def _mask_strides(plan: Plan, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    layout, ndim = plan.layout, len(plan.shape)
    assert layout is not None
    added = ndim - len(shape)
    whole = [0] * added + [0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)]
    found = [_merged(plan.shape, whole, part) for part in _parts(layout, ndim, plan.shape)]
    merged = tuple(stride for stride in found if stride is not None)
    return merged if len(merged) == len(found) else None


def grouping(plan: Plan) -> tuple[Array, Array, Array]:
    """Group of each channel, channels by group, and the bounds of the groups in them, int32 on the current device."""
    import cupy

    return _uploaded(plan, cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)


@lru_cache(maxsize=64)
def _uploaded(plan: Plan, device: int, stream: int) -> tuple[Array, Array, Array]:
    """The plan's grouping, once for each stream: the kernels that read it come after the copy in the same stream.

    The one copy from the host in the engine; the first call of a plan makes it, which therefore cannot be captured.
    """
    import cupy

    def uploaded(values: Any) -> Array:
        array = cupy.empty(values.shape, np.int32)
        array.set(values.astype(np.int32))
        return array

    return uploaded(plan.labels), uploaded(plan.channel_order), uploaded(plan.group_bounds)


def _parts(layout: Layout, ndim: int, shape: Sequence[int]) -> tuple[Sequence[int], ...]:
    """Axes of x that make up N, outer, C and inner."""
    axes = layout.axes
    for batch in range(ndim):
        for channel in range(batch, ndim):
            parts = (axes[:batch], axes[batch:channel], axes[channel : channel + 1], axes[channel + 1 :])
            sizes = tuple(math.prod(shape[axis] for axis in part) for part in parts)
            if sizes == (layout.N, layout.outer, layout.C, layout.inner):
                return parts
    raise AssertionError(f"no split of {axes} gives {layout}")


def _merged(shape: Sequence[int], strides: Sequence[int], axes: Sequence[int]) -> int | None:
    """Stride of `axes` run through as one, 0 where they hold one element, None where there is no such stride."""
    stride, extent = 0, 1
    for axis in reversed(axes):
        if shape[axis] == 1:
            continue
        if extent == 1:
            stride, extent = strides[axis], shape[axis]
        elif strides[axis] == stride * extent:
            extent *= shape[axis]
        else:
            return None
    return stride
