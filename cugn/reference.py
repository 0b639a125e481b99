"""The formulas, once, for every array library of the Python array API standard: the oracle of the other engines.

Everything is computed in float64 and rounded once. With x_hat = (x - mean) * rstd, W the mask (1 where an element
enters the statistics), m the number of those elements in a group, E_W[v] = sum(W v) / m and E[v] = sum(v) / m:

- forward: z = w x_hat + b, y = act(z);
- tangent of x_hat: rstd J(t), with J(t) = t - E_W[t] - x_hat E_W[t x_hat];
- its transpose, the backward: rstd Jt(q), with Jt(q) = q - W (E[q] + x_hat E[q x_hat]), q = w dz.

References
----------
.. [1] Wu, He, "Group Normalization", ECCV 2018, arXiv:1803.08494.
.. [2] Ioffe, Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167 (the backward's projection).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from .activations import activate, curvature, slope
from .plan import Plan

__all__ = [
    "backward",
    "backward_apply",
    "backward_sums",
    "double_backward",
    "forward",
    "jvp",
    "moments",
    "normalize",
    "serves",
]

Array = Any


def serves(plan: Plan, operation: str) -> bool:
    """Everything is served."""
    return True


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output and statistics of each group."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        x_hat, mean, rstd = group.normalized()
        y = activate(group.xp, plan.activation, group.affine(x_hat, weight, bias))
        return group.restored(y, x, out), group.statistics(mean), group.statistics(rstd)


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, None)
        y = activate(group.xp, plan.activation, group.affine(group.under(mean, rstd), weight, bias))
        return group.restored(y, x, out)


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        _, mean, m2, scale = group.centred()
        count = group.xp.astype(group.count, group.xp.int64)
        return tuple(group.statistics(s) for s in (count, mean, m2 / scale / scale))


def backward(
    plan: Plan,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    mean: Array,
    rstd: Array,
    where: Array,
    out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        x_hat, _, rstd = group.normalized(mean, rstd)
        dz = group.bent(dy, x_hat, weight, bias)
        own = rstd if mean is None else None
        dx = group.of_channels(rstd)[:, :, None] * group.pulled_back(x_hat, group.weighted(dz, weight), own)
        dweight, dbias = group.over_samples(dz * x_hat), group.over_samples(dz)
        return group.restored(dx, dy, out), group.like_weight(dweight, dy, weight), group.like_weight(dbias, dy, weight)


def backward_sums(
    plan: Plan, dy: Array, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array
) -> tuple[Array, Array, Array, Array]:
    """Sums of w dz and w dz x_hat over the groups, of dz x_hat and dz over samples, under supplied statistics."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, None)
        x_hat = group.under(mean, rstd)
        dz = group.bent(dy, x_hat, weight, bias)
        q = group.weighted(dz, weight)
        sums = group.statistics(group.total(q)), group.statistics(group.total(q * x_hat))
        return *sums, group.over_samples(dz * x_hat), group.over_samples(dz)


