"""Activations of a vector of lanes, fused into the kernels that apply them, and their slopes.

relu costs a comparison; silu and gelu_tanh an exponential and a division; gelu the normal distribution, which is
taken from erfc(a) exp(a^2) (1 + 2a), a polynomial in (a - K)/(a + K) [1]_. All of it is in lanes of the compute
dtype: exp is within 1u, the gates within 2u of 1, which is what act(z) needs beside the rounding of z.

References ---------- .. [1] Shepherd, Laframboise, "Chebyshev approximation of (1+2x)exp(x^2)erfc x", Math. Comp.
36, 1981.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from .compile import inner
from .convert import to_compute
from .simd import ROUNDER, fma, less, less_equal, select, times_power_of_two, vector_abs

# exp(r) for |r| <= log(2)/2: Chebyshev, to 3e-9 and 4e-18; lowest power first
_EXP = {
    "float32": (
        *(0.9999999999595482, 1.0000000377274485, 0.5000000107749384, 0.16666415477235322),
        *(0.04166621827440191, 0.008375128890467473, 0.0013948580818093912),
    ),
    "float64": (
        *(1.0, 1.0, 0.5000000000000019, 0.16666666666666702, 0.04166666666648808, 0.008333333333309526),
        *(0.0013888888952318045, 0.00019841269909219843, 2.480148547921643e-05, 2.755722495611072e-06),
        *(2.7632640675430235e-07, 2.5114870219497476e-08),
    ),
}
# log(2) in two parts, the first with few enough digits that its product with any exponent is exact
_LOG2 = {
    "float32": (0.693359375, -2.12194440054690583e-4),
    "float64": (0.693147180369123816490, 1.90821492927058770e-10),
}
_MOST_EXP = {"float32": 86.0, "float64": 708.0}  # exp up to there, and its inverse, are normal numbers
# (1 + 2a) exp(a^2) erfc(a) in powers of (a - K)/(a + K), to 1.5e-9 and 2e-17 of erfc(a)
_ERFC = {
    "float32": (
        2.5,
        (
            *(1.2648381802377981, -0.12235680075158781, -0.0990242416580846, 0.157630994361539),
            *(-0.10297053835625594, 0.03275205256865231, 0.000946759630325494, -0.004350492340489629),
            *(0.00046333752059866723, 0.0005757346293414969, -6.391786604416434e-05, -6.190753097048105e-05),
        ),
    ),
    "float64": (
        3.75,
        (
            *(1.2375126308378275, -0.14024059858554525, 0.0035854154854790257, 0.08227673848999506),
            *(-0.10880393014244462, 0.09230432116428125, -0.05869339857664934, 0.02836227737211114),
            *(-0.009746579683265262, 0.0017556261651970652, 0.000293714378044958, -0.00029015535246077655),
            *(5.164652974177416e-05, 2.2387565714911816e-05, -1.1438048033346894e-05, -9.792625707303523e-07),
            *(1.7419821586224816e-06, -5.084465378687302e-08, -2.4857126248016745e-07, 1.879082322370048e-08),
            *(3.197926671666804e-08, -1.9551358868985616e-09, -2.623107347133476e-09),
        ),
    ),
}
_TANH_SCALE, _TANH_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
_MOST = 1e3  # beyond it a gate is 0 or 1; z = -inf, and the square of 1e155, would make NaN of finite values of x


@inner
def _identity(z: Any) -> Any:
    return z


@inner
def _same(v: Any, z: Any) -> Any:
    return v


@cache
def polynomial(compute: str, coefficients: tuple[float, ...]) -> Any:
    """Horner's rule, unrolled."""
    lanes = to_compute(compute)
    source = "def horner(x):\n    value = lanes(c[0])\n"
    for k in range(1, len(coefficients)):
        source += f"    value = fma(value, x, lanes(c[{k}]))\n"
    scope: dict[str, Any] = {"fma": fma, "lanes": lanes, "c": tuple(float(c) for c in reversed(coefficients))}
    exec(source + "    return value\n", scope)
    return inner(scope["horner"])


@cache
def clipper(compute: str) -> Any:
    """clip(x, least, most): in this order of the comparisons a NaN stays one."""
    lanes = to_compute(compute)

    @inner
    def clip(x: Any, least: float, most: float) -> Any:
        low = lanes(least)
        high = lanes(most)
        x = select(less(x, low), low, x)
        return select(less(high, x), high, x)

    return clip


@cache
def exp_of(compute: str) -> Any:
    """exp of lanes, to the inverse of each other beyond the range of normal numbers."""
    lanes = to_compute(compute)
    clip = clipper(compute)
    horner = polynomial(compute, _EXP[compute])
    high, low = _LOG2[compute]
    most, per_log2, rounder = _MOST_EXP[compute], 1 / math.log(2), ROUNDER[compute]

    @inner
    def exp(x: Any) -> Any:
        x = clip(x, -most, most)
        rounded = fma(x, lanes(per_log2), lanes(rounder))
        k = rounded - lanes(rounder)
        r = fma(k, lanes(-low), fma(k, lanes(-high), x))
        return times_power_of_two(horner(r), rounded)

    return exp


