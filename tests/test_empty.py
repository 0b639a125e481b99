"""Promise: empty arrays give empty results and zero gradients, empty groups NaN; no exception, no warning."""

from __future__ import annotations

import calls
import numpy as np
import pytest
from libraries import FLOATS, Library, dtype_of, is_rare

import cugn

SHAPES = {"no samples": (0, 4, 3), "no channels": (2, 0, 3), "no positions": (2, 4, 0), "nothing": (0, 0, 0, 0)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_forward_and_backward(shape: str, groups: int, xp: Library) -> None:
    """Shapes and dtypes as ever; gradients of weight and bias are zero; statistics of no elements are NaN."""
    for dtype in xp.floats if xp.name != "jax" else ("float32",):  # jax compiles each operation anew
        x = xp.array(np.zeros(SHAPES[shape], dtype_of(dtype)))
        channels = SHAPES[shape][1]
        weight = xp.array(np.ones(channels, dtype_of(dtype)))
        y, mean, rstd = cugn.group_norm_forward(x, groups, weight, weight)
        assert tuple(y.shape) == SHAPES[shape]
        assert y.dtype == x.dtype
        for s in (mean, rstd):
            assert tuple(s.shape) == (SHAPES[shape][0], groups)
            assert np.isnan(xp.numpy(s)).all()
        for kwargs in ({}, {"mean": mean, "rstd": rstd}):
            dx, dweight, dbias = cugn.group_norm_backward(x, x, groups, weight, **kwargs)
            assert tuple(dx.shape) == SHAPES[shape]
            for d in (dweight, dbias):
                assert tuple(d.shape) == (channels,)
                assert d.dtype == x.dtype
                assert not xp.numpy(d).astype(float).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", calls.FUNCTIONS)
def test_every_function(function: str, shape: str) -> None:
    """Every function takes every empty shape, with and without out."""
    size = SHAPES[shape]
    for optional in (False, True):
        kwargs = calls.arguments(function, optional=optional)
        groups = {"layer": 1, "instance": size[1], "batch": size[1]}.get(function.split("_")[0], 2)
        stats = (size[1],) if function.startswith("batch") else (size[0], groups)
        for name, value in kwargs.items():
            if isinstance(value, np.ndarray):
                wanted = size if name in (*calls.LIKE_X, "where") else stats if name in calls.STATISTICS else (size[1],)
                kwargs[name] = np.zeros(wanted, value.dtype)
        if "groups" in kwargs:
            kwargs["groups"] = groups
        result = calls.call(function, kwargs)
        first = result[0] if isinstance(result, tuple) else result
        assert first.shape == (stats if function in ("moments", "backward_sums") else size)
        if "out" in kwargs:
            assert first is kwargs["out"]


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_images(dtype: str) -> None:
    """Empty integer arrays give float32."""
    assert cugn.group_norm(np.zeros((0, 4, 3), dtype), 2).dtype == np.float32


def test_labels() -> None:
    """Labels with no samples and no positions; no labels for no channels."""
    for shape in ((0, 4, 3), (2, 4, 0)):
        y, mean, _ = cugn.group_norm_forward(np.zeros(shape), [1, 0, 1, 1])
        assert (y.shape, mean.shape) == (shape, (shape[0], 2))
    y, mean, _ = cugn.group_norm_forward(np.zeros((2, 0, 3)), [])
    assert (y.shape, mean.shape) == ((2, 0, 3), (2, 0))


@pytest.mark.rare(when=lambda dtype: is_rare(dtype, masks=True))
@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_group_under_a_mask(dtype: str) -> None:
    """A group without elements has NaN statistics, y and dx; the others are as without it."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 2, 4, 5)).astype(dtype_of(dtype))
    where = np.ones(x.shape, bool)
    where[1, 2:] = False
    full = cugn.group_norm_forward(x, 2)
    y, mean, rstd = cugn.group_norm_forward(x, 2, where=where)
    gradients, wanted = cugn.group_norm_backward(dy, x, 2, where=where), cugn.group_norm_backward(dy, x, 2)
    for value, expected in ((y, full.y), (gradients.dx, wanted.dx)):
        assert np.isnan(value[1, 2:].astype(float)).all()
        value, expected = (v.astype(float) for v in (value, expected))
        # the masked path may round in another order than the plain one: two ulps of the largest value
        tolerance = 2 * float(np.abs(expected).max()) * {"float16": 2**-10, "bfloat16": 2**-7}.get(dtype, 2**-22)
        np.testing.assert_allclose(value[0], expected[0], atol=tolerance)
        np.testing.assert_allclose(value[1, :2], expected[1, :2], atol=tolerance)
    np.testing.assert_array_equal(np.isnan(mean), [[False, False], [False, True]])
    np.testing.assert_array_equal(np.isnan(rstd), [[False, False], [False, True]])
    m = cugn.moments(x, 2, where=where)
    assert m.count.tolist() == [[10, 10], [10, 0]]
    assert m.m2[1, 1] == 0


@pytest.mark.parametrize("function", [f for f in calls.FUNCTIONS if "where" in calls.parameters(f)])
def test_mask_without_elements(function: str) -> None:
    """where=False everywhere raises and warns nowhere."""
    kwargs = calls.arguments(function, optional=False)
    for where in (np.zeros((), bool), np.zeros(calls.SHAPE, bool)):
        calls.call(function, {**kwargs, "where": where})
