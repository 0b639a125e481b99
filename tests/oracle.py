"""Independent oracle: the definition in extended precision, one group at a time, derivatives by the chain rule.

Nothing here comes from `cugn`. NumPy's longdouble carries 64 bits here (80-bit extended) and an exponent to 1e4932,
and each group is shifted by one of its own elements before anything is summed. Differences of float64 values within a
factor 2 of each other are exact, so at mean/std = 1e12 nothing is lost, and no square leaves the range. The oracle
itself is held against mpmath with 60 digits in `test_reference.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest

if np.finfo(np.longdouble).nmant < 63:
    pytest.skip("the oracle needs a longdouble of at least 64 bits", allow_module_level=True)

LONG = np.longdouble


class Forward(NamedTuple):
    """y, the scale of its error bound, and the statistics, all in longdouble."""

    y: Any
    scale: Any
    """|w| max(1, |x_hat|) + |b|, of x's shape: what the bounds of y are multiples of."""
    z: Any
    x_hat: Any
    mean: Any
    rstd: Any
    count: Any
    m2: Any


class Backward(NamedTuple):
    """Gradients in longdouble, and the scales of their error bounds."""

    dx: Any
    dweight: Any
    dbias: Any
    group_max: Any
    """Largest |dx| of the element's group, of x's shape."""
    terms: Any
    """Largest rstd (|q| + mean|q| + |x_hat| mean|q x_hat|) of the element's group: what dx is a difference of."""
    terms_left: Any
    """eps rstd^2 of them: what a group of two elements leaves, whose x_hat is +-1 but for eps."""
    dweight_terms: Any
    dbias_terms: Any


class Second(NamedTuple):
    """Tangent of y and gradients through the backward in longdouble, and the scales of their error bounds."""

    gdy: Any
    """Also ty of the jvp along the same tangents."""
    gx: Any
    gweight: Any
    gbias: Any
    gdy_terms: Any
    """Largest sum of the terms' sizes in the element's group, of x's shape."""
    gx_terms: Any
    gweight_terms: Any
    gbias_terms: Any


def labels_of(groups: Any, channels: int) -> np.ndarray:
    """Label of each channel."""
    if np.ndim(groups) == 0:
        return np.arange(channels) // max(1, channels // int(groups))
    return np.asarray(groups)


def to_ncs(a: Any, batch_axis: Any, channel_axis: int) -> np.ndarray:
    """(N, C, S) in longdouble."""
    a = np.asarray(a)
    a = (a.astype(np.float64) if a.dtype.name in ("bfloat16", "float16") else a).astype(LONG)
    batch, channel = axes_of(a.ndim, batch_axis, channel_axis)
    rest = [i for i in range(a.ndim) if i not in (*batch, channel)]
    n = int(np.prod([a.shape[i] for i in batch]))
    s = int(np.prod([a.shape[i] for i in rest]))
    return a.transpose(*batch, channel, *rest).reshape(n, a.shape[channel], s)


def from_ncs(a: np.ndarray, shape: tuple[int, ...], batch_axis: Any, channel_axis: int) -> np.ndarray:
    """Back to x's shape."""
    batch, channel = axes_of(len(shape), batch_axis, channel_axis)
    order = (*batch, channel, *[i for i in range(len(shape)) if i not in (*batch, channel)])
    return a.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def axes_of(ndim: int, batch_axis: Any, channel_axis: int) -> tuple[tuple[int, ...], int]:
    """Non-negative batch axes and channel axis."""
    batch = () if batch_axis is None else (batch_axis,) if np.ndim(batch_axis) == 0 else tuple(batch_axis)
    return tuple(i % ndim for i in batch), channel_axis % ndim


def act(name: str | None, z: np.ndarray) -> np.ndarray:
    """Activation, to longdouble's accuracy."""
    if name is None:
        return z
    if name == "relu":
        return np.where(z > 0, z, np.where(np.isnan(z), z, 0))
    return np.where(z == -np.inf, LONG(-0.0), z * gate(name, z))


