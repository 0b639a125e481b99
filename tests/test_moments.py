"""Promise: moments of parts merge into those of the whole, in any order, empty parts included."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
from libraries import Library

import cugn
from cugn import Moments, parts


def parts_of(x: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    """Parts along the last axis."""
    return np.split(x, cuts, axis=-1)


def merged(parts: list[Moments]) -> Moments:
    """One after the other."""
    result = parts[0]
    for part in parts[1:]:
        result = result.merge(part)
    return result


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
def test_parts_of_an_array(offset: float, xp: Library) -> None:
    """Uneven parts, merged in any order, are the whole's moments."""
    x = np.random.default_rng(0).normal(offset, 1, (2, 6, 301))
    expected = oracle.forward(x, 3)
    parts = [cugn.moments(xp.array(p), 3) for p in parts_of(x, [1, 7, 100, 101])]
    # A float64 mean is off by eps |mean| / 2, which moves m2 by count * |delta| of it; parts of 1 to 200 elements.
    tolerance = 1e-14 + 1e-15 * abs(offset)
    for order in itertools.permutations(range(5)):
        m = merged([parts[i] for i in order])
        np.testing.assert_array_equal(xp.numpy(m.count), expected.count)
        np.testing.assert_allclose(xp.numpy(m.mean), expected.mean.astype(float), rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(xp.numpy(m.m2), expected.m2.astype(float), rtol=tolerance)
        if xp.name == "jax":
            break  # one order: its merges are compiled one by one


def test_groups_of_parts_of_different_scale() -> None:
    """Parts whose means lie far apart: the variance is that between the parts."""
    x = np.concatenate([np.full((1, 2, 50), 0.0), np.full((1, 2, 150), 4e8)], axis=-1)
    m = cugn.moments(x[..., :50], 1).merge(cugn.moments(x[..., 50:], 1))
    assert m.mean[0, 0] == 3e8
    np.testing.assert_allclose(m.var, x.var(), rtol=1e-15)


def test_empty_parts_are_neutral(xp: Library) -> None:
    """An empty part on either side changes nothing; two of them stay empty, without a warning."""
    x = xp.array(np.random.default_rng(0).normal(5, 1, (2, 4, 9)))
    whole = cugn.moments(x, 2)
    empty = cugn.moments(x, 2, where=xp.array(np.zeros(9, bool)))
    assert not xp.numpy(empty.count).any()
    assert np.isnan(xp.numpy(empty.mean)).all()
    assert not xp.numpy(empty.m2).any()
    for m in (whole.merge(empty), empty.merge(whole)):
        for value, wanted in zip(m, whole, strict=True):
            np.testing.assert_array_equal(xp.numpy(value), xp.numpy(wanted))
    both = empty.merge(empty)
    assert not xp.numpy(both.count).any()
    assert np.isnan(xp.numpy(both.mean)).all()
    assert np.isnan(xp.numpy(both.var)).all()
    assert np.isnan(xp.numpy(both.rstd())).all()


def test_parts_that_are_empty_in_some_groups() -> None:
    """Masks that divide the elements of each group unevenly."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (3, 4, 50))
    owner = rng.integers(0, 3, x.shape)
    owner[0, :2] = 1
    m = merged([cugn.moments(x, 2, where=owner == k) for k in range(3)])
    whole = cugn.moments(x, 2)
    np.testing.assert_array_equal(m.count, whole.count)
    np.testing.assert_allclose(m.mean, whole.mean, rtol=1e-15)
    np.testing.assert_allclose(m.m2, whole.m2, rtol=1e-14)


def test_large_and_small_values() -> None:
    """Means of 1e200 and 1e-200 merge: the product is taken so that no factor leaves the range."""
    for scale in (1e150, 1e-150):
        x = np.random.default_rng(0).normal(size=(1, 1, 40)) * scale
        m = cugn.moments(x[..., :10], 1).merge(cugn.moments(x[..., 10:], 1))
        np.testing.assert_allclose(m.m2, cugn.moments(x, 1).m2, rtol=1e-14)
    m = cugn.moments(np.full((1, 1, 4), 1e200), 1)
    assert m.merge(m).m2[0, 0] == 0
    assert m.merge(m).mean[0, 0] == 1e200


def test_many_parts() -> None:
    """A thousand merges lose no more than a thousand roundings."""
    x = np.random.default_rng(0).normal(100, 1, (1, 1, 10_000))
    m = merged([cugn.moments(p, 1) for p in np.split(x, 1000, axis=-1)])
    expected = oracle.forward(x, 1)
    np.testing.assert_allclose(m.mean, expected.mean.astype(float), rtol=1e-13)
    np.testing.assert_allclose(m.m2, expected.m2.astype(float), rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_parts_of_parts_of_groups(count: int, dtype: Any) -> None:
    """Any number of parts, each with pieces of some of the groups, are the whole's moments and sums."""
    rng = np.random.default_rng(count)
    x, dy = rng.normal(50, 1, (2, 2, 6, 5, count)).astype(dtype)
    labels, axes = np.array([0, 1, 1, 2, 0, 3]), parts.Axes((0,), 1)
    pieces = [np.sort(rng.permutation(6)[: rng.integers(1, 7)]) for _ in range(count)]
    where = np.array([np.isin(range(6), piece) for piece in pieces]).T[:, None]  # (C, 1, count)
    m = parts.merged([parts.Part.of(x[..., k][:, piece], labels[piece], axes) for k, piece in enumerate(pieces)])
    expected = oracle.forward(x, list(labels), where=np.broadcast_to(where, x.shape))
    total = m.total(np.arange(4))
    np.testing.assert_array_equal(total.count, expected.count)
    np.testing.assert_allclose(total.mean, expected.mean.astype(float), rtol=1e-14)
    np.testing.assert_allclose(total.m2, np.where(expected.count, expected.m2.astype(float), 0), rtol=1e-12)
    statistics = m.statistics(1e-5, np.arange(4))
    sums = [
        parts.gradient_sums(dy[..., k][:, piece], x[..., k][:, piece], labels[piece], axes, statistics)[0]
        for k, piece in enumerate(pieces)
    ]
    terms = np.where(where, dy.astype(float), 0)
    wanted = np.stack([terms[:, labels == g].sum((1, 2, 3)) for g in range(4)], -1)
    np.testing.assert_allclose(parts.merged(sums).on(np.arange(4)).sum_wdy, wanted, rtol=1e-13)


def test_batch_statistics() -> None:
    """Shape (C,) for batch norm; samples merge into it."""
    x = np.random.default_rng(0).normal(size=(5, 3, 7))
    whole = cugn.moments(x, 3, batch_axis=None)
    assert whole.mean.shape == (3,)
    m = merged([cugn.moments(sample, 3, channel_axis=0, batch_axis=None) for sample in x])
    np.testing.assert_allclose(m.var, x.var(axis=(0, 2)), rtol=1e-14)
    np.testing.assert_allclose(whole.rstd(1e-3), 1 / np.sqrt(x.var(axis=(0, 2)) + 1e-3), rtol=1e-14)
    np.testing.assert_allclose(cugn.normalize(x, whole.mean, whole.rstd(), 3), cugn.batch_norm(x), rtol=0, atol=1e-14)


def test_dtypes_and_values() -> None:
    """int64, float64, float64; var with ddof 0; rstd's default is group_norm's eps."""
    x = np.random.default_rng(0).normal(size=(2, 4, 9)).astype(np.float32)
    m = cugn.moments(x, 2)
    assert [v.dtype for v in m] == [np.int64, np.float64, np.float64]
    assert m.count.tolist() == [[18, 18], [18, 18]]
    np.testing.assert_allclose(m.var, x.astype(float).reshape(2, 2, 18).var(axis=2), rtol=1e-12)
    np.testing.assert_allclose(m.rstd(), cugn.group_norm_forward(x, 2).rstd, rtol=1e-13)


def test_a_tuple_of_values() -> None:
    """Unpacks, copies and pickles as a named tuple."""
    m = cugn.moments(np.arange(12.0).reshape(1, 4, 3), 2)
    count, mean, m2 = m
    assert m._fields == ("count", "mean", "m2")
    assert (count, mean, m2) == (m[0], m[1], m[2])
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert isinstance(other, Moments)
        np.testing.assert_array_equal(other.m2, m2)


def test_merge_changes_neither() -> None:
    """Both sides stay as they are."""
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 9))
    a, b = (cugn.moments(v, 2) for v in x)
    before = [v.copy() for v in (*a, *b)]
    a.merge(b)
    for value, wanted in zip((*a, *b), before, strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_sums_of_the_backward_merge() -> None:
    """BackwardSums add up, and refuse others and other shapes."""
    dy, x = np.random.default_rng(0).normal(size=(2, 2, 4, 9))
    sums = cugn.backward_sums(dy, x, np.zeros(2), np.ones(2), 2)
    assert isinstance(sums, cugn.BackwardSums)
    for value, one in zip(sums.merge(sums), sums, strict=True):
        np.testing.assert_array_equal(value, 2 * one)
    with pytest.raises(TypeError, match=r"\bother\b.*tuple.*BackwardSums"):
        sums.merge(tuple(sums))
    with pytest.raises(ValueError, match=r"\bother\b.*shapes"):
        sums.merge(cugn.backward_sums(dy, x, np.zeros(1), np.ones(1), 1))