def backward_apply(
    plan: Plan,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    mean_wdy: Array,
    mean_wdy_xhat: Array,
    weight: Array,
    bias: Array,
    where: Array,
    out: Array,
) -> Array:
    """Gradient with respect to x under supplied statistics and supplied means of w dz and w dz x_hat."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        x_hat = group.under(mean, rstd)
        q = group.weighted(group.bent(dy, x_hat, weight, bias), weight)
        first, second, r = (
            group.of_channels(group.given(values))[:, :, None] for values in (mean_wdy, mean_wdy_xhat, rstd)
        )
        # In this order a group of one element, where q == first, gives exactly 0.
        dx = (q - first) - x_hat * second if where is None else q - group.kept(first + x_hat * second)
        return group.restored(r * dx, dy, out)


def jvp(
    plan: Plan,
    tx: Array,
    x: Array,
    weight: Array,
    bias: Array,
    tweight: Array,
    tbias: Array,
    where: Array,
    out: Array,
) -> Array:
    """Tangent of the output along tangents of x, weight and bias."""
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        x_hat, _, rstd = group.normalized()
        ty = group.of_channels(rstd)[:, :, None] * group.pushed_forward(x_hat, group.canonical(tx))
        ty = group.weighted(ty, weight)
        if tweight is not None or tbias is not None:
            ty = ty + group.affine(x_hat if tweight is not None else 0 * x_hat, tweight, tbias)
        if plan.activation is not None:
            ty = ty * slope(group.xp, plan.activation, group.affine(x_hat, weight, bias))
        return group.restored(ty, tx, out)


def double_backward(
    plan: Plan,
    ddx: Array,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    ddweight: Array,
    ddbias: Array,
    where: Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of ``sum(ddx dx) + sum(ddweight dweight) + sum(ddbias dbias)`` with respect to dy, x, weight, bias.

    With u = ddx, H = sum(q J(u)) over a group, a = E_W[u x_hat] and b = E[q x_hat]::

        gdz = rstd w J(u) + ddweight x_hat + ddbias
        gx = rstd Jt(ddweight dz) - rstd^2 (W (H / m x_hat + b J(u)) + a Jt(q))
        gweight = sum(dz rstd J(u))

    and where z itself is bent by an activation, gdz dy act''(z) flows back through z.
    """
    with np.errstate(all="ignore"):
        group = _Groups(plan, x, where)
        xp = group.xp
        x_hat, _, rstd = group.normalized()
        r = group.of_channels(rstd)[:, :, None]
        dz = dy_ = group.canonical(dy)
        z = None
        if plan.activation is not None:
            z = group.affine(x_hat, weight, bias)
            dz = dy_ * slope(xp, plan.activation, z)
        u, q = group.canonical(ddx), group.weighted(dz, weight)
        pushed = group.pushed_forward(x_hat, u)

        gdz = group.weighted(r * pushed, weight)
        from_x_hat = xp.zeros_like(x_hat)  # cotangent of x_hat beyond that of rstd * Jt
        if ddweight is not None:
            from_x_hat = group.weighted(dz, ddweight)
            gdz = gdz + group.weighted(x_hat, ddweight)
        if ddbias is not None:
            gdz = gdz + group.canonical_channels(ddbias)
        gweight, gbias = group.over_samples(dz * r * pushed), group.over_samples(xp.zeros_like(x_hat))
        gdy = gdz
        if z is not None:
            gdy = gdz * slope(xp, plan.activation, z)
            gz = gdz * dy_ * curvature(xp, plan.activation, z)
            from_x_hat = from_x_hat + group.weighted(gz, weight)
            gweight, gbias = gweight + group.over_samples(gz * x_hat), group.over_samples(gz)

        a = group.of_channels(group.total(group.kept(u * x_hat)) / group.count)[:, :, None]
        b = group.of_channels(group.total(q * x_hat) / group.count)[:, :, None]
        h = group.of_channels(group.total(q * pushed) / group.count)[:, :, None]
        gx = r * group.pulled_back(x_hat, from_x_hat) - r * r * (
            group.kept(h * x_hat + b * pushed) + a * group.pulled_back(x_hat, q)
        )
        return (
            group.restored(gdy, dy, None),
            group.restored(gx, dy, None),
            group.like_weight(gweight, dy, weight),
            group.like_weight(gbias, dy, weight),
        )


