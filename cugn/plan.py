"""Plan: what one call works on (axes, sizes, groups, dtypes, memory order), and every error about them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from .layout import Layout

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "INTEGERS",
    "OPERANDS",
    "ROLES",
    "Each",
    "Plan",
    "Spec",
    "axes_key",
    "checked_eps",
    "dtype_name",
    "groups_key",
]

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "uint16")
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")

# What each operand of a call must be. "like x": x's shape, the dtype of y. "channels": shape (C,), any float dtype.
# "statistics": broadcasts against the batch shape followed by G. "mask": boolean, broadcasts against x.
ROLES = {
    "out": "like x",
    "dy": "like x",
    "ddx": "like x",
    "tx": "like x",
    "weight": "channels",
    "bias": "channels",
    "tweight": "channels",
    "tbias": "channels",
    "ddweight": "channels",
    "ddbias": "channels",
    "mean": "statistics",
    "rstd": "statistics",
    "mean_wdy": "statistics",
    "mean_wdy_xhat": "statistics",
    "where": "mask",
}

# The arrays of each operation after x, those of x's shape first, `out` last.
OPERANDS = {
    "forward": ("weight", "bias", "where", "out"),
    "backward": ("dy", "weight", "bias", "mean", "rstd", "where", "out"),
    "jvp": ("tx", "weight", "bias", "tweight", "tbias", "where", "out"),
    "double_backward": ("ddx", "dy", "weight", "bias", "ddweight", "ddbias", "where"),
    "moments": ("where",),
    "normalize": ("mean", "rstd", "weight", "bias", "out"),
    "backward_sums": ("dy", "mean", "rstd", "weight", "bias"),
    "backward_apply": ("dy", "mean", "rstd", "mean_wdy", "mean_wdy_xhat", "weight", "bias", "where", "out"),
}


class Each(Enum):
    """Groups of one channel each, with the statistics of one sample (instance norm) or of all (batch norm)."""

    CHANNEL = 1
    CHANNEL_OF_BATCH = 2


class Labels(tuple[int, ...]):
    """A label for each channel, whose hash is taken once: 2048 of them take 16 us."""

    _hash: int

    def __hash__(self) -> int:
        """As a tuple's."""
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


Groups = int | Labels | Each

_known: dict[int, tuple[Any, Labels]] = {}
"""A copy of the labels that a caller's object held when it was last passed, and their key, by the object's id."""
_MOST_KNOWN = 64


class Spec(NamedTuple):
    """What the plan needs to know of one array: nothing of its values, so that a plan can be cached."""

    type: type
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...] | None = None
    """In bytes; None where the library does not tell."""
    device: Any = None


