"""Promise: tables keep every other promise: small, labelled or masked groups, in lanes; wide groups, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from libraries import FLOATS, dtype_of, is_rare, threads
from test_accuracy import ROWS, check_gradients, check_y

import cugn

C = 24
WIDE = 86  # in two groups: vectors of 16 and a rest
UNEQUAL = [int(v) for v in np.random.default_rng(5).permutation([0] * 3 + [1] * 11 + [2] * 2 + [3] * 8)]
FORMS = {
    "groups": {"groups": 6},
    "labels": {"groups": UNEQUAL},
    "where": {"groups": 4, "where": True},
    "labels, where": {"groups": UNEQUAL, "where": True},
    "wide": {"groups": 2},
}
VALUES = [row for row in ROWS if row not in ("1e-45 N, eps=0", "1e-7 N, eps=0", "1e-320 N, eps=0")]
"""Not those whose rstd or dx no float64 holds."""


def channels_of(form: str) -> int:
    return WIDE if form == "wide" else C


def arguments_of(form: str, samples: int, channels: int = C) -> dict[str, Any]:
    """Groups, and a mask that keeps at least two of each group."""
    given = dict(FORMS[form])
    if "where" in given:
        rng = np.random.default_rng(samples)
        labels = oracle.labels_of(given["groups"], channels)
        keep = rng.random((samples, channels)) < 0.7
        for group in range(labels.max() + 1):
            keep[:, np.flatnonzero(labels == group)[:2]] = True
        given["where"] = keep
    return given


@pytest.mark.rare(when=lambda dtype, form: is_rare(dtype, labels="labels" in form, masks="where" in form))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", VALUES)
def test_values(row: str, dtype: str, form: str) -> None:
    """Accuracy of the forward and the backward, for the values of the accuracy table."""
    if dtype not in ROWS[row].dtypes:
        pytest.skip(f"{dtype} does not hold these values")
    if row == "largest of the dtype" and "where" in form:
        pytest.skip("what is left out may be an infinity away from what is kept")
    rng = np.random.default_rng(sum(map(ord, row)))
    channels = channels_of(form)
    x = ROWS[row].make(rng, (19, channels, 1))[:, :, 0]
    if row == "largest of the dtype":
        x = x * float(np.finfo(dtype).max if dtype != "bfloat16" else 3.3895314e38)
    x = x.astype(dtype_of(dtype))
    weight, bias = rng.normal(size=(2, channels)).astype(dtype_of(dtype))
    dy = (rng.normal(size=x.shape) * ROWS[row].dy).astype(dtype_of(dtype))
    options = {**arguments_of(form, len(x)), "eps": ROWS[row].eps}
    expected = oracle.forward(x, weight=weight, bias=bias, **options)
    result = cugn.group_norm_forward(x, weight=weight, bias=bias, **options)
    check_y(result.y, expected, dtype, row)
    for value, wanted in ((result.mean, expected.mean), (result.rstd, expected.rstd)):
        spread = np.abs(wanted) + (1 / expected.rstd if value is result.mean else 0)
        assert (np.abs(value - wanted) <= 2.0**-44 * spread + 5e-324).all(), row
    if dtype != "float64":  # of its mean one float64 is not enough
        y = cugn.normalize(x, result.mean, result.rstd, options["groups"], weight, bias)
        check_y(y, expected, dtype, row)
    moments = cugn.moments(x, **{k: v for k, v in options.items() if k != "eps"})
    np.testing.assert_array_equal(moments.count, expected.count)
    e = 2.0**-48 if dtype == "float64" else 2.0**-44
    spread = expected.m2 + expected.count * (e * np.abs(expected.mean)) ** 2
    held = expected.m2 < 1e308
    assert (np.abs(moments.m2 - expected.m2)[held] <= (e * spread)[held] + 5e-324).all(), row
    assert (np.abs(moments.mean - expected.mean) <= e * (np.abs(expected.mean) + spread**0.5)).all(), row
    if ROWS[row].backward in (None, FLOATS) or dtype in (ROWS[row].backward or ()):
        expected = oracle.backward(dy, x, weight=weight, bias=bias, **options)
        # of two or three values, dx is what is left when its terms cancel
        left = expected.group_max + expected.terms * (1.0 if dtype == "float64" else 2.0**-20)
        expected = expected._replace(group_max=left, dweight_terms=expected.dweight_terms + expected.dbias_terms)
        result = cugn.group_norm_backward(dy, x, weight=weight, bias=bias, **options)
        check_gradients(result, expected, dtype, row)


@pytest.mark.rare(when=lambda dtype, form: is_rare(dtype, labels="labels" in form, masks="where" in form))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sample_has_its_own_lane(dtype: str, form: str) -> None:
    """Samples of any number, order, distance and batch axes, by any threads: each has the bits that it has alone."""
    rng = np.random.default_rng(1)
    channels = channels_of(form)
    x, dy = rng.normal(3, 2, size=(2, 47, channels)).astype(dtype_of(dtype))
    if dtype == "float64":  # beside samples of other powers of two than they are taken with
        x[[3, 17]] *= 1e-200
        x[[5, 30]] *= 1e200
        x[[8, 40]] = 2.5
        x[20, :7] = 1e300
    weight, bias = rng.normal(size=(2, channels)).astype(dtype_of(dtype))
    options = arguments_of(form, len(x))
    where = options.pop("where", None)

    def results(x: Any, dy: Any, where: Any, axis: Any = 0) -> list[bytes]:
        given = {**options, "weight": weight, "bias": bias, "where": where, "batch_axis": axis, "channel_axis": -1}
        y, mean, rstd = cugn.group_norm_forward(x, **given)
        dx = cugn.group_norm_backward(dy, x, **given).dx
        again = cugn.group_norm_backward(dy, x, mean=mean, rstd=rstd, **given).dx
        assert dx.tobytes() == again.tobytes()
        each = [v.reshape(-1, v.shape[-1]) for v in (y, mean, rstd, dx)]
        return [b"".join(v[n].tobytes() for v in each) for n in range(len(each[0]))]

    alone = [
        results(x[n : n + 1], dy[n : n + 1], None if where is None else where[n : n + 1])[0] for n in range(len(x))
    ]
    for count in (1, 2, 5):
        with threads(count):
            assert results(x, dy, where) == alone
    wide = [np.concatenate([v, v], axis=1)[:, :channels] for v in (x, dy)]  # rows with a gap
    assert results(*wide, where) == alone
    for part in (slice(None, None, -1), slice(3, None, 2), slice(15, 33)):
        assert results(x[part], dy[part], None if where is None else where[part]) == alone[part]
    split = [None if v is None else v[:44].reshape(4, 11, channels)[:, ::2] for v in (x, dy, where)]
    assert results(*split, (0, 1)) == [alone[11 * i + j] for i in range(4) for j in range(0, 11, 2)]


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values_stay_in_their_group(dtype: str, form: str, special: float) -> None:
    """A NaN or an infinity spoils its own group of its own sample, one that is masked none; empty groups are NaN."""
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 20, channels_of(form))).astype(dtype)
    options = arguments_of(form, len(x))
    labels = oracle.labels_of(options["groups"], channels_of(form))
    channel = int(np.flatnonzero(labels == 1)[0])
    options.setdefault("where", None)
    before = cugn.group_norm_forward(x, **options), cugn.group_norm_backward(dy, x, **options)
    x[7, channel] = special
    if options["where"] is not None:
        options["where"][9, labels == 1] = False
        left_out = np.argwhere(~options["where"])[0]
        x[tuple(left_out)] = special
    after = cugn.group_norm_forward(x, **options), cugn.group_norm_backward(dy, x, **options)
    touched = np.zeros(x.shape, bool)
    touched[7] = labels == 1
    if options["where"] is not None:
        touched[9] = labels == 1
    for old, new in ((before[0].y, after[0].y), (before[1].dx, after[1].dx)):
        assert np.isnan(new[touched]).all()
        same = ~touched
        if options["where"] is not None:
            same[tuple(left_out)] = False
            if new is after[1].dx:
                same[left_out[0], labels == labels[left_out[1]]] = False
        np.testing.assert_array_equal(new[same], old[same])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-300, 8e306, -8e306])
@pytest.mark.parametrize("form", FORMS)
def test_constant_groups_without_eps(form: str, value: float) -> None:
    """x_hat is 0/0, whatever the values' size; with any eps at all it is 0."""
    x = np.full((3, channels_of(form)), value)
    options = arguments_of(form, len(x))
    y, mean, rstd = cugn.group_norm_forward(x, eps=0.0, **options)
    assert np.isnan(y).all()
    np.testing.assert_array_equal(mean, value)
    assert np.isinf(rstd).all()
    for eps in (5e-324, 1e-300, 1e-5):
        assert not cugn.group_norm(x, eps=eps, **options).any()


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "wide"])
def test_activations_of_large_groups(form: str, activation: str) -> None:
    """Groups of more channels than are computed in float64 throughout: the slopes are float32."""
    rng = np.random.default_rng(3)
    channels = 160
    options: dict[str, Any] = {"groups": 4}
    if "labels" in form:
        options["groups"] = rng.permutation(np.repeat([0, 1, 2], [40, 80, 40])).tolist()
    if "where" in form:
        options["where"] = rng.random((18, channels)) < 0.7
    x, dy = rng.normal(1, 2, size=(2, 18, channels)).astype(np.float32)
    weight, bias = rng.normal(size=(2, channels)).astype(np.float32)
    options["activation"] = activation
    expected = oracle.backward(dy, x, weight=weight, bias=bias, **options)
    # a slope is off by units of 1, wherever it is next to 0
    x_hat = oracle.forward(x, weight=weight, bias=bias, **options).x_hat
    terms = {"dbias_terms": np.abs(dy).sum(0), "dweight_terms": np.abs(dy * x_hat).sum(0)}
    result = cugn.group_norm_backward(dy, x, weight=weight, bias=bias, **options)
    check_gradients(result, expected._replace(**terms), "float32", form)


