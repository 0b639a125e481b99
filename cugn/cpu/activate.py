"""Activations of a vector of lanes, fused into the kernels that apply them, and their slopes.

relu costs a comparison; silu and gelu_tanh an exponential and a division; gelu the normal distribution, which is
taken from erfc(a) exp(a^2) (1 + 2a), a polynomial in (a - K)/(a + K) [1]_. All of it is in lanes of the compute
dtype: exp is within 2u, the gates within 2u of 1, which is what act(z) needs beside the rounding of z.

References
----------
.. [1] Shepherd, Laframboise, "Chebyshev approximation of (1+2x)exp(x^2)erfc x", Math. Comp. 36, 1981.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from .compile import inner
from .convert import to_compute
from .powers import ROUNDER, above_floor, scales_any_power, times_power_of_floor, times_power_of_two
from .simd import fma, less, less_equal, select, vector_abs

# exp(-r) for |r| <= log(2)/2 by Remez's algorithm, relative errors 7.5e-8 and 2e-16, lowest power first. A gate has
# less than half of it: one digit more would cost an operation and be seen by nobody.
_EXP = {
    "float32": (
        *(1.0000000716970165, -0.9999996918077437, 0.49998894413170863),
        *(-0.16667575086270983, 0.04191543147363292, -0.008297648356573772),
    ),
    "float64": (
        *(1.0, -1.0000000000000064, 0.49999999999997286, -0.16666666666557656, 0.04166666666842739),
        *(-0.008333333384696242, 0.0013888888498912756, -0.00019841171345220726, 2.480191781217471e-05),
        *(-2.763978461400876e-06, 2.748843242522173e-07),
    ),
}
# 2^f for 0 <= f < 1, to as much
_EXP2 = {
    "float32": (
        *(0.9999999250635878, 0.6931530732026261, 0.24015361702112634),
        *(0.0558263181162335, 0.008989340023581907, 0.001877576700019989),
    ),
    "float64": (
        *(1.0000000000000002, 0.6931471805598912, 0.2402265069613608, 0.05550410862824481, 0.009618129409175977),
        *(0.0013333543730938329, 0.0001540395749118425, 1.524465964660374e-05, 1.3312720070473668e-06),
        *(9.46094519850042e-08, 9.952215187242476e-09),
    ),
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
def decay_of(compute: str) -> Any:
    """exp(-t) of lanes, for |t| up to _MOST_EXP.

    t + k log(2) is rounded once, and has the error of the constant, k 2e-9 in float32: where k is large a gate is
    nearly 0 or 1 and does not show it.
    """
    lanes = to_compute(compute)
    horner = polynomial(compute, _EXP[compute])
    log2, rounder = math.log(2), ROUNDER[compute]

    @inner
    def decay(t: Any) -> Any:
        rounded = fma(t, lanes(-1 / log2), lanes(rounder))
        k = rounded - lanes(rounder)
        return times_power_of_two(horner(fma(k, lanes(log2), t)), rounded)

    return decay


@cache
def odds_of(compute: str) -> Any:
    """exp(-t) of all lanes there are, where the CPU has the operations: t is neither clipped nor rounded to integers.

    t times log2(e) is rounded once: |t| u of the result, of which a gate shows |t| exp(-|t|) at most.
    """
    lanes = to_compute(compute)
    horner = polynomial(compute, _EXP2[compute])

    @inner
    def odds(t: Any) -> Any:
        power = t * lanes(-1 / math.log(2))
        return times_power_of_floor(horner(above_floor(power)), power)

    return odds


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

    return _normal_kernels(compute) if activation == "gelu" else _logistic_kernels(compute, activation == "gelu_tanh")


def _normal_kernels(compute: str) -> tuple[Any, Any]:
    lanes = to_compute(compute)
    gates, clip, most = normal_gate(compute), clipper(compute), _closed_from(_MOST_EXP[compute], "gelu")

    @inner
    def act(z: Any) -> Any:
        opened = z * gates(clip(z, -most, most))[0]
        return select(less(z, lanes(-most)), lanes(0.0), opened)

    @inner
    def slope(v: Any, z: Any) -> Any:
        near = clip(z, -most, most)
        gate, gate_slope, _ = gates(near)
        return select(less(z, lanes(-most)), lanes(0.0), v * fma(near, gate_slope, gate))

    return act, slope


def _logistic_kernels(compute: str, cubic: bool) -> tuple[Any, Any]:
    """z / (1 + e) and v (1 + e + z t'(z) e) / (1 + e)^2, with e = exp(-t(z)).

    One division, which other operations run beside: 0.88 of an estimate of 1/(1 + e) refined. Without clipping, 9.4
    cycles for 16 float32 instead of 11.2, and 12.9 instead of 15.4 for the slope.
    """
    lanes = to_compute(compute)
    unclipped, name = scales_any_power(), "gelu_tanh" if cubic else "silu"
    decay = odds_of(compute) if unclipped else decay_of(compute)
    argument, argument_slope = logistic_argument(compute, cubic)
    clip, most = clipper(compute), _closed_from(_MOST_EXP[compute], name)
    least = _closed_from(_MOST_EXP[compute] / 2, name)  # (1 + e)^2 is a number

    @inner
    def act(z: Any) -> Any:
        near = z if unclipped else clip(z, -most, most)
        opened = z / (lanes(1.0) + decay(argument(near)))
        return select(less(z, lanes(-most)), lanes(0.0), opened)

    @inner
    def slope(v: Any, z: Any) -> Any:
        near = select(less(lanes(most), z), lanes(most), z)  # an open gate's e is 0, and its cubic may be infinite
        if not unclipped:
            near = select(less(near, lanes(-least)), lanes(-least), near)
        e = decay(argument(near))
        below = lanes(1.0) + e
        opened = v * (fma(near * argument_slope(near) if cubic else near, e, below) / (below * below))
        return select(less(z, lanes(-least)), lanes(0.0), opened)

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

    most = _closed_from(_MOST_EXP[compute], activation)

    @inner
    def derivatives(z: Any) -> Any:
        z = clip(z, -most, most)
        gate, gate_slope, gate_curvature = gates(z)
        return fma(z, gate_slope, gate), fma(z, gate_curvature, gate_slope + gate_slope)

    return derivatives


def _closed_from(most: float, activation: str) -> float:
    """How far below zero a gate is taken for closed, where it is exp(-most); as far above it is 1."""
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
    """The normal distribution, its density and the density's slope, where exp(-z^2/2) is a normal number."""
    lanes = to_compute(compute)
    decay = decay_of(compute)
    middle, coefficients = _ERFC[compute]
    horner = polynomial(compute, coefficients)
    root_half, density = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)

    @inner
    def gates(z: Any) -> Any:
        a = vector_abs(z) * lanes(root_half)
        one = lanes(1.0)
        half = lanes(0.5)
        peak = decay(a * a)
        # both quotients with one division
        far = a + lanes(middle)
        wide = fma(lanes(2.0), a, one)
        inverse = one / (far * wide)
        tail = half * peak * horner((a - lanes(middle)) * inverse * wide) * (inverse * far)
        gate = select(less(z, lanes(0.0)), tail, one - tail)
        slope = peak * lanes(density)
        return gate, slope, (lanes(0.0) - z) * slope

    return gates