def gate(name: str, z: np.ndarray) -> np.ndarray:
    """g of act(z) = z g(z)."""
    if name == "silu":
        return 1 / (1 + np.exp(-z))
    if name == "gelu_tanh":
        inner = np.sqrt(2 / LONG("3.14159265358979323846264338327950288")) * (z + LONG("0.044715") * z**3)
        return 1 / (1 + np.exp(-2 * inner))
    return _normal_cdf(z)


FAR = 1e4
"""From here on a gate is 0 or 1 to all digits, and 50 digits do not tell z + h from z for ever."""


def act_slope(name: str | None, z: np.ndarray) -> np.ndarray:
    """Derivative of the activation, by a central difference in 50 digits of the definition."""
    if name is None:
        return np.ones_like(z)
    if name == "relu":
        return np.where(np.isnan(z), z, (z > 0).astype(LONG))
    with mpmath.workdps(50):
        h = mpmath.mpf(10) ** -15

        def slope(value: Any) -> Any:
            if not np.abs(value) < FAR:
                return LONG(1 if value > 0 else 0 if value < 0 else np.nan)
            v = _mpf(value)
            return _long((mp_act(name, v + h) - mp_act(name, v - h)) / (2 * h))

        return np.array([slope(v) for v in z.ravel()], dtype=LONG).reshape(z.shape)


def act_curvature(name: str | None, z: np.ndarray) -> np.ndarray:
    """Second derivative of the activation, by a central difference in 50 digits of the definition."""
    if name in (None, "relu"):
        return np.zeros_like(z)
    with mpmath.workdps(50):
        h = mpmath.mpf(10) ** -12

        def curvature(value: Any) -> Any:
            if np.abs(value) >= FAR:
                return LONG(0)
            v = _mpf(value)
            return _long((mp_act(name, v + h) - 2 * mp_act(name, v) + mp_act(name, v - h)) / (h * h))

        return np.array([curvature(v) for v in z.ravel()], dtype=LONG).reshape(z.shape)


def mp_act(name: str | None, z: Any) -> Any:
    """Activation of one mpmath number."""
    if name is None:
        return z
    if name == "relu":
        return max(z, mpmath.mpf(0))
    if name == "silu":
        return z / (1 + mpmath.exp(-z))
    if name == "gelu":
        return z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    inner = mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)
    return z * (1 + mpmath.tanh(inner)) / 2


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    # beyond 200 it is 0 or 1 in the range of any dtype here, and mpmath has no erfc of 1e307
    values = np.where(np.isnan(z), z, (z > 0).astype(LONG))
    near = np.abs(z) <= 200
    with mpmath.workdps(30):
        values[near] = [_long(mpmath.erfc(-_mpf(v) / mpmath.sqrt(2)) / 2) for v in z[near]]
    return values


def _mpf(value: Any) -> Any:
    high = float(value)
    return mpmath.mpf(high) + mpmath.mpf(float(value - LONG(high)))


def _long(value: Any) -> Any:
    high = float(value)
    return LONG(high) + LONG(float(value - mpmath.mpf(high)))


class _Statistics(NamedTuple):
    d: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    count: np.ndarray


def _statistics(x: np.ndarray, kept: np.ndarray, channels: np.ndarray) -> _Statistics:
    """Of one group: deviations (N, D, S), mean, m2, count (N,)."""
    part, mask = x[:, channels, :], kept[:, channels, :]
    flat, flat_mask = part.reshape(len(x), -1), mask.reshape(len(x), -1)
    count = flat_mask.sum(axis=1)
    first = flat[np.arange(len(x)), flat_mask.argmax(axis=1)]
    d = part - first[:, None, None]
    entering = np.where(mask, d, 0)
    low = entering.reshape(len(x), -1).sum(axis=1) / count
    d = d - low[:, None, None]
    # once more: what the first division and subtraction rounded
    rest = np.where(mask, d, 0).reshape(len(x), -1).sum(axis=1) / count
    d = d - rest[:, None, None]
    square = np.where(mask, d, 0) ** 2
    return _Statistics(d, first + (low + rest), square.reshape(len(x), -1).sum(axis=1), count)


