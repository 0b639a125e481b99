"""Promise: the stated accuracy, at every element, on the inputs where single-precision libraries lose theirs.

With e = eps(dtype of y) and scale = |w| max(1, |x_hat|) + |b|:

- |y - oracle| <= 3 e scale for float32 and 4 e scale for float64; for the 16-bit types half an ulp of y + 0.01 e scale;
- |dx - oracle| <= 4 e max|dx| over the element's group, and dweight, dbias within 4 e of the sum of the absolute values
  of their terms; 8 e in float64. A group of two elements is what eps rstd^2 leaves of terms that cancel: in float64,
  those count as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracle
import pytest
from libraries import EVERYTHING, FLOATS, Library, dtype_of, is_rare

import cugn

SHAPE = (2, 24, 12, 11)
LABELS = tuple(int(v) for v in np.random.default_rng(5).permutation([0] * 3 + [1] * 11 + [2] + [3] * 9))
KINDS: dict[str, Any] = {"group": 6, "layer": 1, "instance": 24, "batch": 24, "labels": LABELS}
WIDE = ("bfloat16", "float32", "float64")
FORWARD_FACTOR = {"float32": 3, "float64": 4}
BACKWARD_FACTOR = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}


class Row(NamedTuple):
    """One kind of input."""

    make: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    dtypes: tuple[str, ...] = FLOATS
    eps: float = 1e-5
    backward: tuple[str, ...] | None = None
    """Dtypes whose backward is promised too; None for all."""
    dy: float = 1.0
    """Magnitude of dy, such that dx stays in the dtype's range."""


def _normal(mean: float, std: float = 1.0) -> Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]:
    return lambda rng, shape: rng.normal(size=shape) * std + mean


