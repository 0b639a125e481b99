"""Promise: any call at all keeps the bounds, the invariances and its inputs (random calls, against the oracle)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
from hypothesis import assume, given
from hypothesis import strategies as st
from libraries import dtype_of, threads
from strategies import INTEGERS, LIMIT, Call, calls

import cugn

FLOAT_VALUES = ("normal", "offset", "constant", "integers", "outlier")
FACTOR = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}


def _arrays(call: Call) -> list[np.ndarray]:
    where = call.options["where"]
    return [a for a in (call.x, call.dy, call.weight, call.bias, where) if a is not None]


def _wide(a: Any) -> np.ndarray:
    return np.asarray(a).astype(np.float64).astype(oracle.LONG)


def check(value: np.ndarray, expected: np.ndarray, bound: np.ndarray, dtype: str) -> None:
    """NaN where the oracle has it, infinite beyond the dtype's range, within the bound elsewhere."""
    with np.errstate(all="ignore"):
        value, size = _wide(value), np.abs(expected)
        np.testing.assert_array_equal(np.isnan(value[~np.isinf(expected)]), np.isnan(expected[~np.isinf(expected)]))
        finite = size + bound < LIMIT[dtype] * (1 - 2.0**-8)
        error = np.abs(value - expected)
        wrong = finite & ~(error <= bound)
        assert not wrong.any(), f"{float((error / bound)[wrong].max()):.3g} times the bound"


def y_bound(call: Call, expected: oracle.Forward) -> np.ndarray:
    """The promise of the forward, 1.13 times it under an activation of that slope."""
    e = oracle.epsilon(dtype_of(call.y_dtype))
    scale = expected.scale * (1 if call.options["activation"] in (None, "relu") else 1.13)
    least = oracle.half_ulp(np.zeros(()), dtype_of(call.y_dtype))
    if call.y_dtype in ("float32", "float64"):
        return {"float32": 3, "float64": 4}[call.y_dtype] * e * scale + least
    return oracle.half_ulp(np.abs(expected.y) + 0.01 * e * scale, dtype_of(call.y_dtype)) + 0.01 * e * scale


@given(call=calls())
def test_forward(call: Call) -> None:
    """y, mean and rstd of any call, into out as well; the inputs keep their bytes."""
    before = [a.tobytes() for a in _arrays(call)]
    expected = oracle.forward(call.x, call.groups, call.weight, call.bias, **call.options)
    y, mean, rstd = cugn.group_norm_forward(call.x, call.groups, call.weight, call.bias, **call.options)
    assert y.shape == call.x.shape
    assert y.dtype == dtype_of(call.y_dtype)
    assert mean.shape == rstd.shape == expected.mean.shape
    np.testing.assert_array_equal(np.isnan(rstd), np.isnan(expected.rstd))
    with np.errstate(invalid="ignore"):  # what a mask leaves out may be so far that a small weight would bring it back
        inside = ~(np.isfinite(expected.x_hat) & (np.abs(expected.x_hat) > LIMIT["float64"] / 2))
    check(y[inside], expected.y[inside], y_bound(call, expected)[inside], call.y_dtype)
    out = np.empty_like(y)
    assert cugn.group_norm(call.x, call.groups, call.weight, call.bias, out=out, **call.options) is out
    np.testing.assert_array_equal(out.astype(np.float64), y.astype(np.float64))
    assert [a.tobytes() for a in _arrays(call)] == before


def _right(call: Call) -> Iterator[oracle.Backward]:
    """Gradients that are right: first the oracle's own.

    Under relu an element whose z is a rounding from 0 may count as above 0 or not. z that is 0 is 0, but with labels:
    the mean of a group comes from those of its channels, which thirds make a rounding.
    """
    arguments = (call.x, call.groups, call.weight, call.bias)
    yield oracle.backward(call.dy, *arguments, **call.options)
    plain = {**call.options, "activation": None}
    if call.options["activation"] == "relu":
        z = oracle.forward(*arguments, **plain)
        computed = np.dtype("float64" if call.y_dtype == "float64" else "float32")
        near = np.abs(z.y) <= 4 * oracle.epsilon(computed) * z.scale
        places = np.argwhere(near if isinstance(call.groups, list) else near & (z.y != 0))
        slope = np.where(np.isnan(z.y), z.y, (z.y > 0).astype(oracle.LONG))
        for above in itertools.product((0, 1), repeat=len(places)) if len(places) <= 6 else ():
            slope[tuple(places.T)] = above
            yield oracle.backward(_wide(call.dy) * slope, *arguments, **plain)


