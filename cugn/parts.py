"""Parts of an array: statistics of blocks that hold some of the samples, channels and positions, and their use.

An array that lies in blocks (Dask chunks, a file) is normalized in three steps, each a public function on one block:

1. `Part.of` takes the moments of the pieces of groups that a block holds, and `Part.merge` those of two blocks;
2. `Part.statistics` turns the merged ones into what is applied;
3. `normalized`, `gradient_sums` and `gradient` apply them to each block.

A float64 mean is not enough for float64 data: at mean/std = 1e12 it is off by 1e-4 standard deviations. Float64 blocks
are therefore taken as ``x = shift + unit * v``, with the shift near the mean, and everything is computed from v. The
unit is 1 but for values whose squares leave the range. Other dtypes are taken as they are (shift 0, unit 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from .functional import backward_apply, backward_sums, moments, normalize
from .moments import Moments

__all__ = [
    "Axes",
    "ChannelSums",
    "Part",
    "PartSums",
    "Statistics",
    "entries",
    "gradient",
    "gradient_sums",
    "local_groups",
    "merged",
    "normalized",
    "pick",
]

Array = Any
Indices = np.ndarray[Any, np.dtype[np.intp]]

# Squares of 2^+-600 fit in the other half of float64's range: m2 beyond 2^+-900 moves by a factor 2^-+1200.
# Means that are 2^+-400 apart add their square, times a count, to m2.
_UNIT_EXPONENT, _SAFE_EXPONENT, _NEAR_EXPONENT = 600, 900, 400


class Axes(NamedTuple):
    """Where a block's samples and channels lie; axes not negative."""

    batch: tuple[int, ...]
    channel: int

    @property
    def keywords(self) -> dict[str, Any]:
        """The axes as the public functions take them."""
        return {"batch_axis": self.batch, "channel_axis": self.channel}

    def spread(self, values: Array, ndim: int) -> Array:
        """Values of the batch shape followed by channels, so that they broadcast against a block of `ndim` axes."""
        axes = (*self.batch, self.channel)
        xp = array_namespace(values)
        values = xp.permute_dims(values, tuple(sorted(range(len(axes)), key=axes.__getitem__)))
        return values[tuple(slice(None) if axis in axes else None for axis in range(ndim))]


def local_groups(labels: Indices) -> tuple[Indices, int | tuple[int, ...], Indices]:
    """Groups that a block's channels belong to, as `groups` of a call on the block, and each channel's number in it.

    Returns
    -------
    present : array
        Groups of the whole array that the block holds pieces of, ascending.
    groups : int or tuple of int
        The pieces, as a call on the block takes them: a number where they are contiguous and of equal size.
    number : array
        For each channel the index of its group in `present`.
    """
    return _local_groups(labels.tobytes(), labels.dtype)


