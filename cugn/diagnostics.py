"""What a grouping does to each channel, how well its statistics are known, and a grouping by similar scale."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .engines import resolve
from .functional import moments
from .moments import Moments

__all__ = ["Diagnosis", "Squashed", "diagnose", "suggest_groups"]

Array = Any
Values = np.ndarray[Any, np.dtype[np.float64]]


class Squashed(NamedTuple):
    """A channel that nearly vanishes because others determine the variance of its group.

    Attributes
    ----------
    channel : int
        The channel.
    std : float
        Its standard deviation after normalization.
    by : tuple of int
        The fewest other channels of the group that hold at least half of the variance that the others bring in.
    """

    channel: int
    std: float
    by: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; prints as a table, and draws itself with `plot`.

    Attributes
    ----------
    labels : array of int, shape (C,)
        Group of each channel.
    std_before, std_after : array, shape (C,)
        Standard deviation of each channel within a sample, before and after normalization (root mean square over the
        samples). Where a sample has a single position, over the samples.
    share : array, shape (C,)
        Share of each channel in the variance of its group, through its own variance and its distance from the
        group's mean; the shares of a group sum to 1.
    squashed : tuple of Squashed
        The channels that change, but whose `std_after` is below the threshold.
    values : array, shape (G,)
        Number m of values in a group of a sample.
    effective_values : array, shape (G,)
        The number of alike, independent values from which the variance would be known as well: m if all channels of
        the group have the same variance, m divided by their number if one of them outweighs all others.
    mean_error, var_error : array, shape (G,)
        Standard error of the group's mean, in standard deviations, and of its variance, relative to it.
    batch : int
        Batch size that batch norm's numbers are for.
    batch_values, batch_effective_values, batch_mean_error, batch_var_error : array, shape (C,)
        The same of batch norm's statistics of each channel, from the spread between the samples of x; NaN where x has
        a single sample.
    """

    labels: np.ndarray[Any, np.dtype[np.intp]]
    std_before: Values = field(repr=False)
    std_after: Values = field(repr=False)
    share: Values = field(repr=False)
    squashed: tuple[Squashed, ...]
    values: Values
    effective_values: Values
    mean_error: Values
    var_error: Values
    batch: int
    batch_values: Values
    batch_effective_values: Values
    batch_mean_error: Values
    batch_var_error: Values

    def __repr__(self) -> str:
        """Table of the groups, batch norm's errors for comparison (medians of its channels), and the squashed ones."""
        C, G = len(self.labels), len(self.values)
        lines = [
            f"{C} channel{'s' * (C > 1)} in {G} group{'s' * (G > 1)}",
            f"{'group':>5}  {'channels':<16}{'std before':>18}{'std after':>19}"
            f"{'values':>9}{'effective':>10}{'mean ±':>8}{'var ±':>7}",
        ]
        shown = range(G) if G <= 16 else [*range(12), *range(G - 3, G)]
        for g in shown:
            if g - 1 not in shown and g > 0:
                lines.append("  ...")
            members = np.flatnonzero(self.labels == g)
            before, after = _span(self.std_before[members]), _span(self.std_after[members])
            lines.append(
                f"{g:>5}  {_short(members):<16}{before:>18}{after:>19}"
                f"{self.values[g]:>9.6g}{self.effective_values[g]:>10.4g}{self.mean_error[g]:>8.2g}"
                f"{self.var_error[g]:>7.1%}"
            )
        if np.isfinite(self.batch_mean_error).any():
            lines.append(
                f"batch norm, batch of {self.batch}: {np.mean(self.batch_values):.6g} values a channel, "
                f"{np.nanmedian(self.batch_effective_values):.4g} effective, mean ± "
                f"{np.nanmedian(self.batch_mean_error):.2g}, var ± {np.nanmedian(self.batch_var_error):.1%}"
            )
        for channel, std, by in self.squashed[:8]:
            lines.append(f"channel {channel} is squashed to std {std:.2g} by channel {_short(np.array(by))}")
        if len(self.squashed) > 8:
            lines.append(f"... and {len(self.squashed) - 8} more channels are squashed")
        if not self.squashed:
            lines.append("no channel is squashed")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw each channel's standard deviation before and after normalization, on a logarithmic axis.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure if None.

        Returns
        -------
        matplotlib.axes.Axes
            `ax`, or the new one.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.subplots(figsize=(7, 3.2), layout="constrained")[1]
        order = np.lexsort((np.arange(len(self.labels)), self.labels))
        position = np.arange(len(order))
        before, after, group = self.std_before[order], self.std_after[order], self.labels[order]
        squashed = np.isin(order, [channel for channel, _, _ in self.squashed])
        for g in range(1, len(self.values), 2):
            inside = position[group == g]
            ax.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color="tab:gray", alpha=0.15, lw=0)
        ax.vlines(position, before, after, color="tab:gray", lw=1)
        ax.plot(position, before, "o", mfc="none", mec="tab:gray", ms=5, label="before")
        ax.plot(position[~squashed], after[~squashed], "o", color="tab:blue", ms=5, label="after")
        if squashed.any():
            ax.plot(position[squashed], after[squashed], "v", color="tab:red", ms=6, label="after: squashed")
        ax.set_yscale("log")
        ax.set_xlim(-0.6, len(order) - 0.4)
        if len(order) <= 32:
            ax.set_xticks(position, [str(channel) for channel in order])
            ax.set_xlabel("channel, ordered by group (shaded: every other group)")
        else:
            ax.set_xlabel("channels, ordered by group (shaded: every other group)")
        ax.set_ylabel("standard deviation")
        ax.legend(loc="best", frameon=False)
        return ax


