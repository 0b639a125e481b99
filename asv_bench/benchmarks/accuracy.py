"""Largest error of y and of dx in units of eps, against extended precision: 3 to 4 is what is promised."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .common import GroupNorm


class Accuracy(GroupNorm):
    """Of data 1000 standard deviations from zero, where careless formulas lose all digits (10 for 16-bit types)."""

    params = (((2, 32, 24, 24),), *GroupNorm.params[1:])
    unit = "eps"

    def setup(self, shape: tuple[int, ...], groups: int, dtype: str, layout: str, engine: str) -> None:
        self.offset = 1e3 if dtype in ("float32", "float64") else 10.0
        super().setup(shape, groups, dtype, layout, engine)
        self.eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).eps)
        n, c = shape[:2]
        self.exact_x, self.exact_dy = (self.first(array).reshape(n, groups, -1) for array in (self.x, self.dy))
        self.exact_weight, self.exact_bias = (self.host(array)[:, None] for array in (self.weight, self.bias))
        d = self.exact_x - self.exact_x.mean(axis=2, keepdims=True)
        self.exact_rstd = 1 / np.sqrt((d * d).mean(axis=2, keepdims=True) + np.longdouble(1e-5))
        self.x_hat = (d * self.exact_rstd).reshape(n, c, -1)

    def host(self, array: Any) -> np.ndarray:
        """In NumPy's widest float, on x86 with 64 bits of significand."""
        return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.longdouble)

    def first(self, array: Any) -> np.ndarray:
        """The same as (N, C, S)."""
        array = np.moveaxis(self.host(array), self.channel_axis, 1)
        return array.reshape(*array.shape[:2], -1)

    def track_forward_error(self, *parameters: object) -> float:
        """Relative to |w| max(1, |x_hat|) + |b|, at the worst element."""
        wanted = self.exact_weight * self.x_hat + self.exact_bias
        scale = np.abs(self.exact_weight) * np.maximum(1, np.abs(self.x_hat)) + np.abs(self.exact_bias)
        return float(np.max(np.abs(self.first(self.forward().y) - wanted) / scale)) / self.eps

    def track_backward_error(self, *parameters: object) -> float:
        """Relative to the largest |dx|."""
        x_hat = self.x_hat.reshape(self.exact_x.shape)
        dy = self.exact_dy.reshape(self.x_hat.shape)
        g = (self.exact_weight * dy).reshape(self.exact_x.shape)
        projected = g - g.mean(axis=2, keepdims=True) - x_hat * (g * x_hat).mean(axis=2, keepdims=True)
        wanted = (self.exact_rstd * projected).reshape(self.x_hat.shape)
        return float(np.max(np.abs(self.first(self.backward().dx) - wanted)) / np.max(np.abs(wanted))) / self.eps