def _beyond_float64(call: Call) -> np.ndarray:
    """(N, C, S): elements of groups of which a sum of the backward leaves float64, within a factor of 16.

    Only what a mask leaves out can be that far: docs/design/numerics.md.
    """
    axes = call.options["batch_axis"], call.options["channel_axis"]
    result = oracle.forward(call.x, call.groups, **{**call.options, "activation": None})
    x_hat, dy = (np.abs(oracle.to_ncs(a, *axes)) for a in (result.x_hat, call.dy))
    weight = np.ones(x_hat.shape[1]) if call.weight is None else np.maximum(1, np.abs(_wide(call.weight)))
    terms = dy * x_hat * weight[:, None]
    labels = oracle.labels_of(call.groups, x_hat.shape[1])
    far = np.zeros(x_hat.shape, bool)
    for group in set(labels):
        sums = terms[:, labels == group, :].sum(axis=(1, 2), keepdims=True)
        far[:, labels == group, :] = np.isfinite(sums) & (sums > LIMIT["float64"] / 16)
    return far


@given(call=calls())
def test_backward(call: Call) -> None:
    """dx, dweight, dbias of any call, with the forward's statistics and without; the inputs keep their bytes."""
    before = [a.tobytes() for a in _arrays(call)]
    arguments = (call.dy, call.x, call.groups, call.weight, call.bias)
    plain = oracle.backward(*arguments, **{**call.options, "activation": None})
    _, mean, rstd = cugn.group_norm_forward(call.x, call.groups, call.weight, call.bias, **call.options)
    assume(not np.isinf(rstd).any())  # a mask that leaves equal elements, eps = 0: infinities that cancel or not
    weight_dtype = call.y_dtype if call.weight is None else call.weight.dtype.name
    e, weight_e = (oracle.epsilon(dtype_of(d)) for d in (call.y_dtype, weight_dtype))
    weight_e = max(weight_e, 2.0**-52 if call.y_dtype == "float64" else 2.0**-40)
    far = _beyond_float64(call)
    axes = call.options["batch_axis"], call.options["channel_axis"]
    inside = ~oracle.from_ncs(far, call.x.shape, *axes)
    channels = ~far.any(axis=(0, 2))

    def agree(result: cugn.GroupNormGrads, expected: oracle.Backward) -> None:
        # The terms that dx is a difference of, rather than max|dx|: groups of two elements cancel to nothing. The slope
        # of an activation is off by a rounding of 1, so the terms without it count as well.
        bound = FACTOR[call.y_dtype] * e * (expected.terms + (plain.terms if call.options["activation"] else 0))
        bound = bound + oracle.half_ulp(np.zeros(()), dtype_of(call.y_dtype))
        check(result.dx[inside], expected.dx[inside], bound[inside], call.y_dtype)
        for name in ("dweight", "dbias"):
            terms = getattr(expected, f"{name}_terms") + plain.dbias_terms
            scale = FACTOR[weight_dtype] * weight_e * terms
            value, right = getattr(result, name), getattr(expected, name)
            check(value[channels], right[channels], scale[channels], weight_dtype)

    for statistics in ({}, {"mean": mean, "rstd": rstd}):
        result = cugn.group_norm_backward(*arguments, **statistics, **call.options)
        assert (result.dx.shape, result.dx.dtype) == (call.x.shape, dtype_of(call.y_dtype))
        assert {result.dweight.dtype, result.dbias.dtype} == {dtype_of(weight_dtype)}
        failures = []
        for expected in _right(call):
            try:
                agree(result, expected)
                break
            except AssertionError as error:
                failures.append(error)
        else:
            raise failures[0]
    assert [a.tobytes() for a in _arrays(call)] == before


@given(call=calls(dtypes=("float64",), values=FLOAT_VALUES, eps=(1e-5, 1.0)), data=st.data())
def test_jvp_is_the_adjoint_of_the_backward(call: Call, data: st.DataObject) -> None:
    """<dy, ty> = <dx, tx> + <dweight, tweight> + <dbias, tbias>."""
    _no_empty_group(call)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tx, channels = rng.normal(size=call.x.shape), call.x.shape[call.options["channel_axis"]]
    tweight, tbias = rng.normal(size=(2, channels))
    arguments = (call.x, call.groups, call.weight, call.bias)
    ty = cugn.group_norm_jvp(tx, *arguments, tweight=tweight, tbias=tbias, **call.options)
    dx, dweight, dbias = (v.astype(float) for v in cugn.group_norm_backward(call.dy, *arguments, **call.options))
    left = (call.dy * ty).sum()
    right = (dx * tx).sum() + (dweight * tweight).sum() + (dbias * tbias).sum()
    size = sum(np.abs(v).sum() for v in (call.dy * ty, dx * tx, dweight * tweight, dbias * tbias))
    weight_e = 0 if call.weight is None else oracle.epsilon(call.weight.dtype)
    size += np.abs(oracle.backward(call.dy, *arguments, **call.options).terms * np.abs(tx)).sum().astype(float)
    assert abs(left - right) <= (1e-14 + 4 * weight_e) * max(1, size) * 10