class _Groups:
    """x as (N, C, S) in float64, with sums over its groups, and the way back."""

    def __init__(self, plan: Plan, x: Array, where: Array) -> None:
        self.plan, self.xp = plan, array_namespace(x)
        self.axes = (*plan.batch_axes, plan.channel_axis, *plan.spatial_axes)
        self.x = self.canonical(x)
        self.mask = None
        if where is not None:
            self.mask = self.xp.reshape(
                self.xp.permute_dims(self.xp.broadcast_to(where, plan.shape), self.axes), self.x.shape
            )
        ones = self.xp.ones_like(self.x) if self.mask is None else self.xp.astype(self.mask, self.x.dtype)
        self.count = self.total(ones)

    def canonical(self, array: Array) -> Array:
        """(N, C, S) in float64 of an array of x's shape."""
        array = self.xp.permute_dims(_float64(self.xp, array), self.axes)
        return self.xp.reshape(array, (self.plan.N, self.plan.C, self.plan.S))

    def canonical_channels(self, vector: Array) -> Array:
        """(1, C, 1) in float64 of an array of shape (C,)."""
        return _float64(self.xp, vector)[None, :, None]

    def given(self, statistics: Array) -> Array:
        """(N, G) of statistics in the caller's shape."""
        broadcast = self.xp.broadcast_to(_float64(self.xp, statistics), self.plan.stats_shape)
        return self.xp.reshape(broadcast, (self.plan.N, self.plan.G))

    def statistics(self, values: Array) -> Array:
        """Statistics in the caller's shape of (N, G) values."""
        return self.xp.reshape(values, self.plan.stats_shape)

    def total(self, values: Array) -> Array:
        """(N, G) sums over the groups of (N, C, S) values."""
        return self._over_groups(_pairwise_sum(self.xp, values), _pairwise_sum)

    def largest(self, values: Array) -> Array:
        """(N, G) maxima over the groups of the absolute (N, C, S) values."""
        return self._over_groups(self.xp.max(self.xp.abs(values), axis=2), lambda xp, v: xp.max(v, axis=-1))

    def of_channels(self, values: Array) -> Array:
        """(N, C): for each channel the value of its group."""
        plan, xp = self.plan, self.xp
        if plan.labels is not None:
            return xp.take(values, self._indices(plan.labels), axis=1)
        spread = xp.broadcast_to(values[:, :, None], (plan.N, plan.G, plan.C // max(plan.G, 1)))
        return xp.reshape(spread, (plan.N, plan.C))

    def kept(self, values: Array) -> Array:
        """(N, C, S) values that enter the statistics, zero elsewhere (so that a NaN there does no harm)."""
        return values if self.mask is None else self.xp.where(self.mask, values, self.xp.zeros_like(values))

    def over_samples(self, values: Array) -> Array:
        """(C,) sums of (N, C, S) values."""
        return _pairwise_sum(self.xp, self.xp.permute_dims(_pairwise_sum(self.xp, values), (1, 0)))

    def weighted(self, values: Array, weight: Array) -> Array:
        """Values times weight, (N, C, S)."""
        return values if weight is None else values * self.canonical_channels(weight)

    def affine(self, values: Array, weight: Array, bias: Array) -> Array:
        """Values times weight plus bias, (N, C, S)."""
        values = self.weighted(values, weight)
        return values if bias is None else values + self.canonical_channels(bias)

    def guard(self) -> Array:
        """(N, G) powers of two with which sums of x neither overflow nor lose bits below the normal range.

        1 unless x is float64 and beyond 2^900 or below 2^-900 in the whole group; what a mask leaves out is not lost
        for it either.
        """
        xp, guard = self.xp, self.xp.ones_like(self.count)
        if self.plan.x_dtype == "float64" and self.plan.size > 0:
            largest = self.largest(self.kept(self.x))
            every = largest if self.mask is None else self.largest(self.x)
            guard = xp.where((largest > 2.0**900) & xp.isfinite(largest), 2.0**-100 * guard, guard)
            guard = xp.where((largest < 2.0**-900) & (every < 2.0**900), 2.0**100 * guard, guard)
        return guard

    def guarded(self, guard: Array) -> Array:
        """X times guard, (N, C, S)."""
        return self.x * self.of_channels(guard)[:, :, None] if self.plan.x_dtype == "float64" else self.x

    def centred(self) -> tuple[Array, Array, Array, Array]:
        """(x - mean) * scale (N, C, S), then mean, m2 * scale^2 and the scale, (N, G).

        The mean is taken twice, the second time of the differences from the first: one float64 alone is off by 1e-4
        standard deviations at mean/std = 1e12. The scale is a power of two that brings the larger of max|x - mean|
        and sqrt(eps) to about 1, so that no square leaves the range; it is 1 unless x is float64.
        """
        guard = self.guard()
        x = self.guarded(guard)
        high = self.total(self.kept(x)) / self.count
        d = x - self.of_channels(high)[:, :, None]
        low = self.total(self.kept(d)) / self.count
        d = d - self.of_channels(low)[:, :, None]
        scale = guard
        if self.plan.x_dtype == "float64" and self.plan.size > 0:
            factor = self._inverse(self.largest(self.kept(d)), math.sqrt(self.plan.eps) * guard)
            d, scale = d * self.of_channels(factor)[:, :, None], guard * factor
        kept = self.kept(d)
        return d, (high + low) / guard, self.total(kept * kept), scale

    def normalized(self, mean: Array = None, rstd: Array = None) -> tuple[Array, Array, Array]:
        """x_hat (N, C, S), mean and rstd (N, G); rstd and a first mean may be supplied."""
        plan, xp = self.plan, self.xp
        if mean is not None:
            rstd, guard = self.given(rstd), self.guard()
            d = self.guarded(guard) - self.of_channels(self.given(mean) * guard)[:, :, None]
            d = d - self.of_channels(self.total(self.kept(d)) / self.count)[:, :, None]
            return d * self.of_channels(rstd / guard)[:, :, None], mean, rstd
        d, mean, m2, scale = self.centred()
        scaled_rstd = 1 / xp.sqrt(m2 / self.count + plan.eps * scale * scale)
        return d * self.of_channels(scaled_rstd)[:, :, None], mean, scaled_rstd * scale

    def under(self, mean: Array, rstd: Array) -> Array:
        """x_hat (N, C, S) under statistics that the caller supplies, taken as they are."""
        guard = self.guard()
        shift, scale = self.of_channels(self.given(mean) * guard), self.of_channels(self.given(rstd) / guard)
        return (self.guarded(guard) - shift[:, :, None]) * scale[:, :, None]

    def bent(self, dy: Array, x_hat: Array, weight: Array, bias: Array) -> Array:
        """dz = dy act'(z), (N, C, S)."""
        dz = self.canonical(dy)
        if self.plan.activation is None:
            return dz
        return dz * slope(self.xp, self.plan.activation, self.affine(x_hat, weight, bias))

    def pushed_forward(self, x_hat: Array, t: Array) -> Array:
        """J(t) = t - E_W[t] - x_hat E_W[t x_hat]."""
        kept = self.kept(t)
        first = self.of_channels(self.total(kept) / self.count)[:, :, None]
        second = self.of_channels(self.total(self.kept(t * x_hat)) / self.count)[:, :, None]
        return (t - first) - x_hat * second

    def pulled_back(self, x_hat: Array, q: Array, rstd: Array = None) -> Array:
        """Jt(q) = q - W (E[q] + x_hat E[q x_hat]).

        In a group of two elements, x_hat^2 is 1 - eps rstd^2 and the terms cancel to eps rstd^2 (q - E[q]); with the
        group's own rstd, that is what is computed: the difference would be wrong from the 11th digit on.
        """
        first = self.of_channels(self.total(q) / self.count)[:, :, None]
        second = self.of_channels(self.total(q * x_hat) / self.count)[:, :, None]
        if self.mask is None:
            result = (q - first) - x_hat * second
            if rstd is None:
                return result
            root = math.sqrt(self.plan.eps) * rstd
            share = self.of_channels(root * root)[:, :, None]
            return self.xp.where(self.of_channels(self.count)[:, :, None] == 2, share * (q - first), result)
        return q - self.kept(first + x_hat * second)

    def restored(self, values: Array, like: Array, out: Array) -> Array:
        """(N, C, S) values in x's shape, y's dtype; in `out` where there is one."""
        plan, xp = self.plan, self.xp
        shape = [plan.shape[axis] for axis in self.axes]
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        array = xp.permute_dims(xp.reshape(values, tuple(shape)), tuple(inverse))
        if out is not None:
            out[...] = _cast(xp, array, out.dtype)
            return out
        return _cast(xp, array, like.dtype if plan.y_dtype == plan.x_dtype else xp.float32)

    def like_weight(self, values: Array, like: Array, weight: Array) -> Array:
        """(C,) values in the dtype of the weight, or of `like`."""
        return _cast(self.xp, values, like.dtype if weight is None else weight.dtype)

    def _inverse(self, largest: Array, floor: Array) -> Array:
        """(N, G) powers of two that bring the larger of `largest` and `floor` to [1/4, 1/2).

        Less than 1/2, so that rstd is more than 1: values that a mask leaves out overflow no sooner than x_hat does.
        """
        xp = self.xp
        largest = xp.where(largest > floor, largest, floor)
        exponent = 2 + xp.floor(xp.log2(xp.where(xp.isfinite(largest) & (largest > 0), largest, xp.ones_like(largest))))
        # 2^900, times a guard of 2^100, is far enough: the square of the least float64 times it is 1e-38.
        return 2.0 ** -xp.where(exponent < -900, -900 * xp.ones_like(exponent), exponent)

    def _over_groups(self, values: Array, reduce: Any) -> Array:
        """(N, G) reduction over the channels of each group of (N, C) values."""
        plan, xp = self.plan, self.xp
        if plan.labels is None:
            return reduce(xp, xp.reshape(values, (plan.N, plan.G, plan.C // max(plan.G, 1))))
        if plan.G == 0:  # labels of no channels
            return values
        ordered = xp.take(values, self._indices(plan.channel_order), axis=1)
        bounds = [int(bound) for bound in plan.group_bounds]
        # Sorted by value, so that a sum has the same bits in whatever order the channels come.
        parts = [xp.sort(ordered[:, a:b], axis=1) for a, b in pairwise(bounds)]
        return xp.stack([reduce(xp, part) for part in parts], axis=1)

    def _indices(self, values: np.ndarray[Any, Any]) -> Array:
        return self.xp.asarray(values.tolist(), dtype=self.xp.int64, device=device(self.x))


def _float64(xp: Any, array: Array) -> Array:
    """The array in float64; a TypeError where the library is set to have none."""
    converted = _cast(xp, array, xp.float64)
    if converted.dtype != xp.float64:
        raise TypeError(f"x is in a library set to {converted.dtype}: cugn computes in float64 (jax: jax_enable_x64)")
    return converted


def _cast(xp: Any, array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else xp.astype(array, dtype)


def _pairwise_sum(xp: Any, values: Array) -> Array:
    """Sum over the last axis by halves, with an error that grows as the logarithm of the number of terms.

    The libraries' own sums add up one by one along an axis that is not contiguous (three times the promised error at
    S = 33,000, channels last), and in an order that depends on what else the array holds.
    """
    n = values.shape[-1]
    if n == 0:
        return xp.sum(values, axis=-1)
    rest = xp.zeros_like(values[..., 0])
    while n > 1:
        if n % 2:
            rest = rest + values[..., n - 1]
        n //= 2
        values = values[..., :n] + values[..., n : 2 * n]
    return values[..., 0] + rest