def _kept(where: Any, shape: tuple[int, ...], batch_axis: Any, channel_axis: int) -> np.ndarray:
    mask = np.ones(shape, dtype=bool) if where is None else np.broadcast_to(np.asarray(where), shape)
    return to_ncs(mask, batch_axis, channel_axis).astype(bool)


def _channel(vector: Any, channels: int, default: float) -> np.ndarray:
    if vector is None:
        return np.full((1, channels, 1), LONG(default))
    return np.asarray(vector).astype(np.float64).astype(LONG)[None, :, None]


def forward(
    x: Any,
    groups: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: Any = 0,
    where: Any = None,
    activation: str | None = None,
) -> Forward:
    """Group norm from its definition."""
    with np.errstate(all="ignore"):
        shape, a = np.shape(x), to_ncs(x, batch_axis, channel_axis)
        labels = labels_of(groups, a.shape[1])
        kept = _kept(where, shape, batch_axis, channel_axis)
        x_hat = np.empty_like(a)
        stats = [[], [], [], []]
        for g in range(labels.max(initial=-1) + 1):
            channels = np.flatnonzero(labels == g)
            s = _statistics(a, kept, channels)
            rstd = 1 / np.sqrt(s.m2 / s.count + LONG(eps))
            x_hat[:, channels, :] = s.d * rstd[:, None, None]
            for values, value in zip(stats, (s.mean, rstd, s.count, s.m2), strict=True):
                values.append(value)
        w, b = _channel(weight, a.shape[1], 1), _channel(bias, a.shape[1], 0)
        z = w * x_hat + b
        scale = np.abs(w) * np.maximum(1, np.abs(x_hat)) + np.abs(b)
        batch, _ = axes_of(len(shape), batch_axis, channel_axis)
        stats_shape = (*[shape[i] for i in batch], len(stats[0]))
        mean, rstd, count, m2 = (np.stack(v, axis=1).reshape(stats_shape) for v in stats)
        y, scale, z, x_hat = (
            from_ncs(v, shape, batch_axis, channel_axis) for v in (act(activation, z), scale, z, x_hat)
        )
    return Forward(y, scale, z, x_hat, mean, rstd, count, m2)


def backward(
    dy: Any,
    x: Any,
    groups: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: Any = 0,
    where: Any = None,
    activation: str | None = None,
) -> Backward:
    """Gradients of sum(dy y), each step of the forward turned round by the chain rule."""
    with np.errstate(all="ignore"):
        shape, a = np.shape(x), to_ncs(x, batch_axis, channel_axis)
        dz = to_ncs(dy, batch_axis, channel_axis)
        labels = labels_of(groups, a.shape[1])
        kept = _kept(where, shape, batch_axis, channel_axis)
        w, b = _channel(weight, a.shape[1], 1), _channel(bias, a.shape[1], 0)
        dx, x_hat, group_max, terms, left = (np.empty_like(a) for _ in range(5))
        for g in range(labels.max(initial=-1) + 1):
            channels = np.flatnonzero(labels == g)
            mask = kept[:, channels, :]
            s = _statistics(a, kept, channels)
            m = s.count[:, None, None]
            r = (1 / np.sqrt(s.m2 / s.count + LONG(eps)))[:, None, None]
            h = s.d * r
            x_hat[:, channels, :] = h
            if activation is not None:
                dz[:, channels, :] *= act_slope(activation, w[:, channels] * h + b[:, channels])
            q = w[:, channels] * dz[:, channels, :]

            def total(v: np.ndarray) -> np.ndarray:
                return v.reshape(len(v), -1).sum(axis=1)[:, None, None]

            # x_hat = d r;  r = (var + eps)^(-1/2);  var = sum_W d^2 / m;  d = x - mean;  mean = sum_W x / m
            # (all d and d_hat scaled by r, so that r^3 does not have to exist)
            grad_d_hat = q - np.where(mask, h * total(q * h) / m, 0)
            grad_mean = -total(grad_d_hat)
            grad = r * (grad_d_hat + np.where(mask, grad_mean / m, 0))
            if mask.all() and mask[0].size == 2:  # they cancel to eps r^2 of themselves: longdouble loses those digits
                _differentiate_pairs(grad, q, a[:, channels, :], eps)
            dx[:, channels, :] = grad
            size = r * (np.abs(q) + total(np.abs(q)) / m + np.abs(h) * total(np.abs(q * h)) / m)
            for scale, value in ((group_max, np.abs(grad)), (terms, size), (left, LONG(eps) * r**2 * size)):
                scale[:, channels, :] = np.max(value.reshape(len(value), -1), axis=1, initial=0)[:, None, None]
        by_channel = [np.sum(v, axis=(0, 2)) for v in (dz * x_hat, dz, np.abs(dz * x_hat), np.abs(dz))]
        shaped = [from_ncs(v, shape, batch_axis, channel_axis) for v in (dx, group_max, terms, left)]
    return Backward(shaped[0], by_channel[0], by_channel[1], *shaped[1:], by_channel[2], by_channel[3])