def _outlier(size: float) -> Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.normal(size=shape)
        x[:, :: max(1, shape[1] // 4), 0] = size
        return x

    return make


ROWS = {
    "N(0,1)": Row(_normal(0)),
    "0.95+N": Row(_normal(0.95)),
    "1e3+N": Row(_normal(1e3)),
    "1e4+N": Row(_normal(1e4)),
    "1e6+N": Row(_normal(1e6), WIDE),
    "-1e6+N": Row(_normal(-1e6), WIDE),
    "1e12+N": Row(_normal(1e12), ("float64",), backward=()),
    "1e18 N": Row(_normal(0, 1e18), WIDE),
    "1e20 N": Row(_normal(0, 1e20), WIDE),
    "1e200 N": Row(_normal(0, 1e200), ("float64",)),
    "1e-200 N, eps=0": Row(_normal(0, 1e-200), ("float64",), 0.0),
    "1e-200 N": Row(_normal(0, 1e-200), ("float64",)),
    "1e206 + 1e200 N": Row(_normal(1e206, 1e200), ("float64",)),
    "3e38 U": Row(lambda rng, shape: rng.uniform(-3e38, 3e38, shape), WIDE),
    "largest of the dtype": Row(lambda rng, shape: rng.choice([-1.0, 1.0], shape), FLOATS),
    "1.7e308 U": Row(lambda rng, shape: rng.uniform(-1.7, 1.7, shape) * 1e308, ("float64",)),
    "6e4 U": Row(lambda rng, shape: rng.uniform(-6e4, 6e4, shape), ("float16",)),
    "constant 1e4": Row(lambda rng, shape: np.full(shape, 1e4)),
    "constant 1.2e8": Row(lambda rng, shape: np.full(shape, 1.2e8), WIDE),
    "constant 0.1": Row(lambda rng, shape: np.full(shape, 0.1)),
    "constant 1e200": Row(lambda rng, shape: np.full(shape, 1e200), ("float64",)),
    "constant 1e-310": Row(lambda rng, shape: np.full(shape, 1e-310), ("float64",)),
    "constant -3e38": Row(lambda rng, shape: np.full(shape, -3e38), WIDE),
    "1e-25 N, eps=0": Row(_normal(0, 1e-25), WIDE, 0.0),
    "1e-45 N, eps=0": Row(_normal(0, 3e-44), ("float32",), 0.0, backward=()),
    "1e-320 N, eps=0": Row(_normal(0, 1e-320), ("float64",), 0.0, backward=()),
    "1e-7 N, eps=0": Row(_normal(0, 1e-6), ("float16",), 0.0, dy=1e-3),
    "one outlier of 1e30": Row(_outlier(1e30), WIDE),
    "one outlier of 1e4": Row(_outlier(1e4)),
    "1e20 N, eps=1e30": Row(_normal(0, 1e20), WIDE, 1e30),
    "eps=1e-300": Row(_normal(0, 1e-160), ("float64",), 1e-300),
}


@lru_cache(maxsize=4)
def _input(row: str, dtype: str, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """x, weight, bias and dy."""
    rng = np.random.default_rng(sum(map(ord, row)))
    x = ROWS[row].make(rng, shape)
    if row == "largest of the dtype":
        x = x * float(ml_dtypes.finfo(dtype_of(dtype)).max)
    weight, bias, dy = rng.normal(size=shape[1]), rng.normal(size=shape[1]), rng.normal(size=shape) * ROWS[row].dy
    return tuple(a.astype(dtype_of(dtype)) for a in (x, weight, bias, dy))


def _call(row: str, shape: tuple[int, ...], kind: str) -> tuple[Any, dict[str, Any]]:
    """Groups and options of a member of the family, as the oracle takes them."""
    groups = KINDS[kind] if shape == SHAPE or kind == "layer" else _groups(kind, shape)
    return groups, {"eps": ROWS[row].eps, "batch_axis": None if kind == "batch" else 0}


# What one input's tests share: its kinds, under each library in turn. All of them would be 3 GB.
@lru_cache(maxsize=len(KINDS))
def _expected_forward(row: str, dtype: str, shape: tuple[int, ...], kind: str) -> oracle.Forward:
    x, weight, bias, _ = _input(row, dtype, shape)
    groups, options = _call(row, shape, kind)
    return oracle.forward(x, groups, weight, bias, **options)


@lru_cache(maxsize=len(KINDS))
def _expected_backward(row: str, dtype: str, shape: tuple[int, ...], kind: str) -> oracle.Backward:
    x, weight, bias, dy = _input(row, dtype, shape)
    groups, options = _call(row, shape, kind)
    return oracle.backward(dy, x, groups, weight, bias, **options)


def _groups(kind: str, shape: tuple[int, ...]) -> int:
    return {"group": max(1, shape[1] // 4), "layer": 1}.get(kind, shape[1])


def check_y(y: np.ndarray, expected: oracle.Forward, dtype: str, what: str) -> None:
    """The bound of the forward; `what` for the message."""
    assert y.dtype == dtype_of(dtype), what
    error = np.abs(y.astype(np.float64).astype(oracle.LONG) - expected.y)
    e = oracle.epsilon(dtype_of(dtype))
    if dtype in FORWARD_FACTOR:
        bound = FORWARD_FACTOR[dtype] * e * expected.scale
    else:
        larger = np.maximum(np.abs(expected.y), np.abs(y.astype(np.float64)))
        bound = oracle.half_ulp(larger, dtype_of(dtype)) + 0.01 * e * expected.scale
    with np.errstate(all="ignore"):
        assert (error <= bound).all(), f"{what}: {float(np.max(error / bound)):.3g} times the bound"


def check_gradients(result: Any, expected: oracle.Backward, dtype: str, what: str) -> None:
    """The bounds of the backward."""
    factor = BACKWARD_FACTOR[dtype] * oracle.epsilon(dtype_of(dtype))
    for name, scale in (
        ("dx", expected.group_max),
        ("dweight", expected.dweight_terms),
        ("dbias", expected.dbias_terms),
    ):
        value = getattr(result, name)
        assert value.dtype == dtype_of(dtype), what
        error = np.abs(value.astype(np.float64).astype(oracle.LONG) - getattr(expected, name))
        bound = factor * scale + oracle.half_ulp(np.zeros(()), dtype_of(dtype))
        with np.errstate(all="ignore"):
            assert (error <= bound).all(), f"{what}, {name}: {float(np.max(error / bound)):.3g} times the bound"


def _arranged(a: np.ndarray, library: Library, last: bool) -> Any:
    return library.array(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if last else a)


def _restored(a: Any, library: Library, last: bool) -> np.ndarray:
    a = library.numpy(a)
    return np.moveaxis(a, -1, 1) if last and a.ndim > 1 else a


def _function(kind: str, suffix: str = "") -> Callable[..., Any]:
    name = {"labels": "group"}.get(kind, kind)
    function = getattr(cugn, f"{name}_norm{suffix}")
    if name != "group":
        return function
    groups = list(LABELS) if kind == "labels" else KINDS["group"]
    at = 2 if suffix == "_backward" else 1
    return lambda *arrays, **options: function(*arrays[:at], groups, *arrays[at:], **options)


CASES = [pytest.param(r, d, id=f"{r}, {d}") for r in ROWS for d in ROWS[r].dtypes]
BACKWARD_CASES = [
    pytest.param(r, d, id=f"{r}, {d}")
    for r in ROWS
    for d in ROWS[r].dtypes
    if ROWS[r].backward is None or d in ROWS[r].backward
]


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_forward(row: str, dtype: str, library: Library) -> None:
    """Every member of the family, both layouts."""
    if dtype not in library.floats:
        pytest.skip(f"{library.name} has no {dtype}")
    x, weight, bias, _ = _input(row, dtype, SHAPE)
    for kind in KINDS:
        expected = _expected_forward(row, dtype, SHAPE, kind)
        for last in (False, True):
            y, mean, rstd = _function(kind, "_forward")(
                _arranged(x, library, last),
                library.array(weight),
                library.array(bias),
                eps=ROWS[row].eps,
                channel_axis=-1 if last else 1,
            )
            what = f"{kind} norm, channels {'last' if last else 'first'}"
            check_y(_restored(y, library, last), expected, dtype, what)
            # float64 statistics: 4 eps of what they are sums of, and one step below the normal range
            mean, rstd = library.numpy(mean), library.numpy(rstd)
            assert mean.dtype == rstd.dtype == np.float64
            e = 4 * 2.0**-52
            with np.errstate(all="ignore"):
                std = np.sqrt(expected.m2 / expected.count)
                assert (np.abs(mean - expected.mean) <= e * (np.abs(expected.mean) + std) + 2.0**-1074).all(), what
                exact = expected.rstd.astype(np.float64)  # 1e-320 has an infinite one
                relative = 1e-14 if dtype == "float64" else 1e-10
                np.testing.assert_allclose(rstd, exact, rtol=relative, err_msg=f"{what}: rstd")


@pytest.mark.parametrize(("row", "dtype"), BACKWARD_CASES)
def test_backward(row: str, dtype: str, library: Library) -> None:
    """Every member of the family, both layouts, with the forward's statistics and without."""
    if dtype not in library.floats:
        pytest.skip(f"{library.name} has no {dtype}")
    x, weight, _, dy = _input(row, dtype, SHAPE)
    for kind in KINDS:
        expected = _expected_backward(row, dtype, SHAPE, kind)
        for last in (False, True):
            arrays = [_arranged(dy, library, last), _arranged(x, library, last), library.array(weight)]
            options: dict[str, Any] = {"eps": ROWS[row].eps, "channel_axis": -1 if last else 1}
            _, mean, rstd = _function(kind, "_forward")(*arrays[1:], **options)
            for statistics in ({}, {"mean": mean, "rstd": rstd}):
                result = _function(kind, "_backward")(*arrays, **statistics, **options)
                gradients = cugn.GroupNormGrads(
                    _restored(result.dx, library, last), library.numpy(result.dweight), library.numpy(result.dbias)
                )
                what = f"{kind} norm, channels {'last' if last else 'first'}, statistics {sorted(statistics)}"
                check_gradients(gradients, expected, dtype, what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", ["N(0,1)", "1e4+N", "one outlier of 1e4"])
@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (3, 3), (5, 1), (12, 4), (15, 5), (7, [0, 1, 0, 1, 2, 2, 0])]
)
def test_channels_that_are_less_than_a_vector(channels: int, groups: Any, row: str, dtype: str) -> None:
    """Channels-last: as many positions as fill vectors are taken as one row, and some are left."""
    if dtype not in ROWS[row].dtypes:
        pytest.skip(f"{dtype} does not hold this input")
    shape = (2, channels, 41, 43)
    x, weight, bias, dy = _input(row, dtype, shape)
    a, b = (np.ascontiguousarray(np.moveaxis(v, 1, -1)) for v in (x, dy))
    y, mean, rstd = cugn.group_norm_forward(a, groups, weight, bias, channel_axis=-1)
    check_y(np.moveaxis(y, -1, 1), oracle.forward(x, groups, weight, bias), dtype, "forward")
    expected = oracle.backward(dy, x, groups, weight)
    for statistics in ({}, {"mean": mean, "rstd": rstd}):
        result = cugn.group_norm_backward(b, a, groups, weight, channel_axis=-1, **statistics)
        check_gradients(result._replace(dx=np.moveaxis(result.dx, -1, 1)), expected, dtype, f"{sorted(statistics)}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", ["N(0,1)", "1e4+N", "1e6+N", "1e20 N", "one outlier of 1e4", "constant 1e4"])
def test_large_groups(row: str, dtype: str) -> None:
    """Groups of 65,536 elements and more: blocks are merged without loss; group, batch and instance norm."""
    if dtype not in ROWS[row].dtypes:
        pytest.skip(f"{dtype} does not hold this input")
    shape = (2, 8, 181, 183)
    x, weight, bias, dy = _input(row, dtype, shape)
    for kind in ("group", "batch", "instance"):
        forward, backward = (of(row, dtype, shape, kind) for of in (_expected_forward, _expected_backward))
        arguments = (_groups(kind, shape),) if kind == "group" else ()
        for last in (False, True):
            options: dict[str, Any] = {"channel_axis": -1 if last else 1}
            a, b = (np.ascontiguousarray(np.moveaxis(v, 1, -1)) if last else v for v in (x, dy))
            y = getattr(cugn, f"{kind}_norm")(a, *arguments, weight, bias, **options)
            check_y(np.moveaxis(y, -1, 1) if last else y, forward, dtype, f"{kind} norm, {last=}")
            result = getattr(cugn, f"{kind}_norm_backward")(b, a, *arguments, weight, **options)
            if last:
                result = result._replace(dx=np.moveaxis(result.dx, -1, 1))
            check_gradients(result, backward, dtype, f"{kind} norm, {last=}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [1.0, 1e4, 1e8, 3e38, 1e-30])
def test_one_element_a_group(dtype: str, value: float, library: Library) -> None:
    """y is the bias, dx zero, dweight zero, exactly."""
    if dtype not in library.floats or (dtype == "float16" and not 1e-5 < value < 6e4):
        pytest.skip(f"{library.name}'s {dtype} does not hold {value}")
    rng = np.random.default_rng(0)
    x = (value * rng.uniform(0.5, 1, size=(3, 16))).astype(dtype_of(dtype))
    weight, bias = (rng.normal(size=16).astype(dtype_of(dtype)) for _ in range(2))
    dy = rng.normal(size=x.shape).astype(dtype_of(dtype))
    a, b, w, d = (library.array(v) for v in (x, bias, weight, dy))
    np.testing.assert_array_equal(library.numpy(cugn.group_norm(a, 16, w, b)), np.broadcast_to(bias, x.shape))
    result = cugn.group_norm_backward(d, a, 16, w)
    assert not library.numpy(result.dx).any()
    assert not library.numpy(result.dweight).any()
    # three terms of float64 may be added in any order: an ulp of the sum of their absolute values
    terms = dy.astype(np.float64)
    error = abs(library.numpy(result.dbias).astype(np.float64) - terms.sum(axis=0).astype(dtype_of(dtype)))
    assert (error <= np.finfo(np.float64).eps * abs(terms).sum(axis=0)).all()


@pytest.mark.rare(when=lambda activation, form, library: library == "engine" and activation and form == "labels")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 0.0])
@pytest.mark.parametrize("form", ["table", "labels", "positions", "last"])
def test_two_elements_a_group(form: str, eps: float, activation: str | None, library: Library) -> None:
    """x_hat is +-1 but for eps, and dx what that leaves of its terms; also under the forward's own statistics."""
    rng = np.random.default_rng(3)
    shape = {"table": (9, 24), "labels": (9, 24), "positions": (9, 12, 2), "last": (9, 2, 12)}[form]
    axis = -1 if form == "last" else 1
    groups: Any = tuple(int(v) for v in rng.permutation(np.arange(24) // 2)) if form == "labels" else 12
    x, dy = rng.normal(3, 1, size=(2, *shape))
    weight, bias = rng.normal(size=(2, shape[axis]))
    options: dict[str, Any] = {"eps": eps, "channel_axis": axis, "activation": activation}
    expected = oracle.backward(dy, x, groups, weight, bias, **options)
    a, d, w, b = map(library.array, (x, dy, weight, bias))
    _, mean, rstd = cugn.group_norm_forward(a, groups, w, b, **options)
    # the engine sees whose statistics they are; under one float64 of rstd, the terms do not cancel so far
    given = expected.terms_left if library.name == "engine" else expected.terms
    for statistics, scale in (({}, expected.terms_left), ({"mean": mean, "rstd": rstd}, given)):
        result = cugn.group_norm_backward(d, a, groups, w, b, **statistics, **options)
        result = type(result)(*map(library.numpy, result))
        wanted = expected._replace(group_max=expected.group_max + scale)
        check_gradients(result, wanted, "float64", f"{form}, {eps=}, given: {sorted(statistics)}")


@pytest.mark.rare(when=lambda dtype: dtype in ("int8", "uint16"))
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_images(dtype: str) -> None:
    """Integers over their whole range are read exactly; y is float32, or the float dtype of out."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    x = rng.integers(info.min, info.max, SHAPE, endpoint=True).astype(dtype)
    weight, bias = (rng.normal(size=SHAPE[1]).astype(np.float32) for _ in range(2))
    expected = oracle.forward(x, 6, weight, bias)
    check_y(cugn.group_norm(x, 6, weight, bias), expected, "float32", dtype)
    for out in FLOATS if EVERYTHING or dtype == "uint8" else ("float32",):
        y = np.empty(SHAPE, dtype=dtype_of(out))
        assert cugn.group_norm(x, 6, weight, bias, out=y) is y
        check_y(y, expected, out, f"{dtype} to {out}")
    dy = rng.normal(size=SHAPE).astype(np.float32)
    check_gradients(cugn.group_norm_backward(dy, x, 6, weight), oracle.backward(dy, x, 6, weight), "float32", dtype)


@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_of_another_dtype(dtype: str, weights: str) -> None:
    """Weight and bias of any float dtype are taken at their own precision; dweight and dbias have the weight's."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(3, 2, size=SHAPE).astype(dtype_of(dtype)) for _ in range(2))
    weight, bias = (rng.normal(size=SHAPE[1]).astype(dtype_of(weights)) for _ in range(2))
    check_y(cugn.group_norm(x, 6, weight, bias), oracle.forward(x, 6, weight, bias), dtype, weights)
    result, expected = cugn.group_norm_backward(dy, x, 6, weight), oracle.backward(dy, x, 6, weight)
    assert result.dweight.dtype == result.dbias.dtype == dtype_of(weights)
    # dweight of float64 from x of float32 is still the sum of terms read from x: accumulated in float64
    for name in ("dweight", "dbias"):
        factor = BACKWARD_FACTOR[weights] * max(oracle.epsilon(dtype_of(weights)), 2.0**-40)
        error = np.abs(getattr(result, name).astype(np.float64) - getattr(expected, name))
        assert (error <= factor * getattr(expected, f"{name}_terms")).all(), name
    error = np.abs(result.dx.astype(np.float64) - expected.dx)
    assert (error <= BACKWARD_FACTOR[dtype] * oracle.epsilon(dtype_of(dtype)) * expected.group_max).all()


@pytest.mark.parametrize("groups", [2, "labels"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_float64_weights_of_float32_far_from_zero(last: bool, masked: bool, groups: Any) -> None:
    """dweight in float64 needs more of a mean of 1e6 standard deviations than one float64, in every form of x."""
    rng = np.random.default_rng(0)
    for size, spatial, n in itertools.product((3, 9, 40), (1, 3, 50), (1, 20)):
        shape = (n, 2 * size, spatial)
        x, dy = (rng.normal(mean, 1, shape).astype(np.float32) for mean in (1e6, 0))
        weight = rng.normal(size=2 * size)
        where = rng.random(shape) < 0.7 if masked else None
        if where is not None:
            where[:, :2, 0] = True  # something of each group
        of = [0, 1] * size if groups == "labels" else groups
        expected = oracle.backward(dy, x, of, weight, where=where)
        a, b, mask = (
            np.ascontiguousarray(np.moveaxis(v, 1, -1)) if last and v is not None else v for v in (x, dy, where)
        )
        options: dict[str, Any] = {"where": mask, "channel_axis": -1 if last else 1}
        _, mean, rstd = cugn.group_norm_forward(a, of, weight, **options)
        for given in ({}, {"mean": mean, "rstd": rstd}):
            dweight = cugn.group_norm_backward(b, a, of, weight, **given, **options).dweight
            bound = 8 * 2.0**-40 * (expected.dweight_terms + expected.dbias_terms)
            assert (np.abs(dweight - expected.dweight) <= bound).all(), (shape, sorted(given))


@pytest.mark.rare(when=lambda dtype: is_rare(dtype, masks=True))
@pytest.mark.parametrize("where", ["half", "one element", "per channel", "spatial"])
@pytest.mark.parametrize(("row", "dtype"), [c for c in CASES if "1e-" not in str(c.id) or "e-25" in str(c.id)])
def test_masked_forward(row: str, dtype: str, where: str) -> None:
    """The bound of y holds under a mask, with |x_hat| of the elements outside as large as it gets."""
    x, weight, bias, _ = _input(row, dtype, SHAPE)
    rng = np.random.default_rng(1)
    mask = {
        "half": rng.random(SHAPE) < 0.5,
        "one element": np.arange(np.prod(SHAPE)).reshape(SHAPE) % 528 == 7,
        "per channel": (np.arange(24) % 4 != 1)[None, :, None, None],
        "spatial": rng.random(SHAPE[2:]) < 0.7,
    }[where]
    if where == "one element" and ROWS[row].eps == 0:
        pytest.skip("a variance of zero without eps has no finite result")
    expected = oracle.forward(x, 6, weight, bias, where=mask, eps=ROWS[row].eps)
    limit = {"float16": 65504.0, "float32": 3.4e38, "bfloat16": 3.38e38}.get(dtype, 1.79e308)
    y = cugn.group_norm(x, 6, weight, bias, where=mask, eps=ROWS[row].eps)
    inside = np.maximum(np.abs(expected.y), 4 * np.abs(expected.x_hat)) < limit  # no step on the way overflows
    assert not np.isfinite(y[np.abs(expected.y) > 1.01 * limit]).any()  # 3e38 times an rstd of 300 is beyond float32
    assert inside.any()
    check_y(y[inside], expected._replace(y=expected.y[inside], scale=expected.scale[inside]), dtype, where)


@pytest.mark.rare(when=lambda dtype, library: library == "engine" and is_rare(dtype, labels=True, masks=True))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_masked_backward(dtype: str, offset: float, library: Library) -> None:
    """The bounds of the backward hold under a mask."""
    if dtype not in library.floats:
        pytest.skip(f"{library.name} has no {dtype}")
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(o, 1, size=SHAPE).astype(dtype_of(dtype)) for o in (offset, 0))
    weight = rng.normal(size=SHAPE[1]).astype(dtype_of(dtype))
    for mask in (rng.random(SHAPE) < 0.6, rng.random(SHAPE[2:]) < 0.6):
        for groups in (6, list(LABELS)):
            result = cugn.group_norm_backward(
                *(library.array(v) for v in (dy, x)), groups, library.array(weight), where=library.array(mask)
            )
            expected = oracle.backward(dy, x, groups, weight, where=mask)
            check_gradients(cugn.GroupNormGrads(*map(library.numpy, result)), expected, dtype, str(groups))


@pytest.mark.rare(when=lambda dtype, last: dtype != "float32" or last)
@pytest.mark.parametrize(("dtype", "activation"), [("float32", "silu"), ("float64", "relu"), ("bfloat16", "gelu")])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_labels_mask_and_activation(last: bool, dtype: str, activation: str) -> None:
    """All at once, both layouts: short channels, long ones, and such as are cut into parts."""
    rng = np.random.default_rng(8)
    for spatial in ((5, 7), (20, 9), (150, 70)):
        shape = (2, 8, *spatial)
        x, dy = (rng.normal(o, 2, size=shape).astype(dtype_of(dtype)) for o in (20, 0))
        weight, bias = (rng.normal(size=8).astype(dtype_of(dtype)) for _ in range(2))
        labels, where = [1, 0, 2, 0, 0, 2, 1, 0], rng.random((2, 1, *spatial)) < 0.7
        bent = activation if np.prod(spatial) < 1000 else None  # the oracle takes 0.1 ms for an activation's value
        options: dict[str, Any] = {"activation": bent, "channel_axis": -1 if last else 1}
        a, b, mask = (np.ascontiguousarray(np.moveaxis(v, 1, -1)) if last else v for v in (x, dy, where))
        forward = cugn.group_norm_forward(a, labels, weight, bias, where=mask, **options)
        expected = oracle.forward(x, labels, weight, bias, where=where, activation=bent)
        y = np.moveaxis(forward.y, -1, 1) if last else forward.y
        check_y(y, expected._replace(scale=1.13 * expected.scale), dtype, str(shape))
        gradients = oracle.backward(dy, x, labels, weight, bias, where=where, activation=bent)
        for given in ({}, {"mean": forward.mean, "rstd": forward.rstd}):
            result = cugn.group_norm_backward(b, a, labels, weight, bias, where=mask, **given, **options)
            if last:
                result = result._replace(dx=np.moveaxis(result.dx, -1, 1))
            check_gradients(result, gradients, dtype, f"{shape}, {sorted(given)}")


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("groups", [6, LABELS], ids=["equal", "labels"])
def test_bad_values_outside_of_a_mask(groups: Any, dtype: str, last: bool, library: Library) -> None:
    """NaN and Inf where the mask is False leave the statistics, and the other elements' y, to the bit as they are."""
    rng = np.random.default_rng(4)
    x = rng.normal(3, 2, size=SHAPE).astype(dtype)
    where = rng.random(SHAPE) < 0.6
    where[:, :, 0, 0] = False  # the first element of each channel, which may be taken for a shift
    bad = np.where(where, x, rng.choice([np.nan, np.inf, -np.inf], SHAPE)).astype(dtype)
    calls = []
    for values in (x, bad):
        a, mask = (_arranged(v, library, last) for v in (values, where))
        groups_given = groups if isinstance(groups, int) else list(groups)
        y, mean, rstd = cugn.group_norm_forward(a, groups_given, where=mask, channel_axis=-1 if last else 1)
        m = cugn.moments(a, groups_given, where=mask, channel_axis=-1 if last else 1)
        kept = _restored(y, library, last)[where]
        calls.append([kept, *(library.numpy(v) for v in (mean, rstd, *m))])
    for value, wanted in zip(*calls, strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(value, wanted)


def _rare(activation: str, dtype: str, library: str) -> bool:
    """In float64 all of them, each other dtype with one or two: what differs is how elements are converted."""
    usual = {"float32": ("relu", "silu"), "float16": ("silu",), "bfloat16": ("gelu",)}
    return library == "engine" and dtype != "float64" and activation not in usual[dtype]


@pytest.mark.rare(when=_rare)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations(dtype: str, activation: str, library: Library) -> None:
    """An activation adds no more than its slope (at most 1.13) times the error of z, and one rounding."""
    if dtype not in library.floats:
        pytest.skip(f"{library.name} has no {dtype}")
    rng = np.random.default_rng(3)
    shape = (2, 8, 9, 5)
    x, dy = (rng.normal(5, 2, size=shape).astype(dtype_of(dtype)) for _ in range(2))
    weight, bias = (rng.normal(0, 2, size=shape[1]).astype(dtype_of(dtype)) for _ in range(2))
    parameters = [library.array(v) for v in (weight, bias)]
    expected = oracle.forward(x, 4, weight, bias, activation=activation)
    gradients = oracle.backward(dy, x, 4, weight, bias, activation=activation)
    for last in (False, True):
        a, b = (_arranged(v, library, last) for v in (x, dy))
        options: dict[str, Any] = {"activation": activation, "channel_axis": -1 if last else 1}
        what = f"{activation}, channels {'last' if last else 'first'}"
        y = _restored(cugn.group_norm(a, 4, *parameters, **options), library, last)
        # 1.13 of the forward's bound, + the activation's own roundings, relative to |y|, within the slack of 1.13 * 3 e
        check_y(y, expected._replace(scale=1.13 * expected.scale), dtype, what)
        dx, dweight, dbias = cugn.group_norm_backward(b, a, 4, *parameters, **options)
        result = cugn.GroupNormGrads(_restored(dx, library, last), *map(library.numpy, (dweight, dbias)))
        check_gradients(result, gradients, dtype, what)


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_normalize(row: str, dtype: str, library: Library) -> None:
    """Statistics that the caller supplies are applied within the forward's bound."""
    if dtype not in library.floats:
        pytest.skip(f"{library.name} has no {dtype}")
    x, weight, bias, _ = _input(row, dtype, SHAPE)
    forward = oracle.forward(x, 6, weight, bias, eps=ROWS[row].eps)
    with np.errstate(over="ignore"):
        mean, rstd = forward.mean.astype(np.float64), forward.rstd.astype(np.float64)
    if not np.isfinite(rstd).all():
        pytest.skip("no float64 holds this rstd")
    shift, scale = (np.repeat(v, 4, axis=1)[:, :, None, None].astype(oracle.LONG) for v in (mean, rstd))
    x_hat = (np.asarray(x, np.float64).astype(oracle.LONG) - shift) * scale
    w, b = (v.astype(np.float64).astype(oracle.LONG)[:, None, None] for v in (weight, bias))
    expected = forward._replace(y=x_hat * w + b, scale=np.abs(w) * np.maximum(1, np.abs(x_hat)) + np.abs(b))
    for last in (False, True):
        y = cugn.normalize(
            _arranged(x, library, last),
            library.array(mean),
            library.array(rstd),
            6,
            library.array(weight),
            library.array(bias),
            channel_axis=-1 if last else 1,
        )
        check_y(_restored(y, library, last), expected, dtype, f"channels {'last' if last else 'first'}")


@pytest.mark.parametrize(("row", "dtype"), CASES)
def test_moments(row: str, dtype: str, library: Library) -> None:
    """Mean within 4 eps of float64, variance within 1e-10 (1e-14 in float64) of its value."""
    if dtype not in library.floats or row in ("1e200 N", "1e206 + 1e200 N", "1.7e308 U", "1e-200 N", "1e-320 N, eps=0"):
        pytest.skip(f"{library.name} has no {dtype}" if dtype not in library.floats else "float64 does not hold m2")
    if "1e-200" in row or (row == "largest of the dtype" and dtype == "float64"):
        pytest.skip("float64 does not hold m2")
    x = _input(row, dtype, SHAPE)[0]
    for groups in (6, 24, list(LABELS)):
        expected = oracle.forward(x, groups)
        for last in (False, True):
            result = cugn.moments(_arranged(x, library, last), groups, channel_axis=-1 if last else 1)
            count, mean, m2 = (library.numpy(v) for v in result)
            assert count.dtype == np.int64
            assert mean.dtype == m2.dtype == np.float64
            np.testing.assert_array_equal(count, expected.count)
            std = np.sqrt(expected.m2 / expected.count)
            assert (np.abs(mean - expected.mean) <= 4 * 2.0**-52 * (np.abs(expected.mean) + std)).all()
            np.testing.assert_allclose(m2, expected.m2.astype(np.float64), rtol=1e-14 if dtype == "float64" else 1e-10)


def test_given_statistics_of_float64_beside_a_group_without_elements() -> None:
    """The slope of a gate needs more digits of the mean than one float64 has, also where the mask empties a group."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1e4, 1, (2, 4, 9)), rng.normal(size=(2, 4, 9))
    where = np.ones((2, 4, 9), bool)
    where[1, 2:] = False
    options: dict[str, Any] = {"where": where, "activation": "gelu"}
    _, mean, rstd = cugn.group_norm_forward(x, 2, **options)
    assert np.isnan(mean[1, 1])
    own = cugn.group_norm_backward(dy, x, 2, **options)
    given = cugn.group_norm_backward(dy, x, 2, mean=mean, rstd=rstd, **options)
    for a, b in zip(own, given, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_of_channels_beyond_the_range_of_float16(xp: Library) -> None:
    """They are infinite, as results beyond a dtype's range are, without a warning."""
    if "float16" not in xp.floats:
        pytest.skip(f"{xp.name} has no float16")
    x = np.random.default_rng(0).normal(size=(1, 2, 64)).astype(np.float32)
    dy = 4e4 * (1 + x * x)
    X, DY, W = xp.array(x), xp.array(dy), xp.array(np.ones(2, np.float16))
    assert np.isposinf(xp.numpy(cugn.group_norm_backward(DY, X, 2, W).dbias)).all()
    if xp.name == "numpy":
        u = np.linspace(-1e8, 1e8, x.size, dtype=np.float32).reshape(x.shape)
        assert np.isinf(cugn.group_norm_double_backward(u, DY, X, 2, W, W).gweight).any()
        da = pytest.importorskip("dask.array")
        grads = cugn.group_norm_backward(da.from_array(dy, (1, 2, 32)), da.from_array(x, (1, 2, 32)), 2, W)
        assert np.isposinf(grads.dbias.compute()).all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("form", ["table", "strided table", "volume", "channels last"])
def test_what_a_mask_leaves_out_1e305_standard_deviations_away(form: str, activation: str | None) -> None:
    """Right up to a sixteenth of float64's range; beyond it an infinity that no other group sees."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, 3, 32, 1 if "table" in form else 9))
    where = rng.random(x.shape) < 0.7
    weight, bias = rng.normal(size=(2, 32))

    def placed(a: np.ndarray) -> np.ndarray:
        if form == "channels last":
            return np.ascontiguousarray(np.moveaxis(a, 1, -1))
        return np.repeat(a, 2, axis=1)[:, ::2] if form == "strided table" else a

    options: dict[str, Any] = {"where": placed(where), "channel_axis": -1 if form == "channels last" else 1}
    options["activation"] = activation

    def results(factor: float, group: slice) -> list[np.ndarray]:
        far = x.copy()
        far[:, group] = np.where(where, x, factor * np.sign(x))[:, group]
        arguments = (placed(far), 2, weight, bias)
        y = cugn.group_norm(*arguments, **options)
        grads = cugn.group_norm_backward(placed(dy), *arguments, **options)
        if factor < 1e306:
            check_y(y, oracle.forward(*arguments, **options), "float64", form)
            check_gradients(grads, oracle.backward(placed(dy), *arguments, **options), "float64", form)
        channels = (y, grads.dx) if form == "channels last" else (y.swapaxes(1, -1), grads.dx.swapaxes(1, -1))
        return [a[..., :16] for a in (*channels, grads.dweight, grads.dbias)]

    for result in (results(1e305, slice(None)), results(1e305, slice(16, 32))):
        assert all(np.isfinite(a).all() for a in result)
    for a, b in zip(results(1.0, slice(16, 32)), results(1e308, slice(16, 32)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "row", [[-1.6e306, 1e305, -1.4e306], [1e3, 2e3, -1.2e306], [1e306, -2e306, 1.2e300], [5.0, 1e300, 1e290]]
)
def test_gradients_where_a_mask_keeps_one_element_at(row: list[float], activation: str | None) -> None:
    """Its mean is far more standard deviations from 0 than 2^900; what is left out is as far from it."""
    for sign, last in ((sign, last) for sign in (1, -1) for last in (False, True)):
        x = np.full((2, 1, 3), sign * np.array(row))
        dy = np.array([[[1.0, -2.0, 3.0]], [[0.0, 1.0, 0.5]]])
        where = np.zeros((1, 1, 3), bool)
        where[..., -1] = True
        options: dict[str, Any] = {"where": where, "eps": 1.0, "activation": activation}
        expected = oracle.backward(dy, x, 1, **options)
        if last:
            x, dy, options["where"] = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy, where))
        grads = cugn.group_norm_backward(dy, x, 1, channel_axis=-1 if last else 1, **options)
        if last:
            grads = grads._replace(dx=np.moveaxis(grads.dx, -1, 1))
        check_gradients(grads, expected, "float64", f"{sign}, channels {'last' if last else 'first'}")


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", ["table", "volume", "channels last"])
def test_infinite_rstd(form: str, dtype: str, activation: str | None) -> None:
    """Of a group of which a mask keeps one element, with eps = 0: what is left out is infinite, what is kept NaN."""
    x, where = np.array([[1.5, -2.0, 1.0]]).astype(dtype), np.array([[False, False, True]])
    dy = np.array([[1.0, 2.0, -1.0]]).astype(dtype)
    groups: Any = [0, 0, 0] if form == "table" else 1
    if form != "table":
        x, where, dy = (a.reshape(1, 1, 3) if form == "volume" else a.reshape(1, 3, 1) for a in (x, where, dy))
    options: dict[str, Any] = {"eps": 0.0, "where": where, "channel_axis": -1 if form == "channels last" else 1}
    options["activation"] = activation
    y = cugn.group_norm(x, groups, **options)
    np.testing.assert_array_equal(y.ravel(), [np.inf, 0 if activation else -np.inf, np.nan])
    dx = cugn.group_norm_backward(dy, x, groups, **options).dx
    np.testing.assert_array_equal(y, oracle.forward(x, groups, **options).y.astype(np.float64))
    np.testing.assert_array_equal(dx, oracle.backward(dy, x, groups, **options).dx.astype(np.float64))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["table", "strided table", "volume", "channels last"])
def test_gradients_beside_an_infinity_that_a_mask_leaves_out(form: str, dtype: str, value: float) -> None:
    """Its y depends on the statistics, so it spoils dx of its group's kept elements, and of nothing else."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 3, 16, 1 if "table" in form else 9)).astype(dtype)
    where = rng.random(x.shape) < 0.7
    where[1, 3, 0] = False
    bad = x.copy()
    bad[1, 3, 0] = value

    def gradient(a: np.ndarray) -> np.ndarray:
        if form == "channels last":
            arrays = [np.ascontiguousarray(np.moveaxis(v, 1, -1)) for v in (dy, a, where)]
        else:
            arrays = [np.repeat(v, 2, axis=1)[:, ::2] if form == "strided table" else v for v in (dy, a, where)]
        axis = -1 if form == "channels last" else 1
        dx = cugn.group_norm_backward(*arrays[:2], 2, where=arrays[2], channel_axis=axis).dx
        return np.moveaxis(dx, axis, 1)

    spoiled = np.zeros(x.shape, bool)
    spoiled[1, :8] = where[1, :8]
    result = gradient(bad)
    assert np.isnan(result[spoiled]).all()
    changed = spoiled.copy()
    changed[1, 3, 0] = np.isnan(value)
    np.testing.assert_array_equal(np.where(changed, 0, result), np.where(changed, 0, gradient(x)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_a_group_that_is_not_finite(dtype: str, value: float, library: Library) -> None:
    """rstd and m2 are NaN, whatever the layout, the groups, the mask; those of other groups stay as they are."""
    rng = np.random.default_rng(0)
    for size in (1, 5, 40, 300):
        x = rng.normal(size=(2, 6, size)).astype(dtype)
        where = rng.random(x.shape) < 0.6
        where[1, 2, 0] = True
        bad = x.copy()
        bad[1, 2, 0] = value
        for groups, last in (
            (g, last) for g in (6, 3, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 3, 0]) for last in (False, True)
        ):
            for mask in (None, where) if size < 300 else (None,):
                options = {"channel_axis": -1 if last else 1}
                options["where"] = None if mask is None else _arranged(mask, library, last)
                group = 1 if groups == 3 else 2
                results = []
                for a in (bad, x):
                    _, _, rstd = cugn.group_norm_forward(_arranged(a, library, last), groups, **options)
                    m2 = cugn.moments(_arranged(a, library, last), groups, **options).m2
                    results.append([library.numpy(rstd), library.numpy(m2)])
                for a, b in zip(*results, strict=True):
                    assert np.isnan(a[1, group]), (size, groups, last, mask is None)
                    a[1, group] = b[1, group]
                    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("groups", [2, [0, 1, 1, 0]], ids=["equal", "labels"])
@pytest.mark.parametrize("value", [-0.00186, 0.1, 3.0])
def test_relu_of_constant_groups(value: float, groups: Any, last: bool, library: Library) -> None:
    """z is 0, where the slope is 0: dx, dweight, dbias are 0."""
    x = np.full((2, 4, 30), value, np.float32)
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    axis = -1 if last else 1
    arrays = (_arranged(a, library, last) for a in (dy, x))
    grads = cugn.group_norm_backward(*arrays, groups, channel_axis=axis, activation="relu")
    assert all((library.numpy(a) == 0).all() for a in grads)