def diagnose(
    x: Array,
    groups: Any,
    *,
    batch: int | None = None,
    threshold: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
) -> Diagnosis:
    r"""Tell what group norm with this grouping does to each channel, and how well its statistics are known.

    Parameters
    ----------
    x, groups, eps, channel_axis, batch_axis, where
        As in `cugn.group_norm`.
    batch : int, optional
        Batch size of the batch norm to compare with; the number of samples in x if None.
    threshold : float, optional
        A channel whose standard deviation after normalization is below it counts as squashed.

    Returns
    -------
    Diagnosis
        Arrays of NumPy, whatever the library of x.

    Raises
    ------
    TypeError, ValueError
        As `cugn.group_norm`; ValueError for a batch below 1 or a threshold that is not positive.

    See Also
    --------
    suggest_groups : A grouping that squashes the channels least.

    Notes
    -----
    One pass over x takes the moments of each channel of each sample; all the rest follows from these (N, C) numbers.
    A group's variance is :math:`v_g = \sum_c m_c (v_c + (\mu_c - \mu_g)^2) / m`, and the channel's standard deviation
    after normalization :math:`\sqrt{v_c / (v_g + \epsilon)}`.

    The errors of group norm's statistics are those of independent values: neighbouring pixels resemble each other, so
    that they are lower bounds. With :math:`m_e = (\sum_c m_c v_c)^2 / \sum_c m_c v_c^2` effective values, the variance
    of normal values has the relative standard error :math:`\sqrt{2 / m_e}` [1]_. Batch norm's are measured: a batch
    draws whole samples, so that the mean over B of them has the variance of the samples' means divided by B
    (cluster sampling, [2]_). It includes all that distinguishes the samples, contrast and brightness among them.

    References
    ----------
    .. [1] Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2,
       1946.
    .. [2] Kish, "Survey Sampling", Wiley 1965, chapter 5.

    Examples
    --------
    >>> import numpy as np
    >>> from cugn.diagnostics import diagnose
    >>> rng = np.random.default_rng(0)
    >>> x = rng.uniform(-1, 1, (4, 2, 64, 64)) * np.array([100, 0.1]).reshape(2, 1, 1)
    >>> diagnose(x, 1).squashed[0]
    Squashed(channel=1, std=0.00142..., by=(0,))
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}: it must be positive")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    plan = resolve("moments", x, groups, (("where", where),), eps, channel_axis, batch_axis, None)[1]
    by_channel = _by_channel(x, plan.C, channel_axis, batch_axis, where)
    N, G = len(by_channel.mean), plan.G
    batch = N if batch is None else batch
    labels = np.repeat(np.arange(G), plan.C // G) if plan.labels is None else plan.labels
    with np.errstate(all="ignore"):
        of_group = _merge_channels(by_channel, labels, G)
        rstd = of_group.rstd(eps)[:, labels]
        distance = by_channel.mean - of_group.mean[:, labels]
        of_channel = by_channel.m2 + np.where(by_channel.count > 0, by_channel.count * distance**2, 0)
        share = _over_samples(of_channel / of_group.m2[:, labels])

        spread = _spread(by_channel)
        std_after = np.sqrt(_over_samples(spread * rstd**2))
        squashed = tuple(
            Squashed(int(c), float(std_after[c]), _dominant(share, labels, int(c)))
            for c in np.flatnonzero((std_after < threshold) & (spread.max(axis=0, initial=0) > 0))
            if np.count_nonzero(labels == labels[c]) > 1  # alone in its group, only eps can squash it
        )
        entered = by_channel.count > 0
        inside = _sum_channels(np.where(entered, by_channel.count * spread, 0), labels, G)
        squares = _sum_channels(np.where(entered, by_channel.count * spread**2, 0), labels, G)
        values = of_group.count.astype(np.float64)
        effective = inside**2 / squares
        known = inside / of_group.m2  # the part of the group's variance that is not the distance of its channels
        batch_values, batch_effective, batch_mean_error, batch_var_error = _batch(by_channel, batch)
        return Diagnosis(
            labels=labels,
            std_before=np.sqrt(_over_samples(spread)),
            std_after=std_after,
            share=share,
            squashed=squashed,
            values=_over_samples(values),
            effective_values=_over_samples(effective),
            mean_error=np.sqrt(_over_samples(known / values)),
            var_error=np.sqrt(_over_samples(2 / effective * known**2)),
            batch=batch,
            batch_values=batch_values,
            batch_effective_values=batch_effective,
            batch_mean_error=batch_mean_error,
            batch_var_error=batch_var_error,
        )


def suggest_groups(
    x: Array,
    num_groups: int,
    *,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    where: Array | None = None,
) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Group channels of similar standard deviation, as labels for ``groups=``.

    Parameters
    ----------
    x, channel_axis, batch_axis, where
        As in `cugn.group_norm`.
    num_groups : int
        Number of groups, from 1 to C.

    Returns
    -------
    array of int, shape (C,)
        Label of each channel, 0 for the group with the smallest standard deviations; a NumPy array.

    Raises
    ------
    TypeError, ValueError
        As `cugn.group_norm`; ValueError if there are fewer channels than groups.

    Notes
    -----
    Of all partitions with this number of groups, the one with the largest geometric mean of the channels' standard
    deviations after normalization. (Each channel's variance over the mean variance of its group is an Itakura-Saito
    divergence, for which the best clusters are intervals of the sorted variances [1]_; dynamic programming finds the
    best intervals.) Distances between the channels' means do not enter; `diagnose` shows what they do.

    References
    ----------
    .. [1] Banerjee, Merugu, Dhillon, Ghosh, "Clustering with Bregman divergences", J. Machine Learning Research 6,
       2005.

    Examples
    --------
    >>> import numpy as np
    >>> from cugn.diagnostics import suggest_groups
    >>> scale = np.array([100, 0.1, 90, 0.2]).reshape(4, 1)
    >>> suggest_groups(np.random.default_rng(0).normal(size=(8, 4, 500)) * scale, 2)
    array([1, 0, 1, 0])
    """
    C = resolve("moments", x, 1, (("where", where),), 0.0, channel_axis, batch_axis, None)[1].C
    with np.errstate(all="ignore"):
        variance = _over_samples(_spread(_by_channel(x, C, channel_axis, batch_axis, where)))
    if not 1 <= num_groups <= C:
        raise ValueError(f"num_groups is {num_groups}: it must be from 1 to the {C} channels of x")
    usable = np.isfinite(variance) & (variance > 0)
    # A constant channel has nothing to lose: it goes with the smallest. NaN or Inf says nothing: with the largest.
    smallest, largest = (variance[usable].min(), variance[usable].max()) if usable.any() else (1.0, 1.0)
    variance = np.where(usable, variance, np.where(variance == 0, smallest, largest))
    order = np.argsort(variance, kind="stable")
    labels = np.empty(C, dtype=np.intp)
    labels[order] = _best_intervals(variance[order] / largest, num_groups)
    return labels


