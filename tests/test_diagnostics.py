"""`cugn.diagnostics` tells what a grouping does to each channel, and finds the grouping by scale that does least."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

import cugn
from cugn.diagnostics import diagnose, suggest_groups

SCALES = np.array([100, 0.1, 30, 0.2, 80, 0.05])


def images(scales=SCALES, samples=3, positions=(16, 20), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, len(scales), *positions)) * scales.reshape(-1, *[1] * len(positions))


@pytest.mark.parametrize("groups", [1, 2, 3, 6, [0, 1, 0, 1, 0, 1], [2, 0, 0, 1, 2, 2]])
def test_std_after_is_that_of_the_normalized_channels(groups):
    x = images() + np.arange(6.0).reshape(6, 1, 1) * 5
    found = diagnose(x, groups)
    y = cugn.group_norm(x, groups)
    # Both are float64 formulas of the same quantity: rounding only.
    np.testing.assert_allclose(found.std_after, np.sqrt(y.var(axis=(2, 3)).mean(axis=0)), rtol=1e-10)
    np.testing.assert_allclose(found.std_before, np.sqrt(x.var(axis=(2, 3)).mean(axis=0)), rtol=1e-10)
    for g in range(len(found.values)):
        assert found.share[found.labels == g].sum() == pytest.approx(1, rel=1e-12)


def test_share_is_the_part_of_the_groups_sum_of_squares():
    x = images(samples=1) + np.arange(6.0).reshape(6, 1, 1) * 20
    squares = ((x - x.mean()) ** 2).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(diagnose(x, 1).share, squares / squares.sum(), rtol=1e-10)


def test_squashed_channels_are_named_with_those_that_squash_them():
    found = diagnose(images(), [0, 0, 1, 1, 2, 2])
    assert [(s.channel, s.by) for s in found.squashed] == [(1, (0,)), (3, (2,)), (5, (4,))]
    # 0.1 against sqrt((100^2 + 0.1^2) / 2); a standard deviation of 320 values is known to 4 %.
    assert found.squashed[0].std == pytest.approx(0.1 / 100 * np.sqrt(2), rel=0.2)
    # In one group, channel 0 alone holds 100^2 of 100^2 + 80^2 + 30^2, more than half.
    assert {s.by for s in diagnose(images(), 1).squashed} == {(0,)}
    equal = images(np.array([1, 1, 1, 0.01]))
    assert [len(s.by) for s in diagnose(equal, 1).squashed] == [2]  # of three alike, two hold half


def test_a_distance_between_means_squashes_too():
    x = images(np.ones(2)) + np.array([0, 1000]).reshape(2, 1, 1)
    assert [(s.channel, s.by) for s in diagnose(x, 1).squashed] == [(0, (1,)), (1, (0,))]


def test_a_channel_alone_or_constant_is_not_called_squashed():
    x = images()
    assert not diagnose(x * 1e-4, 6).squashed  # small against eps, but not through another channel
    x[:, 1] = 3.0  # constant: there is nothing to lose
    assert 1 not in [s.channel for s in diagnose(x, 1).squashed]


def test_values_and_errors_match_repeated_draws():
    """The errors that are told, for independent normal values, are those of the group's statistics over 4000 draws."""
    scales = np.array([1.0, 1.0, 3.0, 0.1])
    x = images(scales, samples=4000, positions=(32,))
    found = diagnose(x, 1)
    mean, var = x.mean(axis=(1, 2)), x.var(axis=(1, 2))
    assert found.values == 128
    # The square of a variance sampled from 32 values is larger than the true one's by the factor 1 + 2/32; it enters
    # numerator and denominator for the channel that outweighs the others, so 2/32 bounds the bias; noise is below it.
    expected = 32 * (scales**2).sum() ** 2 / (scales**4).sum()
    assert found.effective_values[0] == pytest.approx(expected, rel=2 / 32)
    # The spread of 4000 draws is known to 1/sqrt(8000) = 1.1 %, 4 sigma are 4.5 %; plus half of that bias.
    assert found.mean_error[0] == pytest.approx(mean.std() / np.sqrt(var.mean()), rel=0.045)
    assert found.var_error[0] == pytest.approx(var.std() / var.mean(), rel=0.045 + 1 / 32)