@given(call=calls(dtypes=("float64",), values=("normal", "integers"), eps=(1e-2, 1.0)), data=st.data())
def test_double_backward_is_the_slope_of_the_backward(call: Call, data: st.DataObject) -> None:
    """gdy is the jvp's, and gx along v the difference quotient of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>."""
    assume(call.options["activation"] != "relu")  # has no slope at 0, where integers are
    _no_empty_group(call)
    call.weight, call.bias = (None if v is None else v.astype(float) for v in (call.weight, call.bias))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ddx, v = rng.normal(size=(2, *call.x.shape))
    ddweight, ddbias = rng.normal(size=(2, call.x.shape[call.options["channel_axis"]]))
    tail = (call.groups, call.weight, call.bias)
    result = cugn.group_norm_double_backward(
        ddx, call.dy, call.x, *tail, ddweight=ddweight, ddbias=ddbias, **call.options
    )
    ty = cugn.group_norm_jvp(ddx, call.x, *tail, tweight=ddweight, tbias=ddbias, **call.options)
    np.testing.assert_allclose(result.gdy, ty, rtol=0, atol=1e-11 * max(1, np.abs(ty).max()))

    def scalar(x: np.ndarray) -> float:
        dx, dweight, dbias = cugn.group_norm_backward(call.dy, x, *tail, **call.options)
        return float((ddx * dx).sum() + (ddweight * dweight).sum() + (ddbias * dbias).sum())

    step = 1e-4
    quotients = [(scalar(call.x + h * v) - scalar(call.x - h * v)) / (2 * h) for h in (step, 2 * step)]
    quotient = (4 * quotients[0] - quotients[1]) / 3  # error step^4 times derivatives up to eps^(-5/2) = 1e5
    size = np.abs(result.gx * v).sum() + np.abs(result.gx).max() + 1
    assert abs((result.gx * v).sum() - quotient) <= 1e-5 * size * max(1.0, call.options["eps"] ** -1)


@given(call=calls(values=FLOAT_VALUES))
def test_normalize_with_moments_is_the_forward(call: Call) -> None:
    """Moments and normalize apart give what the forward gives, to the bounds of both."""
    _no_empty_group(call)
    axes = {k: call.options[k] for k in ("channel_axis", "batch_axis")}
    m = cugn.moments(call.x, call.groups, where=call.options["where"], **axes)
    expected = oracle.forward(call.x, call.groups, call.weight, call.bias, **call.options)
    np.testing.assert_array_equal(m.count, expected.count)
    y = cugn.normalize(
        call.x,
        m.mean,
        m.rstd(call.options["eps"]),
        call.groups,
        call.weight,
        call.bias,
        activation=call.options["activation"],
        **axes,
    )
    with np.errstate(all="ignore"):
        # a float64 mean is off by half a rounding of |mean|, which counts as |mean| rstd in units of x_hat
        mean = np.nan_to_num(np.abs(expected.mean * expected.rstd).max(initial=0))
        slack = 2.0**-52 * mean * (1 if call.weight is None else np.abs(_wide(call.weight)).max())
    if call.options["eps"] > 0:
        check(y, expected.y, y_bound(call, expected) + 2 * slack, call.y_dtype)


@given(call=calls(values=FLOAT_VALUES, masks=False), data=st.data())
def test_samples_do_not_see_each_other(call: Call, data: st.DataObject) -> None:
    """Samples in another order, and a part of them, keep their bits; so do results of 1 and 3 threads."""
    batch, _ = oracle.axes_of(call.x.ndim, call.options["batch_axis"], call.options["channel_axis"])
    arguments = (call.groups, call.weight, call.bias)
    y = cugn.group_norm(call.x, *arguments, **call.options)
    dx = cugn.group_norm_backward(call.dy, call.x, *arguments, **call.options).dx
    for axis in batch:
        # A slice keeps the strides along the other axes, and so the layout, on which bits may depend.
        part = data.draw(st.slices(call.x.shape[axis]).filter(lambda s, n=call.x.shape[axis]: len(range(n)[s])))
        part = (slice(None),) * axis + (part,)
        some = cugn.group_norm(call.x[part], *arguments, **call.options)
        np.testing.assert_array_equal(some.astype(float), y[part].astype(float))
        some = cugn.group_norm_backward(call.dy[part], call.x[part], *arguments, **call.options).dx
        np.testing.assert_array_equal(some.astype(float), dx[part].astype(float))
    for count in (1, 3):
        with threads(count):
            again = cugn.group_norm(call.x, *arguments, **call.options)
        np.testing.assert_array_equal(again.astype(float), y.astype(float))


