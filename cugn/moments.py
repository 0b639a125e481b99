"""Moments: the statistics of groups as values that can be merged."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .plan import checked_eps

__all__ = ["Moments"]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each group.

    The moments of parts of an array (chunks, tiles, shards) merge into those of the whole, in any order.

    Attributes
    ----------
    count : array of int64
        Number of elements that entered, of the batch shape followed by G.
    mean : array of float64
        Their mean; NaN where count is zero.
    m2 : array of float64
        The sum of their squared differences from the mean.

    Notes
    -----
    Merging is associative to rounding: with float64 means the variance of parts whose means agree to within k standard
    deviations keeps a relative accuracy of about 1e-16 (1 + k^2 + k r), r being the mean in standard deviations.

    References
    ----------
    .. [1] Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
       COMPSTAT 1982.

    Examples
    --------
    >>> import numpy as np, cugn
    >>> x = np.random.default_rng(0).normal(1e4, 1, (2, 8, 1000))
    >>> whole = cugn.moments(x, 4)
    >>> parts = cugn.moments(x[..., :300], 4).merge(cugn.moments(x[..., 300:], 4))
    >>> bool(np.allclose(parts.var, whole.var, rtol=1e-12))
    True
    """

    count: Any
    mean: Any
    m2: Any

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets of elements.

        Parameters
        ----------
        other : Moments
            Of the same shape and array library; empty groups are neutral.

        Returns
        -------
        Moments
            Of the elements of both.

        Raises
        ------
        TypeError
            If `other` is no Moments.
        ValueError
            If its shape is another.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is a {type(other).__name__}: it must be Moments")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other has shape {other.mean.shape}: it must be {self.mean.shape}")
        xp = _namespace(self.mean)
        with np.errstate(all="ignore"):
            a, b = xp.astype(self.count, xp.float64), xp.astype(other.count, xp.float64)
            total = a + b
            share = b / total
            # An empty side has a NaN mean: the other one's mean then stands, and the difference is zero.
            left = xp.where(a > 0, self.mean, other.mean)
            right = xp.where(b > 0, other.mean, self.mean)
            delta = right - left
            delta = xp.where((a > 0) & (b > 0), delta, xp.zeros_like(delta))
            # (delta * a) * (delta * share): each factor stays in range where delta^2 would not.
            return Moments(
                self.count + other.count,
                left + delta * share,
                self.m2 + other.m2 + xp.where(delta == 0, delta, (delta * a) * (delta * share)),
            )

    @property
    def var(self) -> Any:
        """Variance ``m2 / count`` (ddof 0); NaN where count is zero."""
        xp = _namespace(self.mean)
        with np.errstate(all="ignore"):
            return self.m2 / xp.astype(self.count, xp.float64)

    def rstd(self, eps: float = 1e-5) -> Any:
        """``1 / sqrt(var + eps)``.

        Parameters
        ----------
        eps : float
            Added to the variance; finite and >= 0.

        Returns
        -------
        array of float64
            Of the shape of `mean`.

        Raises
        ------
        TypeError
            If eps is no real number.
        ValueError
            If it is not finite or negative.
        """
        eps = checked_eps(eps)
        with np.errstate(all="ignore"):
            return 1 / _namespace(self.mean).sqrt(self.var + eps)


def _namespace(array: Any) -> Any:
    from array_api_compat import array_namespace

    return array_namespace(array)