def test_batch_norms_errors_match_repeated_batches_of_unlike_samples():
    rng = np.random.default_rng(1)
    contrast, brightness = rng.uniform(0.5, 2, (4000, 1, 1)), rng.normal(size=(4000, 1, 1))
    x = contrast * rng.normal(size=(4000, 2, 64)) + brightness
    found = diagnose(x, 1, batch=8)
    batches = x.reshape(500, 8, 2, 64)
    mean, var = batches.mean(axis=(1, 3)), batches.var(axis=(1, 3))
    whole = x.var(axis=(0, 2))
    # 500 batches: the spread is known to 1/sqrt(1000) = 3.2 % for normal values; 4 sigma = 13 %.
    np.testing.assert_allclose(found.batch_mean_error, mean.std(axis=0) / np.sqrt(whole), rtol=0.13)
    # A batch's variance is taken about its own mean, which takes 1/8 of the brightness's part away.
    np.testing.assert_allclose(found.batch_var_error, var.std(axis=0) / whole, rtol=0.13 + 1 / 8)
    np.testing.assert_array_equal(found.batch_values, 8 * 64)
    assert np.all(found.batch_effective_values < 25)  # 512 values, but only 8 brightnesses


def test_one_sample_tells_nothing_of_batch_norm():
    found = diagnose(images(samples=1), 2, batch=4)
    assert found.batch == 4
    assert np.isnan(found.batch_mean_error).all()
    assert "batch norm" not in repr(found)


def test_a_table_without_positions_takes_the_spread_over_the_samples():
    x = np.random.default_rng(2).normal(size=(500, 4)) * np.array([1, 100, 1, 100])
    found = diagnose(x, 1)
    np.testing.assert_allclose(found.std_before, x.std(axis=0), rtol=1e-10)
    assert [s.channel for s in found.squashed] == [0, 2]
    assert not diagnose(x, [0, 1, 0, 1]).squashed
    # Two of four channels carry the variance: 2 effective values, to the 1/sqrt(2*500) = 3 % of sampled variances.
    assert found.effective_values[0] == pytest.approx(2, rel=0.1)


def test_axes_are_those_of_group_norm():
    x = images(samples=2, positions=(8, 4))
    expected = diagnose(x, 2).std_after
    np.testing.assert_allclose(diagnose(x.transpose(0, 2, 3, 1), 2, channel_axis=-1).std_after, expected, rtol=1e-12)
    split = x.reshape(2, 1, 6, 8, 4).transpose(2, 0, 3, 4, 1)
    np.testing.assert_allclose(diagnose(split, 2, channel_axis=0, batch_axis=(1, -1)).std_after, expected, rtol=1e-12)
    single = diagnose(x[0], 2, channel_axis=0, batch_axis=None)
    np.testing.assert_allclose(single.std_after, diagnose(x[:1], 2).std_after, rtol=1e-12)


def test_mask_is_that_of_group_norm():
    where = np.random.default_rng(3).random((3, 1, 16, 20)) < 0.5
    x = np.where(where, images(), 1e9)  # outside the mask: anything
    y = cugn.group_norm(x, 2, where=where)
    inside = np.broadcast_to(where, x.shape)
    std = np.sqrt(np.mean([[y[n, c][inside[n, c]].var() for c in range(6)] for n in range(3)], axis=0))
    np.testing.assert_allclose(diagnose(x, 2, where=where).std_after, std, rtol=1e-9)
    assert suggest_groups(x, 2, where=where).tolist() == [1, 0, 1, 0, 1, 0]


def test_a_sample_without_values_is_left_out():
    x, where = images(), np.ones((3, 1, 16, 20), dtype=bool)
    where[1] = False
    np.testing.assert_allclose(diagnose(x, 2, where=where).std_after, diagnose(x[[0, 2]], 2).std_after, rtol=1e-12)


@pytest.mark.parametrize("library", ["dask.array", "array_api_strict", "torch"])
def test_other_libraries_give_the_same(library):
    xp = pytest.importorskip(library)
    x = images()
    other = xp.from_array(x, chunks=(1, 6, 8, 20)) if library == "dask.array" else xp.asarray(x)
    np.testing.assert_allclose(diagnose(other, 2).std_after, diagnose(x, 2).std_after, rtol=1e-10)
    assert suggest_groups(other, 2).tolist() == suggest_groups(x, 2).tolist()