@dataclass(frozen=True, eq=False)
class Plan:
    """One checked call. N samples, C channels, G groups, S spatial elements; statistics of each group of each sample.

    Batch norm is the plan without batch axes and with C groups.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    channel_axis: int
    spatial_axes: tuple[int, ...]
    batch_shape: tuple[int, ...]
    N: int
    C: int
    G: int
    S: int
    labels: np.ndarray[Any, np.dtype[np.intp]] | None
    """Group of each channel, None for G contiguous groups of equal size."""
    channel_order: np.ndarray[Any, np.dtype[np.intp]]
    """Channels sorted by group, in their own order within a group."""
    group_bounds: np.ndarray[Any, np.dtype[np.intp]]
    """Group g holds ``channel_order[group_bounds[g]:group_bounds[g + 1]]``."""
    eps: float
    activation: str | None
    masked: bool
    """Whether `where` was given."""
    x_dtype: str
    y_dtype: str
    weight_dtype: str
    """Also the dtype of dweight and dbias; y's where there is no weight."""
    bias_dtype: str
    stats_shape: tuple[int, ...]
    layout: Layout | None
    """Common memory order of x, then dy, ddx or tx, then out; None where the library does not tell strides."""

    @property
    def size(self) -> int:
        """Number of elements of x."""
        return self.N * self.C * self.S

    @classmethod
    def of(
        cls,
        x: Spec,
        groups: Groups,
        operands: Sequence[tuple[str, Spec]],
        *,
        eps: float = 1e-5,
        channel_axis: int = 1,
        batch_axis: int | tuple[int, ...] | None = 0,
        activation: str | None = None,
    ) -> Plan:
        """Check a call and describe it.

        Raises
        ------
        TypeError
            A dtype that is not served.
        ValueError
            A shape, an axis, the groups, eps or the activation.
        """
        batch_axes, channel_axis = _axes(x.shape, batch_axis, channel_axis)
        if groups is Each.CHANNEL_OF_BATCH:  # one sample, whose positions are those of all samples
            batch_axes = ()
        spatial_axes = tuple(a for a in range(len(x.shape)) if a != channel_axis and a not in batch_axes)
        batch_shape = tuple(x.shape[a] for a in batch_axes)
        C = x.shape[channel_axis]
        if C != C:  # NaN: Dask's sign for a size that is not known before the values are
            raise ValueError(f"x has an unknown size along axis {channel_axis}, the channels: it must be known")
        G, labels = _groups(groups, C)
        eps = checked_eps(eps)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: it must be one of {', '.join(map(repr, ACTIVATIONS))}")

        x_dtype = dtype_name(x.dtype)
        if x_dtype not in FLOATS + INTEGERS:
            raise TypeError(f"x has dtype {x.dtype}: it must be one of {', '.join(FLOATS + INTEGERS)}")
        specs = dict(operands)
        y_dtype = x_dtype
        if x_dtype in INTEGERS:  # images: float32, or the float dtype that `out` asks for
            out_dtype = dtype_name(specs["out"].dtype) if "out" in specs else "float32"
            y_dtype = out_dtype if out_dtype in FLOATS else "float32"
        stats_shape = (*batch_shape, G)
        for name, spec in operands:
            _check_operand(name, spec, x, C, y_dtype, stats_shape)

        order = np.arange(C) if labels is None else np.argsort(labels, kind="stable")
        sizes = np.full(G, C // max(G, 1)) if labels is None else np.bincount(labels, minlength=G)
        bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        for array in (order, bounds) if labels is None else (order, bounds, labels):
            array.flags.writeable = False  # plans are cached and shared between threads
        like_x = [x, *(spec for name, spec in operands if ROLES[name] == "like x")]
        return cls(
            shape=x.shape,
            batch_axes=batch_axes,
            channel_axis=channel_axis,
            spatial_axes=spatial_axes,
            batch_shape=batch_shape,
            N=math.prod(batch_shape),
            C=C,
            G=G,
            S=math.prod(x.shape[a] for a in spatial_axes),
            labels=labels,
            channel_order=order,
            group_bounds=bounds,
            eps=eps,
            activation=activation,
            masked="where" in specs,
            x_dtype=x_dtype,
            y_dtype=y_dtype,
            weight_dtype=dtype_name(specs["weight"].dtype) if "weight" in specs else y_dtype,
            bias_dtype=dtype_name(specs["bias"].dtype) if "bias" in specs else y_dtype,
            stats_shape=stats_shape,
            layout=_layout(x.shape, batch_axes, channel_axis, like_x),
        )


def dtype_name(dtype: Any) -> str:
    """Name that all array libraries share: ``float32`` for numpy's, torch's and array-api-strict's float32."""
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def groups_key(groups: Any) -> Groups:
    """Groups as a hashable int or tuple of ints.

    The same object with the same labels again gets the same key: 1 to 2 us for 1024 labels, where looking at each of
    them takes 20, and hashing and comparing them as much again.
    """
    if type(groups) is Labels:
        return groups
    copy, key = _known.get(id(groups), (None, None))
    if key is not None and type(copy) is type(groups) and _unchanged(copy, groups):
        return key
    new = _groups_key(groups)
    if isinstance(new, Labels):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[id(groups)] = groups if isinstance(groups, (tuple, range)) else groups.copy(), new
    return new


def _unchanged(copy: Any, groups: Any) -> bool:
    if isinstance(copy, np.ndarray):
        return copy.shape == groups.shape and copy.dtype == groups.dtype and bool((copy == groups).all())
    return copy is groups or (isinstance(copy, list) and copy == groups)


def _groups_key(groups: Any) -> Groups:
    if isinstance(groups, Each):
        return groups
    if isinstance(groups, np.ma.MaskedArray):
        raise TypeError("groups is a masked array: it must be an int, or one integer label for each channel")
    values = groups
    if isinstance(groups, np.ndarray) and groups.ndim > 0:
        if groups.ndim > 1:
            raise ValueError(f"groups has shape {groups.shape}: labels are one-dimensional, one for each channel")
        values = groups.tolist()
    if isinstance(values, (list, tuple, range)):
        if set(map(type, values)) == {int}:  # 15 ns a label, not 120
            return Labels(values)
        return Labels(_integer(value, "groups", "an int, or one integer label for each channel") for value in values)
    return _integer(groups, "groups", "an int, or a list, tuple or NumPy array of C integer labels")


def checked_eps(eps: Any) -> float:
    """Eps as a float that is finite and not negative."""
    if isinstance(eps, (str, bytes, bool, np.bool_)) or getattr(eps, "ndim", 0) > 0:
        raise TypeError(f"eps is {eps!r}: it must be a real number")
    try:
        value = float(eps)
    except TypeError:
        raise TypeError(f"eps is {eps!r}: it must be a real number") from None
    except OverflowError:
        value = math.inf
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"eps is {value}: it must be finite and >= 0")
    return value


def axes_key(axes: Any, name: str) -> int | tuple[int, ...] | None:
    """An axis argument as a hashable int, tuple of ints, or None."""
    if axes is None:
        return None
    if isinstance(axes, (list, tuple)):
        return tuple(_integer(axis, name, "an int, a tuple of ints, or None") for axis in axes)
    return _integer(axes, name, "an int" if name == "channel_axis" else "an int, a tuple of ints, or None")