@cache
def logistic_argument(compute: str, cubic: bool) -> tuple[Any, Any]:
    """t, which is z or the cubic in z that gelu's tanh form has, and its slope."""
    lanes = to_compute(compute)
    linear, third = _TANH_SCALE, _TANH_SCALE * _TANH_CUBIC

    @inner
    def argument(z: Any) -> Any:
        return z * fma(z * z, lanes(third), lanes(linear)) if cubic else z

    @inner
    def argument_slope(z: Any) -> Any:
        return fma(z * z, lanes(3.0 * third), lanes(linear)) if cubic else lanes(1.0)

    return argument, argument_slope


@cache
def logistic_gate(compute: str, cubic: bool) -> Any:
    """1 / (1 + exp(-t)), its slope and its curvature, with t the `logistic_argument` of z, up to _MOST_EXP."""
    lanes = to_compute(compute)
    decay, third = decay_of(compute), _TANH_SCALE * _TANH_CUBIC
    argument, argument_slope = logistic_argument(compute, cubic)

    @inner
    def gates(z: Any) -> Any:
        one = lanes(1.0)
        t_slope = argument_slope(z)
        t_curvature = z * lanes(6.0 * third) if cubic else lanes(0.0)
        e = decay(argument(z))
        inverse = one / (one + e)
        logistic_slope = e * inverse * inverse
        bend = (e - one) * inverse  # 1 - 2 gate, without the difference that would cancel
        slope = logistic_slope * t_slope
        return inverse, slope, fma(slope * bend, t_slope, logistic_slope * t_curvature)

    return gates