def _differentiate_pairs(grad: np.ndarray, q: np.ndarray, x: np.ndarray, eps: float) -> None:
    """Gradient of x from q = w dz, (N, ...) all, of groups of two elements: the formula itself, with 50 digits."""
    with mpmath.workdps(50):
        for n in range(len(q)):
            xs, qs = ([_mpf(v) for v in values[n].ravel()] for values in (x, q))
            variance = ((xs[0] - xs[1]) / 2) ** 2 + mpmath.mpf(eps)
            if not (mpmath.isfinite(sum(xs) + sum(qs)) and variance):
                continue
            r = 1 / mpmath.sqrt(variance)
            x_hat = [(v - sum(xs) / 2) * r for v in xs]
            along = sum(u * v for u, v in zip(x_hat, qs, strict=True)) / 2
            values = [v - sum(qs) / 2 - u * along for u, v in zip(x_hat, qs, strict=True)]
            nothing = max(abs(v) for v in qs) * mpmath.mpf(10) ** -40  # the last digits' noise
            grad[n] = np.reshape([_long(r * v) if abs(v) > nothing else 0 for v in values], grad[n].shape)


def second(
    u: Any,
    dy: Any,
    x: Any,
    groups: Any,
    weight: Any = None,
    bias: Any = None,
    tweight: Any = None,
    tbias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: Any = 0,
    where: Any = None,
    activation: str | None = None,
) -> Second:
    """Tangent of y along (u, tweight, tbias), and the gradients of sum(dy * tangent), by the chain rule step by step.

    That sum is sum(u dx) + sum(tweight dweight) + sum(tbias dbias), so the gradients are the double backward's.
    """
    with np.errstate(all="ignore"):
        shape, a = np.shape(x), to_ncs(x, batch_axis, channel_axis)
        u, dy = to_ncs(u, batch_axis, channel_axis), to_ncs(dy, batch_axis, channel_axis)
        labels = labels_of(groups, a.shape[1])
        kept = _kept(where, shape, batch_axis, channel_axis)
        vectors = [_channel(v, a.shape[1], d) for v, d in ((weight, 1), (bias, 0), (tweight, 0), (tbias, 0))]
        gdy, gx, gdy_terms, gx_terms = (np.empty_like(a) for _ in range(4))
        by_channel = np.zeros((4, a.shape[1]), LONG)

        def total(v: np.ndarray) -> np.ndarray:
            return v.reshape(len(v), -1).sum(axis=1)[:, None, None]

        for g in range(labels.max(initial=-1) + 1):
            channels = np.flatnonzero(labels == g)
            mask, ug, dyg = kept[:, channels, :], u[:, channels, :], dy[:, channels, :]
            w, b, tw, tb = (v[:, channels] for v in vectors)
            s = _statistics(a, kept, channels)
            m, d = s.count[:, None, None], s.d
            # the tangent's program
            r = 1 / np.sqrt(s.m2 / s.count + LONG(eps))[:, None, None]
            td = ug - total(np.where(mask, ug, 0)) / m
            tvar = 2 * total(np.where(mask, d * td, 0)) / m
            tr = -r * r * r * tvar / 2
            h, th = d * r, td * r + d * tr
            z, tz = w * h + b, w * th + tw * h + tb
            slope, curvature = act_slope(activation, z), act_curvature(activation, z)
            gdy[:, channels, :] = slope * tz
            # turned round
            of_tz, of_z = dyg * slope, dyg * curvature * tz
            of_h, of_th = w * of_z + tw * of_tz, w * of_tz
            of_tr = total(d * of_th)
            of_d, of_r = tr * of_th + r * of_h, total(td * of_th + d * of_h)
            of_tvar, of_r = -r * r * r * of_tr / 2, of_r - 3 * r * r * tvar * of_tr / 2
            of_d = of_d + np.where(mask, 2 * td * of_tvar / m, 0)
            of_var = -r * r * r * of_r / 2
            of_d = of_d + np.where(mask, 2 * d * of_var / m, 0)
            gx[:, channels, :] = of_d - np.where(mask, total(of_d) / m, 0)
            # sizes: of the terms that the results are sums of, a slope and a curvature counting as 1 more
            more = 0 if activation is None else 1
            slope_size, bend_size = np.abs(slope) + more, np.abs(curvature) + (more if activation != "relu" else 0)
            h_size, u_size = np.abs(h), np.abs(ug)
            pushed = (
                u_size + total(np.where(mask, u_size, 0)) / m + h_size * total(np.where(mask, u_size * h_size, 0)) / m
            )
            tz_size = np.abs(w) * r * pushed + np.abs(tw) * h_size + np.abs(tb)
            dz_size, gz_size = np.abs(dyg) * slope_size, np.abs(dyg) * bend_size * tz_size
            q_size, r_size = np.abs(w) * dz_size, np.abs(tw) * dz_size + np.abs(w) * gz_size

            def pulled(v: np.ndarray, h_size: np.ndarray = h_size, m: np.ndarray = m) -> np.ndarray:
                return v + total(v) / m + h_size * total(v * h_size) / m

            size = r * pulled(r_size) + r * r * (
                h_size * total(q_size * pushed) / m
                + total(q_size * h_size) / m * pushed
                + total(np.where(mask, u_size * h_size, 0)) / m * pulled(q_size)
            )
            for scale, value in ((gdy_terms, slope_size * tz_size), (gx_terms, size)):
                scale[:, channels, :] = np.max(value.reshape(len(value), -1), axis=1, initial=0)[:, None, None]
            sums = (h * of_z + th * of_tz, of_z, h_size * gz_size + r * pushed * dz_size, gz_size)
            for k, value in enumerate(sums):
                by_channel[k, channels] = value.sum(axis=(0, 2))
        arrays = (from_ncs(v, shape, batch_axis, channel_axis) for v in (gdy, gx, gdy_terms, gx_terms))
        gdy, gx, gdy_terms, gx_terms = arrays
    return Second(gdy, gx, by_channel[0], by_channel[1], gdy_terms, gx_terms, by_channel[2], by_channel[3])


def epsilon(dtype: Any) -> float:
    """Distance from 1 to the next value of a dtype, by its name."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[np.dtype(dtype).name]


def half_ulp(value: np.ndarray, dtype: Any) -> np.ndarray:
    """Half the distance between neighbours of `dtype` at `value`, subnormals included."""
    digits, least = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126), "float64": (53, -1022)}[
        np.dtype(dtype).name
    ]
    value = np.asarray(value, dtype=LONG)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(np.abs(value))
    exponent = np.where(value == 0, least, np.maximum(exponent - 1, least))
    return np.ldexp(LONG(1), exponent - digits)
