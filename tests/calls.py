"""A valid call of every public function, whose arguments a test replaces one by one."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

import cugn

SHAPE, GROUPS = (2, 6, 4, 5), 3
FUNCTIONS = tuple(
    name
    for name in cugn.__all__
    if inspect.isfunction(getattr(cugn, name)) and "x" in inspect.signature(getattr(cugn, name)).parameters
)
"""Every public function of arrays."""
LIKE_X = ("x", "dy", "tx", "ddx", "out")
STATISTICS = ("mean", "rstd", "mean_wdy", "mean_wdy_xhat")
PER_CHANNEL = ("weight", "bias", "tweight", "tbias", "ddweight", "ddbias")


def parameters(name: str) -> tuple[str, ...]:
    """Names of a function's parameters."""
    return tuple(inspect.signature(getattr(cugn, name)).parameters)


def arguments(name: str, *, optional: bool = True, dtype: Any = np.float32) -> dict[str, Any]:
    """Arguments of a valid call; without the optional arrays unless `optional`."""
    rng = np.random.default_rng(7)
    stats = (6,) if name.startswith("batch") else (2, {"layer": 1, "instance": 6}.get(name.split("_")[0], GROUPS))
    values = {
        **{p: rng.normal(size=SHAPE).astype(dtype) for p in LIKE_X},
        **{p: rng.normal(size=SHAPE[1]).astype(dtype) for p in PER_CHANNEL},
        "groups": GROUPS,
        "mean": rng.normal(size=stats),
        "rstd": rng.uniform(0.5, 2, size=stats),
        "mean_wdy": rng.normal(size=stats),
        "mean_wdy_xhat": rng.normal(size=stats),
        "where": rng.random(SHAPE) < 0.8,
    }
    signature = inspect.signature(getattr(cugn, name)).parameters.values()
    return {
        p.name: values[p.name]
        for p in signature
        if p.name in values and (optional or p.default is inspect.Parameter.empty)
    }


def call(name: str, kwargs: dict[str, Any]) -> Any:
    """The call itself, everything by keyword."""
    return getattr(cugn, name)(**kwargs)