@cache
def activation_kernels(compute: str, activation: str | None) -> tuple[Any, Any]:
    """act(z), and slope(v, z) = v * act'(z), on lanes."""
    if activation is None:
        return _identity, _same
    lanes = to_compute(compute)
    if activation == "relu":

        @inner
        def relu(z: Any) -> Any:
            zero = lanes(0.0)
            return select(less_equal(z, zero), zero, z)  # in this order a NaN stays one

        @inner
        def relu_slope(v: Any, z: Any) -> Any:
            zero = lanes(0.0)
            # a NaN of z goes on to the gradient
            return select(less_equal(z, zero), zero, select(less(zero, z), v, z))

        return relu, relu_slope

    gates = _gates(compute, activation)
    clip = clipper(compute)
    closed = -_closed_from(compute, activation)

    @inner
    def act(z: Any) -> Any:
        return select(less(z, lanes(closed)), lanes(0.0), z * gates(z)[0])

    @inner
    def slope(v: Any, z: Any) -> Any:
        gate, gate_slope, _ = gates(clip(z, -_MOST, _MOST))
        return select(less(z, lanes(closed)), lanes(0.0), v * fma(clip(z, -_MOST, _MOST), gate_slope, gate))

    return act, slope


@cache
def derivative_kernel(compute: str, activation: str | None) -> Any:
    """derivatives(z): act'(z) and act''(z), on lanes."""
    lanes = to_compute(compute)
    if activation is None or activation == "relu":
        slope = activation_kernels(compute, activation)[1]

        @inner
        def of_corners(z: Any) -> Any:
            return slope(lanes(1.0), z), z * lanes(0.0)

        return of_corners
    gates = _gates(compute, activation)
    clip = clipper(compute)

    @inner
    def derivatives(z: Any) -> Any:
        z = clip(z, -_MOST, _MOST)
        gate, gate_slope, gate_curvature = gates(z)
        return fma(z, gate_slope, gate), fma(z, gate_curvature, gate_slope + gate_slope)

    return derivatives


def _closed_from(compute: str, activation: str) -> float:
    """How far below zero a gate is taken for closed: there it would be the least that exp gives, and z may be 1e308."""
    most = _MOST_EXP[compute]
    if activation == "silu":
        return most
    if activation == "gelu":
        return math.sqrt(2 * most)
    z = most / _TANH_SCALE
    for _ in range(60):  # z (1 + cubic z^2) scale = most, by Newton's steps from above
        z -= (z * (1 + _TANH_CUBIC * z * z) * _TANH_SCALE - most) / (_TANH_SCALE * (1 + 3 * _TANH_CUBIC * z * z))
    return z


def _gates(compute: str, activation: str) -> Any:
    return normal_gate(compute) if activation == "gelu" else logistic_gate(compute, activation == "gelu_tanh")


@cache
def normal_gate(compute: str) -> Any:
    """The normal distribution, its density and the density's slope."""
    lanes = to_compute(compute)
    exp = exp_of(compute)
    middle, coefficients = _ERFC[compute]
    horner = polynomial(compute, coefficients)
    root_half, density = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)

    @inner
    def gates(z: Any) -> Any:
        most = lanes(30.0)
        a = vector_abs(z) * lanes(root_half)
        a = select(less(most, a), most, a)
        one = lanes(1.0)
        half = lanes(0.5)
        decay = exp(lanes(0.0) - a * a)
        # both quotients with one division
        far = a + lanes(middle)
        wide = fma(lanes(2.0), a, one)
        inverse = one / (far * wide)
        tail = half * decay * horner((a - lanes(middle)) * inverse * wide) * (inverse * far)
        gate = select(less(z, lanes(0.0)), tail, one - tail)
        slope = decay * lanes(density)
        return gate, slope, (lanes(0.0) - z) * slope

    return gates


@cache
def logistic_gate(compute: str, cubic: bool) -> Any:
    """1 / (1 + exp(-t)), its slope and its curvature, with t = z, or the cubic in z that gelu's tanh form has."""
    lanes = to_compute(compute)
    exp = exp_of(compute)
    clip = clipper(compute)
    linear, third = _TANH_SCALE, _TANH_SCALE * _TANH_CUBIC

    @inner
    def gates(z: Any) -> Any:
        one = lanes(1.0)
        t = z
        t_slope = one
        t_curvature = lanes(0.0)
        if cubic:
            t = clip(t, -_MOST, _MOST)
            square = t * t
            t_slope = fma(square, lanes(3.0 * third), lanes(linear))
            t_curvature = t * lanes(6.0 * third)
            t = t * fma(square, lanes(third), lanes(linear))
        e = exp(lanes(0.0) - t)
        inverse = one / (one + e)
        logistic_slope = e * inverse * inverse
        bend = (e - one) * inverse  # 1 - 2 gate, without the difference that would cancel
        slope = logistic_slope * t_slope
        return inverse, slope, fma(slope * bend, t_slope, logistic_slope * t_curvature)

    return gates