def test_the_suggestion_frees_every_channel():
    x = images()
    labels = suggest_groups(x, 2)
    assert labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert diagnose(x, 3).squashed
    assert not diagnose(x, labels).squashed
    # Least: 0.05 in a group with 0.1 and 0.2, 0.05 / sqrt(mean of squares) = 0.38; and 30 with 80 and 100, 0.40.
    assert cugn.group_norm(x, labels).std(axis=(2, 3)).min() > 0.3


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 7])
def test_the_suggestion_is_the_best_of_all_partitions(num_groups):
    """No other partition gives a larger geometric mean of the standard deviations after normalization."""
    rng = np.random.default_rng(num_groups)
    x = rng.normal(size=(1, 7, 50)) * 10 ** rng.uniform(-1.5, 1.5, (7, 1))
    x -= x.mean(axis=2, keepdims=True)  # the criterion leaves the distances of the means out
    variance = x.var(axis=(0, 2))

    def log_std_after(labels):
        labels = np.array(labels)
        return sum(np.log(variance[c] / variance[labels == labels[c]].mean()) / 2 for c in range(7))

    partitions = [p for p in itertools.product(range(num_groups), repeat=7) if len(set(p)) == num_groups]
    best = max(map(log_std_after, partitions))
    found = suggest_groups(x, num_groups)
    assert log_std_after(found) == pytest.approx(best, abs=1e-9)
    assert np.log(diagnose(x, found, eps=0).std_after).sum() == pytest.approx(best, abs=1e-9)


def test_the_suggestion_survives_constant_equal_tiny_and_infinite_channels():
    assert set(suggest_groups(np.zeros((2, 5, 9)), 3).tolist()) == {0, 1, 2}
    x = images()
    x[:, 0], x[:, 2] = 7.0, np.inf
    labels = suggest_groups(x, 2)
    assert labels.tolist() == [0, 0, 1, 0, 1, 0]
    assert suggest_groups(x * 1e-140, 2).tolist() == labels.tolist()


def test_repr_names_groups_errors_and_squashed_channels():
    text = repr(diagnose(images(), 3, batch=2))
    assert text.startswith("6 channels in 3 groups")
    assert "batch norm, batch of 2: 640 values a channel" in text
    assert "channel 1 is squashed to std 0.0014 by channel 0" in text
    assert "no channel is squashed" in repr(diagnose(images(), 6))
    many = repr(diagnose(np.random.default_rng(0).normal(size=(2, 64, 5)), 64)).splitlines()
    assert len(many) == 20  # 16 rows for the groups
    assert max(map(len, many)) <= 120
    assert "  ..." in many


def test_plot_draws_every_channel_and_marks_the_squashed_ones():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ax = diagnose(images(), 3).plot()
    lines = {line.get_label(): line for line in ax.lines}
    assert len(lines["before"].get_xdata()) == 6
    assert lines["after: squashed"].get_xdata().tolist() == [1, 3, 5]
    assert ax.get_yscale() == "log"
    other = plt.figure().subplots()
    assert diagnose(images(), 6).plot(other) is other
    plt.close("all")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: diagnose(x, 4), ValueError, "groups is 4: it must divide the 6 channels"),
        (lambda x: diagnose(x, 2, batch=0), ValueError, "batch is 0"),
        (lambda x: diagnose(x, 2, threshold=0), ValueError, "threshold is 0"),
        (lambda x: diagnose(x, 2, eps=-1), ValueError, "eps is -1"),
        (lambda x: diagnose(x, 2, channel_axis=7), ValueError, "channel_axis is 7"),
        (lambda x: diagnose(x.tolist(), 2), TypeError, "x is of type list"),
        (lambda x: suggest_groups(x, 0), ValueError, "num_groups is 0"),
        (lambda x: suggest_groups(x, 7), ValueError, "num_groups is 7: it must be from 1 to the 6 channels"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(images())


def test_matplotlib_is_not_needed_until_plot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = diagnose(images(), 3)
    assert "squashed" in repr(found)
    with pytest.raises(ImportError):
        found.plot()
