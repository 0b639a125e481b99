"""Hypothesis strategies: whole calls of cugn, of any shape, axes, groups, memory order, dtype, mask and kind of values.

Hypothesis draws the structure and a seed, NumPy the values: so that examples are cheap and shrink to small structures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from libraries import EVERYTHING, FLOATS, dtype_of

__all__ = ["Call", "calls"]

VALUES = ("normal", "offset", "constant", "integers", "large", "small", "outlier", "nan", "inf")
CI = os.environ.get("CUGN_HYPOTHESIS_PROFILE", "ci") == "ci" and not EVERYTHING
INTEGERS = ("uint8",) if CI else ("int8", "uint8", "int16", "uint16")
# Every combination of dtype, activation, labels, mask and strides has kernels to compile, some seconds each. In the ci
# profile a call has one of these (labels and mask also together), the activation is silu, and dtypes that are only
# converted are arrays as they are made, with nothing of that. The long profile draws everything.
EXTRAS = ("activation", "labels", "mask", "strides")
ACTIVATIONS = ("silu",) if CI else ("relu", "silu", "gelu", "gelu_tanh")
ALONE = [{"activation"}, {"labels"}, {"mask"}, {"labels", "mask"}, {"strides"}]
CONVERTED = ("float16", "bfloat16", *INTEGERS) if CI else ()
LIMIT = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.40e38, "float64": 1.79e308}


@dataclass
class Call:
    """One call: arrays in the drawn memory order, and the keywords."""

    x: np.ndarray
    dy: np.ndarray
    groups: Any
    weight: np.ndarray | None
    bias: np.ndarray | None
    options: dict[str, Any] = field(default_factory=dict)
    """eps, channel_axis, batch_axis, where, activation."""

    @property
    def y_dtype(self) -> str:
        """Dtype of y."""
        return "float32" if self.x.dtype.kind in "iu" else self.x.dtype.name

    def __repr__(self) -> str:
        """Enough to build it again."""
        where = self.options["where"]
        return (
            f"Call(x={self.x.dtype.name}{self.x.shape} strides {self.x.strides}, groups={self.groups}, "
            f"weight={getattr(self.weight, 'dtype', None)}, bias={getattr(self.bias, 'dtype', None)}, "
            f"where={None if where is None else where.shape}, "
            f"{ {k: v for k, v in self.options.items() if k != 'where'} }, x={self.x.ravel()[:20]})"
        )


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = FLOATS + INTEGERS,
    values: tuple[str, ...] = VALUES,
    eps: tuple[float, ...] = (1e-5, 1e-5, 0.0, 1.0),
    masks: bool = True,
) -> Call:
    """Draw a call that must succeed."""
    ndim = draw(st.integers(1, 6))
    shape = tuple(draw(st.integers(1, 9 if ndim < 4 else 3)) for _ in range(ndim))
    if draw(st.integers(0, 7)) == 0:  # one long axis: blocks, tails of vectors
        axis = draw(st.integers(0, ndim - 1))
        shape = tuple(draw(st.integers(30, 300)) if a == axis else min(n, 3) for a, n in enumerate(shape))
    channel = draw(st.integers(0, ndim - 1))
    others = draw(st.permutations([a for a in range(ndim) if a != channel]))
    batch = tuple(others[: draw(st.integers(0, len(others)))])
    C = shape[channel]
    dtype = draw(st.sampled_from(dtypes))
    extras = set() if dtype in CONVERTED else draw(st.sampled_from(ALONE) if CI else st.sets(st.sampled_from(EXTRAS)))
    if CI and "strides" not in extras:
        batch = tuple(range(draw(st.integers(0, channel))))
    groups = draw(_groups(C, "labels" in extras))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    y_dtype = "float32" if dtype in INTEGERS else dtype
    activation = draw(st.sampled_from(ACTIVATIONS)) if "activation" in extras else None
    order, steps = list(range(ndim)), [1] * ndim
    if "strides" in extras:
        order = draw(st.permutations(order))
        steps = draw(st.lists(st.sampled_from((1, 1, 1, -1, 2)), min_size=ndim, max_size=ndim))
    other_order = draw(st.booleans())
    weight, bias = (
        rng.normal(size=C).astype(dtype_of(draw(st.sampled_from(FLOATS)))) if draw(st.booleans()) else None
        for _ in range(2)
    )
    where = None
    if masks and "mask" in extras:
        kept = draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim))
        where = rng.random([n if k else 1 for n, k in zip(shape, kept, strict=True)]) < draw(
            st.sampled_from((0.5, 0.9, 0.1))
        )
        where = where[tuple(0 for _ in range(draw(st.integers(0, len(kept) - 1 if not any(kept) else 0))))]
    negative = draw(st.booleans())
    batch_axis: Any = batch
    if len(batch) < 2 and draw(st.booleans()):
        batch_axis = batch[0] if batch else None
    if negative and isinstance(batch_axis, tuple):
        batch_axis = tuple(a - ndim for a in batch_axis)
    x = _values(draw(st.sampled_from(values)), shape, dtype, rng)
    dy = rng.normal(size=shape).astype(dtype_of(y_dtype))
    return Call(
        x=_placed(x, order, steps),
        dy=dy if other_order else _placed(dy, order, steps),
        groups=groups,
        weight=weight,
        bias=bias,
        options={
            "eps": draw(st.sampled_from(eps)),
            "channel_axis": channel - ndim if negative else channel,
            "batch_axis": batch_axis,
            "where": where,
            "activation": activation,
        },
    )


@st.composite
def _groups(draw: st.DrawFn, C: int, labelled: bool) -> Any:
    if not labelled:
        return draw(st.sampled_from([g for g in range(1, C + 1) if C % g == 0]))
    labels = draw(st.lists(st.integers(0, min(C, 5) - 1), min_size=C, max_size=C))
    names = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return [names[label] for label in labels]


def _values(kind: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    if dtype in INTEGERS:
        info = np.iinfo(dtype)
        low, high = (info.min, info.max) if kind != "constant" else (info.max // 2, info.max // 2)
        return rng.integers(low, high, shape, endpoint=True).astype(dtype)
    x = rng.normal(size=shape)
    if kind == "offset":
        x += 10.0 ** rng.integers(1, {"float16": 4, "bfloat16": 6, "float32": 7, "float64": 7}[dtype])
    elif kind == "constant":
        x = np.full(shape, rng.normal() * 10.0 ** rng.integers(-3, 4))
    elif kind == "integers":
        x = rng.integers(-3, 4, shape).astype(float)
    elif kind == "large":
        x = rng.uniform(-1, 1, shape) * LIMIT[dtype] * 10.0 ** -rng.integers(0, 4)
    elif kind == "small":
        x *= {"float16": 1e-3, "bfloat16": 1e-20, "float32": 1e-20, "float64": 1e-150}[dtype]
    elif kind in ("outlier", "nan", "inf"):
        value = {"outlier": 1e4, "nan": np.nan, "inf": np.inf * rng.choice([-1, 1])}[kind]
        x.flat[rng.integers(x.size)] = value
    return x.astype(dtype_of(dtype))


def _placed(a: np.ndarray, order: list[int], steps: list[int]) -> np.ndarray:
    """The values in another order of memory, with gaps, or backwards."""
    at = a.transpose(order)
    base = np.zeros([n * abs(s) for n, s in zip(at.shape, steps, strict=True)], dtype=a.dtype)
    view = base[tuple(slice(None, None, s) for s in steps)]
    view[...] = at
    return view.transpose(np.argsort(order))