@functools.lru_cache(maxsize=1024)
def _local_groups(labels: bytes, dtype: Any) -> tuple[Indices, int | tuple[int, ...], Indices]:
    """The same from the bytes of the labels: 1 us for a chunk whose like there was, not 40 us."""
    present, number = np.unique(np.frombuffer(labels, dtype), return_inverse=True)
    present.flags.writeable = number.flags.writeable = False  # shared between threads
    count = len(present)
    if count and len(number) % count == 0 and np.array_equal(number, np.repeat(np.arange(count), len(number) // count)):
        return present, count, number
    return present, tuple(number.tolist()), number


class Part(NamedTuple):
    """Moments of the pieces of groups in a block, of ``v = (x - shift) / unit``; shapes: batch shape, then pieces."""

    present: Indices
    shift: Array
    unit: Array
    moments: Moments

    @classmethod
    def of(cls, x: Array, labels: Indices, axes: Axes, where: Array = None) -> Part:
        """Take the moments of a block whose channels have these labels."""
        present, groups, number = local_groups(labels)
        m = moments(x, groups, where=where, **axes.keywords)
        xp = array_namespace(m.mean)
        shift, unit = xp.zeros_like(m.mean), xp.ones_like(m.mean)
        if x.dtype == np.float64:
            shift = m.mean
            usable = xp.isfinite(m.mean)
            large, small = m.m2 > 2.0**_SAFE_EXPONENT, m.m2 < 2.0**-_SAFE_EXPONENT
            unit = xp.where(usable & large, 2.0**_UNIT_EXPONENT * unit, unit)
            unit = xp.where(usable & small, 2.0**-_UNIT_EXPONENT * unit, unit)
            m = moments(_centred(x, shift, unit, number, axes), groups, where=where, **axes.keywords)
        return cls(present, shift, unit, m)

    def merge(self, other: Part) -> Part:
        """Moments of the elements of both."""
        if not np.array_equal(self.present, other.present):
            present = np.union1d(self.present, other.present)
            return self.on(present).merge(other.on(present))
        if self._about_the_same(other):
            return self._replace(moments=self.moments.merge(other.moments))
        xp = array_namespace(self.shift)
        with np.errstate(all="ignore"):
            filled, other_filled = self.moments.count > 0, other.moments.count > 0
            shift = xp.where(filled, self.shift, other.shift)
            unit = xp.where(filled, self.unit, other.unit)
            unit = xp.where(other_filled & (other.unit > unit), other.unit, unit)
            # Two parts of one element each are in small units, however far apart they are.
            apart = xp.where(filled & other_filled, xp.abs(self.shift / 2 - other.shift / 2), xp.zeros_like(unit))
            unit = xp.where((apart > 2.0**-_NEAR_EXPONENT) & (unit < 1), xp.ones_like(unit), unit)
            unit = xp.where(apart > 2.0**_NEAR_EXPONENT, 2.0**_UNIT_EXPONENT * xp.ones_like(unit), unit)
            return Part(
                self.present, shift, unit, self._about(shift, unit).moments.merge(other._about(shift, unit).moments)
            )

    def _about_the_same(self, other: Part) -> bool:
        """Whether both are seen to be in the same units, as all but float64 are; looking would halt a GPU."""
        return (
            isinstance(self.shift, np.ndarray)
            and np.array_equal(self.shift, other.shift)
            and np.array_equal(self.unit, other.unit)
        )

    def on(self, present: Indices) -> Part:
        """The same among more groups, of which the others are empty."""
        if np.array_equal(self.present, present):
            return self
        xp = array_namespace(self.shift)
        at = xp.asarray(np.searchsorted(present, self.present))

        def placed(values: Array, fill: float) -> Array:
            array = xp.full((*values.shape[:-1], len(present)), fill, dtype=values.dtype)
            array[..., at] = values
            return array

        m = self.moments
        spread = Moments(placed(m.count, 0), placed(m.mean, np.nan), placed(m.m2, 0))
        return Part(present, placed(self.shift, 0), placed(self.unit, 1), spread)

    def statistics(self, eps: float, groups: Indices | None = None) -> Statistics:
        """What is applied to the blocks, of these groups, or its own; empty ones get NaN."""
        part = self if groups is None else self.on(groups)
        xp = array_namespace(part.shift)
        with np.errstate(all="ignore"):
            if eps > 2.0**-_SAFE_EXPONENT:  # beside which a variance in smaller units is nothing
                part = part._about(part.shift, xp.where(part.unit < 1, xp.ones_like(part.unit), part.unit))
            m = part.moments
            rstd = 1 / xp.sqrt(m.var + eps / part.unit / part.unit)
            return Statistics(m.count, part.shift, part.unit, m.mean, rstd)

    def total(self, groups: Indices | None = None) -> Moments:
        """Moments of x itself, of these groups, or its own."""
        part = self if groups is None else self.on(groups)
        m = part.moments
        with np.errstate(all="ignore"):
            return Moments(m.count, part.shift + part.unit * m.mean, m.m2 * part.unit * part.unit)

    def _about(self, shift: Array, unit: Array) -> Part:
        """The same elements about another shift, in another unit; powers of two, so that only the shift rounds."""
        factor = self.unit / unit
        m = self.moments
        mean = _difference(self.shift, shift, unit) + m.mean * factor
        return Part(self.present, shift, unit, Moments(m.count, mean, m.m2 * factor * factor))


class Statistics(NamedTuple):
    """Statistics of whole groups: ``x_hat = ((x - shift) / unit - mean) * rstd``; shapes: batch shape, then groups."""

    count: Array
    shift: Array
    unit: Array
    mean: Array
    rstd: Array

    @classmethod
    def given(cls, count: Array, mean: Array, rstd: Array) -> Statistics:
        """Statistics of x as it is."""
        xp = array_namespace(mean)
        return cls(xp.asarray(count), xp.zeros_like(mean), xp.ones_like(mean), mean, rstd)

    @property
    def caller_mean(self) -> Array:
        """Mean of x, rounded to float64."""
        return self.shift + self.unit * self.mean

    @property
    def caller_rstd(self) -> Array:
        """1 / sqrt(var + eps)."""
        return self.rstd / self.unit

    def about_the_mean(self) -> Statistics:
        """The same with the mean itself for a shift, of float64 blocks: one form, from whichever parts they come."""
        shift = self.caller_mean
        with np.errstate(all="ignore"):
            return self._replace(shift=shift, mean=(self.shift - shift) / self.unit + self.mean)

    def with_rstd(self, rstd: Array) -> Statistics:
        """The same means under an rstd that the caller supplies."""
        return self._replace(rstd=rstd * self.unit)

    def of(self, present: Indices) -> Statistics:
        """Those of the groups that a block holds pieces of."""
        return Statistics(*(pick(values, present) for values in self))


def pick(values: Array, present: Indices) -> Array:
    """Values of the groups `present` from those of all groups, or from one that stands for all."""
    if values.ndim == 0 or values.shape[-1] in (1, len(present)):  # all of them: no copy
        return values
    return values[..., present if isinstance(values, np.ndarray) else array_namespace(values).asarray(present)]


def normalized(
    x: Array,
    labels: Indices,
    axes: Axes,
    statistics: Statistics,
    weight: Array = None,
    bias: Array = None,
    activation: str | None = None,
    out: Array = None,
) -> Array:
    """Output of a block; weight and bias are those of its channels. It is written to `out` unless x is float64."""
    present, groups, number = local_groups(labels)
    own = statistics.of(present)
    v = _values(x, own, number, axes)
    out = out if v is x else v
    return normalize(v, own.mean, own.rstd, groups, weight, bias, activation=activation, out=out, **axes.keywords)


class PartSums(NamedTuple):
    """The backward's sums over the pieces of groups in a block, of the batch shape followed by pieces."""

    present: Indices
    sum_wdy: Array
    sum_wdy_xhat: Array

    def merge(self, other: PartSums) -> PartSums:
        """Sums over the elements of both."""
        present = self.present
        if not np.array_equal(present, other.present):
            present = np.union1d(present, other.present)
        a, b = self.on(present), other.on(present)
        return PartSums(present, a.sum_wdy + b.sum_wdy, a.sum_wdy_xhat + b.sum_wdy_xhat)

    def on(self, present: Indices) -> PartSums:
        """The same among more groups, of which the others have no terms."""
        if np.array_equal(self.present, present):
            return self
        xp = array_namespace(self.sum_wdy)
        at = xp.asarray(np.searchsorted(present, self.present))
        placed = []
        for values in self[1:]:
            array = xp.zeros((*values.shape[:-1], len(present)), dtype=values.dtype)
            array[..., at] = values
            placed.append(array)
        return PartSums(present, *placed)

    def means(self, count: Array) -> tuple[Array, Array]:
        """Sums of all groups divided by the number of elements in the statistics."""
        whole = self if len(self.present) == count.shape[-1] else self.on(np.arange(count.shape[-1]))
        with np.errstate(all="ignore"):
            return whole.sum_wdy / count, whole.sum_wdy_xhat / count


class ChannelSums(NamedTuple):
    """A block's terms of dweight and dbias, in float64."""

    dweight: Array
    dbias: Array

    def merge(self, other: ChannelSums) -> ChannelSums:
        """Sums over the elements of both."""
        return ChannelSums(self.dweight + other.dweight, self.dbias + other.dbias)


def gradient_sums(
    dy: Array,
    x: Array,
    labels: Indices,
    axes: Axes,
    statistics: Statistics,
    weight: Array = None,
    bias: Array = None,
    activation: str | None = None,
) -> tuple[PartSums, ChannelSums]:
    """The backward's sums over a block: those of groups and those of channels."""
    present, groups, number = local_groups(labels)
    own = statistics.of(present)
    v = _values(x, own, number, axes)
    sums = backward_sums(dy, v, own.mean, own.rstd, groups, weight, bias, activation=activation, **axes.keywords)
    return PartSums(present, sums.sum_wdy, sums.sum_wdy_xhat), ChannelSums(sums.dweight, sums.dbias)


def gradient(
    dy: Array,
    x: Array,
    labels: Indices,
    axes: Axes,
    statistics: Statistics,
    means: tuple[Array, Array],
    weight: Array = None,
    bias: Array = None,
    where: Array = None,
    activation: str | None = None,
    out: Array = None,
) -> Array:
    """Gradient with respect to a block, from `PartSums.means` of all. It is written to `out` unless x is float64."""
    present, groups, number = local_groups(labels)
    own = statistics.of(present)
    v = _values(x, own, number, axes)
    out = out if v is x else v
    mean_wdy, mean_wdy_xhat = (pick(mean, present) for mean in means)
    dx = backward_apply(
        dy,
        v,
        own.mean,
        own.rstd,
        mean_wdy,
        mean_wdy_xhat,
        groups,
        weight,
        bias,
        where=where,
        activation=activation,
        out=out,
        **axes.keywords,
    )
    if v is not x and not _all_one(own.unit):
        dx /= _on_channels(own.unit, number, axes, x.ndim)
    return dx


def merged(parts: Sequence[Any]) -> Any:
    """Merge parts of one kind, in an order that depends on their number and groups alone.

    Those of the same groups are merged in pairs of neighbours, all pairs of a round as one merge of stacked arrays, and
    the results one after another: 16 parts of the same groups take four merges, not 15 (0.4 ms, not 1.4 ms).
    """
    if len(parts) == 1:
        return parts[0]
    if hasattr(parts[0], "present"):
        alike: dict[bytes, list[Any]] = {}
        for part in parts:
            alike.setdefault(part.present.tobytes(), []).append(part)
        if len(alike) > 1:
            return functools.reduce(lambda a, b: a.merge(b), map(merged, alike.values()))
    count = 1 << (len(parts).bit_length() - 1)
    if count < len(parts):
        return merged(parts[:count]).merge(merged(parts[count:]))
    whole = _each(lambda *arrays: array_namespace(*arrays).stack(arrays), *parts)
    while count > 1:
        whole = entries(whole, slice(0, None, 2)).merge(entries(whole, slice(1, None, 2)))
        count //= 2
    return entries(whole, 0)


def entries(part: Any, at: Any) -> Any:
    """A part of ``array[at]`` for each of its arrays."""
    return _each(lambda array: array[at], part)


def _each(function: Callable[..., Array], *parts: Any) -> Any:
    """A part of `function` of the arrays in each place; of the groups `present`, which are the same, the first's."""
    fields = []
    for name, *values in zip(parts[0]._fields, *parts, strict=True):
        if name == "present":
            fields.append(values[0])
        else:
            fields.append(_each(function, *values) if isinstance(values[0], tuple) else function(*values))
    return type(parts[0])(*fields)


def _values(x: Array, statistics: Statistics, number: Indices, axes: Axes) -> Array:
    """v of a float64 block, in new memory; x itself of any other."""
    return _centred(x, statistics.shift, statistics.unit, number, axes) if x.dtype == np.float64 else x


def _centred(x: Array, shift: Array, unit: Array, number: Indices, axes: Axes) -> Array:
    """(x - shift) / unit: exact where x is near the shift."""
    shift = _on_channels(shift, number, axes, x.ndim)
    with np.errstate(all="ignore"):
        if _all_one(unit):
            return x - shift
        return _difference(x, shift, _on_channels(unit, number, axes, x.ndim))


def _difference(a: Array, b: Array, unit: Array) -> Array:
    """(a - b) / unit, a power of two, without overflow: by a large one it is divided first, by a small one last."""
    large = array_namespace(unit).where(unit > 1, unit, array_namespace(unit).ones_like(unit))
    return (a / large - b / large) / (unit / large)


def _on_channels(values: Array, number: Indices, axes: Axes, ndim: int) -> Array:
    """Values of a block's groups, so that they broadcast against the block."""
    return axes.spread(values[..., array_namespace(values).asarray(number)], ndim)


def _all_one(unit: Array) -> bool:
    return bool((unit == 1).all())
