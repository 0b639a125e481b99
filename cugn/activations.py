"""Activations and their first two derivatives, array-agnostic, in float64.

References
----------
.. [1] Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
.. [2] Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", Neural Networks 107, 2018 (silu).
.. [3] Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23, 1969.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["activate", "curvature", "erfc", "slope"]

Array = Any

# Beyond it every gate is 0 or 1. Clipped there, z = -inf gives the limit 0 and no 0 * inf: a finite x can have such
# a z, under a mask that leaves its group no variance, or a weight at the end of the range.
_MOST = 1e3

_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715

# Cody's minimax approximations: erf(x) = x A(x^2)/B(x^2) to 0.46875, erfc(x) = exp(-x^2) C(x)/D(x) up to 4 and
# exp(-x^2)/x (1/sqrt(pi) - P(1/x^2)/(x^2 Q(1/x^2))) beyond; highest power first.
_A = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
_B = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_C = (
    *(2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1),
    *(2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3),
    1.23033935479799725e3,
)
_D = (
    *(1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3),
    *(3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)
_P = (
    *(1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1),
    *(1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4),
)
_Q = (
    *(1.0, 2.56852019228982242e0, 1.87295284992346725e0),
    *(5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
)


def activate(xp: Any, name: str | None, z: Array) -> Array:
    """act(z)."""
    if name is None:
        return z
    if name == "relu":
        return xp.where(z <= 0, xp.zeros_like(z), z)  # in this order a NaN stays one
    z = xp.clip(z, -_MOST, math.inf)
    return z * _gate(xp, name, z)


def slope(xp: Any, name: str | None, z: Array) -> Array:
    """act'(z); relu's is 0 at 0, as everywhere."""
    if name is None:
        return xp.ones_like(z)
    if name == "relu":
        return xp.where(z <= 0, xp.zeros_like(z), xp.where(z > 0, xp.ones_like(z), z))
    z = xp.clip(z, -_MOST, _MOST)
    gate = _gate(xp, name, z)
    return gate + z * _gate_slope(xp, name, z)


def curvature(xp: Any, name: str | None, z: Array) -> Array:
    """act''(z); zero for relu."""
    if name is None or name == "relu":
        return z * 0
    z = xp.clip(z, -_MOST, _MOST)
    first = _gate_slope(xp, name, z)
    if name == "gelu":
        second = -z * first
    else:
        t, t_slope, t_curvature = _exponent(xp, name, z)
        # g'' of the logistic g is g' (1 - 2 g), and 1 - 2 g is tanh(-t / 2)
        second = first * xp.tanh(-0.5 * t) * t_slope + _logistic_slope(xp, t) * t_curvature
    return 2 * first + z * second


def erfc(xp: Any, x: Array) -> Array:
    """Complementary error function, to 1e-15 of its value."""
    a = xp.abs(x)
    a = xp.where(a > 30, 30 * xp.ones_like(a), a)  # erfc(30) is 0 in float64
    small_square = xp.where(a > 1, xp.ones_like(a), a * a)
    small = 1 - a * _polynomial(_A, small_square) / _polynomial(_B, small_square)
    middle_a = xp.where(a > 4, 4 * xp.ones_like(a), a)
    # exp(-a^2) in two factors, the first with an exact square: the rounding of a^2 would cost a factor a^2 of accuracy.
    exact = xp.floor(a * 16) / 16
    decay = xp.exp(-exact * exact) * xp.exp(-(a - exact) * (a + exact))
    middle = decay * _polynomial(_C, middle_a) / _polynomial(_D, middle_a)
    large_a = xp.where(a < 4, 4 * xp.ones_like(a), a)
    inverse = 1 / (large_a * large_a)
    large = decay / large_a * (1 / math.sqrt(math.pi) - inverse * _polynomial(_P, inverse) / _polynomial(_Q, inverse))
    positive = xp.where(a <= 0.46875, small, xp.where(a <= 4, middle, large))
    return xp.where(x < 0, 2 - positive, positive)


def _gate(xp: Any, name: str, z: Array) -> Array:
    """Gate g of act(z) = z g(z): the normal distribution, or a logistic function of z or of a cubic in z."""
    if name == "gelu":
        return 0.5 * erfc(xp, -z / math.sqrt(2))
    t = _exponent(xp, name, z)[0]
    e = xp.exp(-xp.abs(t))  # never overflows
    return xp.where(t < 0, e, xp.ones_like(e)) / (1 + e)


def _gate_slope(xp: Any, name: str, z: Array) -> Array:
    """g'(z)."""
    if name == "gelu":
        return xp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    t, t_slope, _ = _exponent(xp, name, z)
    return _logistic_slope(xp, t) * t_slope


def _logistic_slope(xp: Any, t: Array) -> Array:
    """Slope of 1 / (1 + exp(-t)); as g (1 - g) it would lose all digits at large t, where z multiplies it."""
    e = xp.exp(-xp.abs(t))
    return e / ((1 + e) * (1 + e))


def _exponent(xp: Any, name: str, z: Array) -> tuple[Array, Any, Any]:
    """t of the logistic gate, and its first two derivatives by z."""
    z = xp.clip(z, -_MOST, _MOST)  # the square of 1e155 would be infinite
    if name == "silu":
        return z, 1.0, 0.0
    scale = 2 * _TANH_SCALE
    square = _TANH_CUBIC * z * z
    return scale * (z + square * z), scale * (1 + 3 * square), scale * 6 * _TANH_CUBIC * z


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = coefficients[0] + 0 * x
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
