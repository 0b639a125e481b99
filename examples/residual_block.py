"""A residual block of group norm, SiLU and convolution, forward and backward, in plain NumPy.

    python examples/residual_block.py

The block of diffusion models' U-Nets: x + conv(silu(group_norm(conv(silu(group_norm(x)))))). Normalization and
activation are one call in each direction; the statistics of the forward go into the backward and save it a pass. At
the end the gradients are compared with finite differences along random directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import cugn

Array = np.ndarray[Any, Any]


def convolve(x: Array, kernel: Array) -> Array:
    """3 x 3 convolution, padded by one: images (N, C, H, W), kernel (C, K, 3, 3), result (N, K, H, W)."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.ascontiguousarray(np.tensordot(windows, kernel, axes=((1, 4, 5), (0, 2, 3))).transpose(0, 3, 1, 2))


def convolve_backward(dy: Array, x: Array, kernel: Array) -> tuple[Array, Array]:
    """Gradients with respect to the images and the kernel."""
    dx = convolve(dy, kernel.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    dkernel = np.tensordot(windows, dy, axes=((0, 2, 3), (0, 2, 3))).transpose(0, 3, 1, 2)
    return dx, dkernel


class Saved(NamedTuple):
    """What one half of the block keeps for its backward."""

    x: Array
    mean: Array
    rstd: Array
    activated: Array


@dataclass
class ResidualBlock:
    """Parameters of a block with C channels and, for each of its two halves, a normalization and a kernel."""

    channels: int
    groups: int = 8
    seed: int = 0
    dtype: Any = np.float32
    parameters: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        C = self.channels
        self.parameters = {}
        for half in (1, 2):
            self.parameters[f"weight{half}"] = rng.normal(1, 0.1, C).astype(self.dtype)
            self.parameters[f"bias{half}"] = rng.normal(0, 0.1, C).astype(self.dtype)
            self.parameters[f"kernel{half}"] = rng.normal(0, np.sqrt(2 / (9 * C)), (C, C, 3, 3)).astype(self.dtype)

    def forward(self, x: Array) -> tuple[Array, tuple[Saved, Saved]]:
        """Output, and what the backward needs."""
        first, saved1 = self._half(x, 1)
        second, saved2 = self._half(first, 2)
        return x + second, (saved1, saved2)

    def backward(self, dy: Array, saved: tuple[Saved, Saved]) -> tuple[Array, dict[str, Array]]:
        """Gradients with respect to x and to each of the parameters."""
        gradients: dict[str, Array] = {}
        dx = dy
        for half in (2, 1):
            dx = self._half_backward(dx, saved[half - 1], half, gradients)
        return dy + dx, gradients

    def _half(self, x: Array, half: int) -> tuple[Array, Saved]:
        p = self.parameters
        activated, mean, rstd = cugn.group_norm_forward(
            x, self.groups, p[f"weight{half}"], p[f"bias{half}"], activation="silu"
        )
        return convolve(activated, p[f"kernel{half}"]), Saved(x, mean, rstd, activated)

    def _half_backward(self, dy: Array, saved: Saved, half: int, gradients: dict[str, Array]) -> Array:
        p = self.parameters
        dactivated, gradients[f"kernel{half}"] = convolve_backward(dy, saved.activated, p[f"kernel{half}"])
        dx, gradients[f"weight{half}"], gradients[f"bias{half}"] = cugn.group_norm_backward(
            dactivated,
            saved.x,
            self.groups,
            p[f"weight{half}"],
            p[f"bias{half}"],
            mean=saved.mean,
            rstd=saved.rstd,
            activation="silu",
        )
        return dx


def gradient_errors(block: ResidualBlock, x: Array, step: float = 1e-5, seed: int = 1) -> dict[str, float]:
    """Relative difference between the gradients and central differences along a random direction of each argument."""
    rng = np.random.default_rng(seed)
    dy = rng.normal(size=x.shape).astype(x.dtype)
    dx, gradients = block.backward(dy, block.forward(x)[1])
    errors = {}
    for name, values, gradient in [("x", x, dx)] + [(n, block.parameters[n], g) for n, g in gradients.items()]:
        direction = rng.normal(size=values.shape).astype(values.dtype)
        losses = []
        for sign in (1, -1):
            values += sign * step * direction
            losses.append(float((dy * block.forward(x)[0]).sum()))
            values -= sign * step * direction
        difference, product = (losses[0] - losses[1]) / (2 * step), float((direction * gradient).sum())
        errors[name] = abs(difference - product) / np.linalg.norm(direction) / np.linalg.norm(gradient)
    return errors


if __name__ == "__main__":
    block = ResidualBlock(16, groups=4, dtype=np.float64)
    x = np.random.default_rng(2).normal(size=(2, 16, 12, 12))
    print(f"x {x.shape} -> y {block.forward(x)[0].shape}; gradients against finite differences:")
    for name, error in gradient_errors(block, x).items():
        print(f"  d{name:8s} relative error {error:.1e}")