@pytest.mark.parametrize("shift", [0, 4, 5])
@pytest.mark.parametrize("form", ["groups", "labels"])
def test_results_past_the_caches(form: str, shift: int) -> None:
    """Large results, wherever their rows begin: the bits of small ones, and nothing beside them."""
    rng = np.random.default_rng(4)
    samples = (17 << 20) // (4 * C)
    x, dy = rng.normal(size=(2, samples, C)).astype(np.float32)
    memory = np.zeros((2, x.size + 32), np.float32)
    out, dx = memory[:, shift : shift + x.size].reshape(2, *x.shape)
    groups = FORMS[form]["groups"]
    cugn.group_norm(x, groups, out=out)
    cugn.group_norm_backward(dy, x, groups, out=dx)
    for rows in (slice(0, 40), slice(samples - 40, samples)):
        np.testing.assert_array_equal(out[rows], cugn.group_norm(x[rows], groups))
        np.testing.assert_array_equal(dx[rows], cugn.group_norm_backward(dy[rows], x[rows], groups).dx)
    assert not memory[:, :shift].any()
    assert not memory[:, shift + x.size :].any()


@pytest.mark.parametrize("groups", ["one", "labels"])
def test_long_sums_of_equal_terms(groups: str) -> None:
    """float64: additions of the same few terms round the same way each time, which no long sum may keep."""
    channels = 12_000
    x = np.where(np.arange(channels) % 3 == 0, 0.1, 0.7)[None].repeat(2, 0)
    dy = np.where(np.arange(channels) % 7 == 0, 0.3, 0.1)[None].repeat(2, 0)
    where = np.ones(x.shape, bool)
    where[:, 5] = False
    given: Any = 1 if groups == "one" else [0] * channels
    moments = cugn.moments(x, given, where=where)
    expected = oracle.forward(x, given, where=where)
    assert (np.abs(moments.m2 - expected.m2) <= 4 * 2.0**-52 * expected.m2).all()
    result, right = cugn.group_norm_backward(dy, x, given, where=where), oracle.backward(dy, x, given, where=where)
    assert (np.abs(result.dx - right.dx) <= 4 * 2.0**-52 * right.group_max).all()