@given(call=calls(dtypes=("float32", "float64", *INTEGERS), values=("integers", "normal"), eps=(1e-5,)), data=st.data())
def test_shift_and_scale(call: Call, data: st.DataObject) -> None:
    """Adding a constant and multiplying by a power of two (eps by its square) change y by no more than its bound."""
    if call.x.dtype.kind in "iu":
        call.x = (call.x // 4).astype(call.x.dtype)
    else:
        call.x = np.round(call.x * 8).astype(call.x.dtype)  # small integers: exact when moved
    expected = oracle.forward(call.x, call.groups, call.weight, call.bias, **call.options)
    shift = data.draw(st.integers(0, 60))
    shifted = (call.x + call.x.dtype.type(shift)).astype(call.x.dtype)
    y = cugn.group_norm(shifted, call.groups, call.weight, call.bias, **call.options)
    check(y, expected.y, y_bound(call, expected), call.y_dtype)
    if call.x.dtype.kind == "f":
        power = data.draw(st.integers(-30, 30))
        options = {**call.options, "eps": call.options["eps"] * 4.0**power}
        y = cugn.group_norm(
            np.ldexp(call.x, power).astype(call.x.dtype), call.groups, call.weight, call.bias, **options
        )
        check(y, expected.y, y_bound(call, expected), call.y_dtype)


@given(call=calls(values=FLOAT_VALUES), data=st.data())
def test_permuted_channels(call: Call, data: st.DataObject) -> None:
    """Channels, labels, weights and masks permuted together permute y and dx to the bit."""
    assume(isinstance(call.groups, list))
    axis = call.options["channel_axis"] % call.x.ndim
    C = call.x.shape[axis]
    order = data.draw(st.permutations(range(C)))
    x, dy = call.x, call.dy
    # The same layout on both sides: bits may depend on it.
    x, dy = (np.ascontiguousarray(a) for a in (x, dy))
    where = call.options["where"]
    full = None if where is None else np.ascontiguousarray(np.broadcast_to(where, x.shape))
    take = {"where": None if full is None else np.ascontiguousarray(np.take(full, order, axis))}
    weight, bias = (None if v is None else v[order] for v in (call.weight, call.bias))
    y = cugn.group_norm(x, call.groups, call.weight, call.bias, **{**call.options, "where": full})
    dx = cugn.group_norm_backward(dy, x, call.groups, call.weight, call.bias, **{**call.options, "where": full}).dx
    labels = [call.groups[c] for c in order]
    px, pdy = (np.ascontiguousarray(np.take(a, order, axis)) for a in (x, dy))
    py = cugn.group_norm(px, labels, weight, bias, **{**call.options, **take})
    pdx = cugn.group_norm_backward(pdy, px, labels, weight, bias, **{**call.options, **take}).dx
    np.testing.assert_array_equal(py.astype(float), np.take(y, order, axis).astype(float))
    np.testing.assert_array_equal(pdx.astype(float), np.take(dx, order, axis).astype(float))


@given(call=calls(dtypes=("float64",), values=FLOAT_VALUES), data=st.data())
def test_moments_of_parts(call: Call, data: st.DataObject) -> None:
    """Any partition of the elements by masks merges into the whole's moments."""
    axes = {k: call.options[k] for k in ("channel_axis", "batch_axis")}
    owner = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 3, call.x.shape)
    kept = np.broadcast_to(True if call.options["where"] is None else call.options["where"], call.x.shape)
    parts = [cugn.moments(call.x, call.groups, where=kept & (owner == k), **axes) for k in range(3)]
    m = parts[0].merge(parts[1]).merge(parts[2])
    expected = oracle.forward(call.x, call.groups, **{**call.options, "activation": None})
    np.testing.assert_array_equal(m.count, expected.count)
    with np.errstate(all="ignore"):
        size = np.abs(expected.mean) + np.sqrt(expected.m2 / expected.count)
        e = 2.0**-52
        check(m.mean, expected.mean, 8 * e * size, "float64")
        # each of the two merges moves m2 by the means' roundings times their distance, and by those squared
        between = 8 * e * size * np.sqrt(expected.m2 * expected.count) + expected.count * (4 * e * size) ** 2
        check(m.m2, np.where(expected.count == 0, 0, expected.m2), 16 * e * expected.m2 + between, "float64")


def _no_empty_group(call: Call) -> None:
    """Discard the call if a group has no elements."""
    where = call.options["where"]
    if where is not None:
        options = {k: call.options[k] for k in ("channel_axis", "batch_axis", "where")}
        assume(oracle.forward(call.x, call.groups, **options).count.all())
