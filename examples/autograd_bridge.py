"""Teach HIPS autograd (https://github.com/HIPS/autograd) the group norm of cugn, with second derivatives.

    python examples/autograd_bridge.py

Autograd differentiates plain NumPy code. It learns a foreign function by its vector-Jacobian product, and gets second
derivatives if that product is itself a function whose product it knows: here `cugn.group_norm_backward` and
`cugn.group_norm_double_backward`. Forward mode takes `cugn.group_norm_jvp`. The example fits the weight and bias
of a group norm under a penalty on the gradient with respect to the image, which needs all of them.
"""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import grad
from autograd.extend import defjvp_argnums, defvjp_argnums, primitive

import cugn

Array = Any


@primitive
def group_norm(x: Array, weight: Array, bias: Array, groups: Any, **options: Any) -> Array:
    """`cugn.group_norm`, the differentiable arguments first; options are its keywords."""
    return cugn.group_norm(x, groups, weight, bias, **options)


@primitive
def group_norm_backward(dy: Array, x: Array, weight: Array, bias: Array, groups: Any, **options: Any) -> tuple:
    """The gradients (dx, dweight, dbias), as one node of autograd's graph: one pass gives all three."""
    return tuple(cugn.group_norm_backward(np.asarray(dy), x, groups, weight, bias, **options))


def _vjp(argnums: tuple[int, ...], y: Array, args: tuple, options: dict) -> Any:
    x, weight, bias, groups = args

    def product(dy: Array) -> tuple:
        gradients = group_norm_backward(dy, x, weight, bias, groups, **options)
        return tuple(gradients[i] for i in argnums)

    return product


def _vjp_of_backward(argnums: tuple[int, ...], gradients: tuple, args: tuple, options: dict) -> Any:
    dy, x, weight, bias, groups = args

    def product(cotangents: tuple) -> tuple:
        ddx, ddweight, ddbias = (np.asarray(c) for c in cotangents)
        second = cugn.group_norm_double_backward(
            ddx, dy, x, groups, weight, bias, ddweight=ddweight, ddbias=ddbias, **options
        )
        wanted = (*second, second.gbias)
        return tuple(wanted[i] for i in argnums)

    return product


def _jvp(argnums: tuple[int, ...], tangents: tuple, y: Array, args: tuple, options: dict) -> Array:
    x, weight, bias, groups = args
    given = dict(zip(argnums, tangents, strict=True))
    tx = given.get(0, np.zeros_like(x))
    return cugn.group_norm_jvp(tx, x, groups, weight, bias, tweight=given.get(1), tbias=given.get(2), **options)


defvjp_argnums(group_norm, _vjp)
defvjp_argnums(group_norm_backward, _vjp_of_backward)
defjvp_argnums(group_norm, _jvp)


def fit(steps: int = 60, rate: float = 0.5, penalty: float = 0.05, seed: int = 0) -> list[float]:
    """Losses of gradient descent on weight and bias, the loss containing a gradient with respect to the images."""
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(2, 4, 8, 6, 6))
    parameters = (np.ones(8), np.zeros(8))

    def error(x: Array, weight: Array, bias: Array) -> Array:
        return anp.mean((group_norm(x, weight, bias, 4, activation="silu") - target) ** 2)

    def loss(parameters: tuple) -> Array:
        slope = grad(error)(x, *parameters)  # a gradient inside the loss: double backward
        return error(x, *parameters) + penalty * x.size * anp.sum(slope**2)

    gradient, losses = grad(loss), [float(loss(parameters))]
    for _ in range(steps):
        parameters = tuple(p - rate * g for p, g in zip(parameters, gradient(parameters), strict=True))
        losses.append(float(loss(parameters)))
    return losses


if __name__ == "__main__":
    losses = fit()
    print(f"loss {losses[0]:.4f} at the start, {losses[-1]:.4f} after {len(losses) - 1} steps")