def _best_intervals(variance: Values, num_groups: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Interval of each of the sorted variances, so that sum(size * log(mean of the interval)) is least.

    best[j] is the least cost of the first j in the intervals so far. The prefix sums lose no accuracy: the variances
    rise, so that no interval's sum is small against the sum before it by more than the count.
    """
    C = len(variance)
    sums = np.concatenate([[0.0], np.cumsum(variance)])
    best = np.concatenate([[0.0], np.full(C, np.inf)])
    starts = np.zeros((num_groups, C + 1), dtype=np.intp)
    for g in range(num_groups):
        following = np.full(C + 1, np.inf)
        for j in range(g + 1, C - (num_groups - g - 1) + 1):
            i = np.arange(g, j)
            cost = best[i] + (j - i) * np.log((sums[j] - sums[i]) / (j - i))
            starts[g, j] = i[np.argmin(cost)]
            following[j] = cost.min()
        best = following
    intervals = np.empty(C, dtype=np.intp)
    end = C
    for g in reversed(range(num_groups)):
        intervals[starts[g, end] : end] = g
        end = starts[g, end]
    return intervals


def _by_channel(x: Array, C: int, channel_axis: int, batch_axis: Any, where: Array | None) -> Moments:
    """Moments of each channel of each sample, (N, C), as NumPy arrays."""
    m = moments(x, C, channel_axis=channel_axis, batch_axis=batch_axis, where=where)
    return Moments(*(array.reshape(-1, C) for array in _to_numpy(*m)))


def _to_numpy(*arrays: Array) -> list[Any]:
    """The small arrays of moments on the host, Dask's in one computation."""
    if "dask" in sys.modules and hasattr(arrays[0], "__dask_graph__"):
        import dask

        arrays = dask.compute(*arrays)
    return [np.asarray(array.get() if type(array).__module__.startswith("cupy") else array) for array in arrays]


def _sum_channels(values: Values, labels: Any, G: int) -> Values:
    """(N, G) sums over the channels of each group of (N, C) values."""
    return np.stack([values[:, labels == g].sum(axis=1) for g in range(G)], axis=1)


def _merge_channels(m: Moments, labels: Any, G: int) -> Moments:
    """Moments of the groups from those of their channels."""
    count = _sum_channels(m.count, labels, G)
    entered = m.count > 0
    # About the first channel with values, so that a mean far from zero costs no accuracy.
    first = np.stack([np.nanmax(np.where(entered & (labels == g), m.mean, -np.inf), axis=1) for g in range(G)], axis=1)
    offset = np.where(entered, m.mean - first[:, labels], 0)
    mean = first + _sum_channels(m.count * offset, labels, G) / count
    distance = np.where(entered, m.mean - mean[:, labels], 0)
    m2 = _sum_channels(m.m2 + m.count * distance**2, labels, G)
    return Moments(count, mean, m2)


def _spread(m: Moments) -> Values:
    """(N, C) variances within a sample; with a single position, the variance over the samples."""
    if m.count.max(initial=0) > 1:
        return np.asarray(m.var)
    return np.broadcast_to(np.nanvar(m.mean, axis=0, keepdims=True), m.mean.shape)


def _over_samples(values: Values) -> Values:
    """Mean over the samples of (N, ...) values, those without a value left out."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(axis=0) / known.sum(axis=0))


def _dominant(share: Values, labels: Any, channel: int) -> tuple[int, ...]:
    """The fewest other channels of the group with at least half of the others' share, the largest first."""
    others = np.flatnonzero((labels == labels[channel]) & (np.arange(len(labels)) != channel))
    others = others[np.argsort(-share[others], kind="stable")]
    reached = np.cumsum(share[others])
    return tuple(others[: int(np.searchsorted(reached, reached[-1] / 2)) + 1].tolist())


def _batch(m: Moments, batch: int) -> tuple[Values, Values, Values, Values]:
    """Values, effective values and relative errors of batch norm's mean and variance at this batch size, (C,)."""
    count = m.count.sum(axis=0)
    weight = m.count / count
    mean = np.where(m.count > 0, weight * m.mean, 0).sum(axis=0)
    # Each sample's part in mean and variance, as if all had the same count; their spread is what a batch draws from.
    square = m.var + (m.mean - mean) ** 2
    var = np.where(m.count > 0, weight * square, 0).sum(axis=0)
    values = batch * count / max(len(m.count), 1)
    if len(m.count) < 2:
        unknown = np.full(len(count), np.nan)
        return values, unknown, unknown, unknown
    mean_error = np.nanstd(m.mean, axis=0, ddof=1) / np.sqrt(batch * var)
    var_error = np.nanstd(square, axis=0, ddof=1) / (np.sqrt(batch) * var)
    return values, 1 / mean_error**2, mean_error, var_error


def _short(channels: Any) -> str:
    """``0-3, 7``: channels with runs joined; only the ends of long lists."""
    channels = np.sort(channels)
    runs = np.split(channels, np.flatnonzero(np.diff(channels) != 1) + 1)
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(words) if len(words) <= 3 else f"{words[0]}, {words[1]}, ... {words[-1]}"


def _span(values: Values) -> str:
    low, high = values.min(), values.max()
    return f"{low:.3g}" if low == high else f"{low:.3g} ... {high:.3g}"
