"""Arrays of any strides: copies by a kernel of our own, and the views that make them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..layout import Layout
from ..plan import INTEGERS, Plan
from .compile import Specialisation, kernel

__all__ = [
    "DTYPES",
    "contiguous",
    "copy",
    "dtype_of",
    "float64",
    "grouping",
    "like",
    "mask_arguments",
    "name_of",
    "pieces",
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

PIECE_BYTES = 8 << 20
"""Arrays that no dense layout describes are copied in pieces of an eighth of x, or of this size if that is more."""

MOST_AXES = 6
THREADS = 256


def name_of(dtype: Any) -> str:
    """Name of a dtype of CuPy's, ml_dtypes' included."""
    return str(np.dtype(dtype).name)


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


def like(x: Array, dtype: Any, layout: Layout) -> tuple[Array, int, int]:
    """A new array in x's memory order, and its (sn, so) in elements.

    Where that order is not the layout's (a broadcast axis goes last there) the array is in the layout's.
    """
    import cupy

    array = cupy.empty_like(x, dtype=dtype)
    parts = _parts(layout, array.ndim, array.shape)
    strides = [_merged(array.shape, [s // array.itemsize for s in array.strides], part) for part in parts]
    unit = layout.inner == 1 or strides[3] == 1
    if None in strides or not unit or (layout.C > 1 and strides[2] != layout.inner):
        array = cupy.empty([x.shape[axis] for axis in layout.axes], dtype)
        array = array.transpose(sorted(range(x.ndim), key=layout.axes.__getitem__))
        strides = [layout.outer * layout.C * layout.inner, layout.C * layout.inner]
    assert strides[0] is not None
    assert strides[1] is not None
    return array, strides[0], strides[1]


def mask_arguments(where: Array, plan: Plan) -> tuple[Any, ...]:
    """The mask and its strides along samples, outer, channels and inner; a mask of no such strides is copied."""
    import cupy

    layout = plan.layout
    assert layout is not None
    where = cupy.broadcast_to(where, plan.shape)
    strides = [_merged(plan.shape, where.strides, part) for part in _parts(layout, len(plan.shape), plan.shape)]
    if None in strides:  # one byte an element of x
        dense = cupy.empty([plan.shape[axis] for axis in layout.axes], np.bool_)
        copy(where.transpose(layout.axes), dense)
        sample = math.prod((layout.outer, layout.C, layout.inner))
        where, strides = dense, [sample, layout.C * layout.inner, layout.inner, 1]
    return (where, *(np.int64(s) for s in strides if s is not None))


class Piece(NamedTuple):
    """Some groups of some samples, copied to dense arrays (n, channels, S)."""

    plan: Plan
    arrays: dict[str, Array]
    where: Array
    samples: slice
    groups: slice
    channels: slice
    place: tuple[slice, ...]
    """Of the piece in an array whose axes are permuted to batch, channel, spatial."""

    def of(self, parameter: Array) -> Array:
        """Its channels of a weight or bias."""
        return None if parameter is None else parameter[self.channels]

    def store(self, dense: Array, out: Array, plan: Plan) -> None:
        """Copy what was computed for it to where it belongs."""
        target = out.transpose((*plan.batch_axes, plan.channel_axis, *plan.spatial_axes))[self.place]
        copy(dense.reshape(target.shape), target)


def pieces(plan: Plan, arrays: dict[str, Array], where: Array) -> Iterator[Piece]:
    """Cut a call into pieces. A group of a sample is the least, all of its channels where the groups are labelled.

    Where there are gradients, integers become float32 (or float64 with float64 gradients), and the gradients, too.
    """
    import cupy

    axes = (*plan.batch_axes, plan.channel_axis, *plan.spatial_axes)
    views = {name: array.transpose(axes) for name, array in arrays.items()}
    mask = None if where is None else cupy.broadcast_to(where, plan.shape).transpose(axes)
    batch = len(plan.batch_axes)
    lead = next((i for i, n in enumerate(plan.batch_shape) if n > 1), None)
    count = 1 if lead is None else plan.batch_shape[lead]
    size = plan.size * next(iter(arrays.values())).itemsize
    budget = max(PIECE_BYTES, size // 8)
    step = max(1, budget * count // size)
    dtype = plan.x_dtype
    if dtype in INTEGERS and len(arrays) > 1:
        dtype = "float64" if plan.y_dtype == "float64" else "float32"
    group_step = plan.G
    if plan.labels is None and size // count > budget:
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
            index[batch] = channels
            n, C = (stop - start) * rest, channels.stop - channels.start

            def dense(
                view: Array,
                dtype: Any,
                index: tuple[slice, ...] = tuple(index),
                shape: tuple[int, ...] = (n, C, plan.S),
            ) -> Array:
                part = view[index]
                result = cupy.empty(part.shape, dtype)
                copy(part, result)
                return result.reshape(shape)

            yield Piece(
                _piece_plan(plan, n, C, groups.stop - groups.start, dtype),
                {name: dense(view, dtype_of(dtype)) for name, view in views.items()},
                None if mask is None else dense(mask, np.bool_),
                slice(start * rest, stop * rest),
                groups,
                channels,
                tuple(index),
            )


@lru_cache(maxsize=256)
def _piece_plan(plan: Plan, n: int, C: int, G: int, dtype: str) -> Plan:
    """The plan of a dense piece, x in this dtype."""
    dense = Layout("dense", (0, 1, 2), n, 1, C, plan.S, ((C * plan.S, plan.S),) * 4)
    return replace(
        plan,
        shape=(n, C, plan.S),
        batch_axes=(0,),
        channel_axis=1,
        spatial_axes=(2,),
        batch_shape=(n,),
        N=n,
        C=C,
        G=G,
        stats_shape=(n, G),
        layout=dense,
        x_dtype=dtype,
        y_dtype=plan.y_dtype if dtype == plan.x_dtype else dtype,
    )


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