def _integer(value: Any, name: str, wanted: str) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}: it must be {wanted}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: it must be {wanted}") from None


def _axes(shape: tuple[int, ...], batch_axis: Any, channel_axis: int) -> tuple[tuple[int, ...], int]:
    """Non-negative batch axes and channel axis."""
    ndim = len(shape)

    def normalized(axis: int, name: str) -> int:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{name} is {axis}: x has {ndim} axes (shape {shape})")
        return axis % ndim

    if not isinstance(channel_axis, int):
        raise TypeError(f"channel_axis is {channel_axis!r}: it must be an int")
    channel_axis = normalized(channel_axis, "channel_axis")
    given = () if batch_axis is None else (batch_axis,) if isinstance(batch_axis, int) else batch_axis
    batch_axes = tuple(normalized(axis, "batch_axis") for axis in given)
    if len(set(batch_axes)) < len(batch_axes):
        raise ValueError(f"batch_axis is {batch_axis}: an axis is named twice")
    if channel_axis in batch_axes:
        raise ValueError(f"channel_axis and batch_axis both name axis {channel_axis} of x (shape {shape})")
    return batch_axes, channel_axis


def _groups(groups: Groups, C: int) -> tuple[int, np.ndarray[Any, np.dtype[np.intp]] | None]:
    """Number of groups and labels (None for contiguous equal groups)."""
    if isinstance(groups, Each):
        return C, None
    if isinstance(groups, int):
        if groups < 1:
            raise ValueError(f"groups is {groups}: it must be at least 1")
        if C % groups:
            raise ValueError(f"groups is {groups}: it must divide the {C} channels of x")
        return groups, None
    if len(groups) != C:
        raise ValueError(f"groups holds {len(groups)} labels: x has {C} channels")
    used = sorted(set(groups))
    if used != list(range(len(used))):
        raise ValueError(f"groups has the labels {_short(used)}: they must be 0..G-1, each used at least once")
    return len(used), np.array(groups, dtype=np.intp)


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"{shown}, ..." if len(values) > 8 else shown


def _check_operand(name: str, spec: Spec, x: Spec, C: int, y_dtype: str, stats_shape: tuple[int, ...]) -> None:
    """Raise unless the operand's dtype (first) and shape are what its role asks for."""
    role, dtype = ROLES[name], dtype_name(spec.dtype)
    if role == "mask":
        if dtype != "bool":
            raise TypeError(f"{name} has dtype {spec.dtype}: it must be boolean")
    elif role == "like x":
        if dtype != y_dtype:
            if name == "out" and dtype_name(x.dtype) in INTEGERS:
                raise TypeError(f"{name} has dtype {spec.dtype}: it must be one of {', '.join(FLOATS)}")
            raise TypeError(f"{name} has dtype {spec.dtype}: it must be {y_dtype} for x of {x.dtype}")
    elif dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {spec.dtype}: it must be one of {', '.join(FLOATS)}")

    if role == "like x" and not _same_shape(spec.shape, x.shape):
        raise ValueError(f"{name} has shape {spec.shape}: it must be x's, {x.shape}")
    if role == "channels" and spec.shape != (C,):
        raise ValueError(f"{name} has shape {spec.shape}: it must be ({C},), one value for each channel of x")
    if role == "statistics" and not _broadcasts(spec.shape, stats_shape):
        raise ValueError(f"{name} has shape {spec.shape}: it must broadcast to {stats_shape}, the batch shape then G")
    if role == "mask" and not _broadcasts(spec.shape, x.shape):
        raise ValueError(f"{name} has shape {spec.shape}: it must broadcast against x's, {x.shape}")


def _same_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, an unknown size (NaN) equalling another one."""
    return len(shape) == len(wanted) and all(a == b or (a != a and b != b) for a, b in zip(shape, wanted, strict=True))


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array of `shape` can be broadcast to exactly `wanted`."""
    return len(shape) <= len(wanted) and all(
        a == b or a == 1 or (a != a and b != b) for a, b in zip(reversed(shape), reversed(wanted), strict=False)
    )


def _layout(
    shape: tuple[int, ...], batch_axes: tuple[int, ...], channel_axis: int, arrays: Sequence[Spec]
) -> Layout | None:
    if any(array.strides is None for array in arrays):
        return None
    strides = [[s // array.dtype.itemsize for s in array.strides or ()] for array in arrays]
    aligned = all(s % array.dtype.itemsize == 0 for array in arrays for s in array.strides or ())
    layout = Layout.of(shape, batch_axes, channel_axis, strides)
    if not aligned and layout.kind != "strided":  # a field of a structured array: no element stride describes it
        return Layout("strided", layout.axes, layout.N, layout.outer, layout.C, layout.inner, ())
    return layout
