"""What is said of group normalization, each statement as a test; the gallery of the docs shows each as a figure."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest
from libraries import LIBRARIES, Library, threads

import cugn
from cugn.diagnostics import diagnose, suggest_groups

EPS32 = np.finfo(np.float32).eps


def images(samples=4, channels=6, positions=(9, 11), seed=0):
    return np.random.default_rng(seed).normal(size=(samples, channels, *positions))


class Engine:
    """The functions of cugn on NumPy arrays, computed in an array library: there, through an engine, and back."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(cugn, name)

        def there(value: Any) -> Any:  # labels stay as they are
            return self.library.array(value) if isinstance(value, np.ndarray) and value.dtype.kind != "i" else value

        def call(*args: Any, **options: Any) -> Any:
            result = function(*map(there, args), **{key: there(value) for key, value in options.items()})
            if isinstance(result, tuple):
                return type(result)(*map(self.library.numpy, result))
            return self.library.numpy(result)

        return call


@pytest.fixture(params=["numpy", pytest.param("cuda", marks=cuda_on_cpu.NEEDED)])
def engine(request):
    """The engine of NumPy's arrays; and the CUDA engine, its kernels on the emulator."""
    if request.param == "numpy":
        yield Engine(LIBRARIES["numpy"]())
    else:
        with cuda_on_cpu.emulated() as library:
            yield Engine(library)


# 1. The statistics of a small batch are noisy: their squared error falls as 1/m with the number of values m.

BATCHES = (1, 2, 4, 8, 16, 32, 64)
POSITIONS = 16
DRAWS = 600


@pytest.fixture(scope="module", name="squared_errors")
def squared_errors_fixture():
    return squared_errors()


def squared_errors():
    """Mean squared errors of batch norm's mean and variance, and of group norm's, for each batch size."""
    rng = np.random.default_rng(1)
    errors = {"batch": [], "group": []}
    for batch in BATCHES:
        x = rng.normal(3, 2, (DRAWS, batch, 4, POSITIONS))  # mean 3, variance 4
        # A draw is a channel: batch norm over (samples, positions) of each.
        of_batch = cugn.batch_norm_forward(x.transpose(1, 0, 2, 3).reshape(batch, DRAWS * 4, POSITIONS), eps=0)
        of_group = cugn.group_norm_forward(x.reshape(DRAWS * batch, 4, POSITIONS), 1, eps=0)
        for name, (_, mean, rstd) in (("batch", of_batch), ("group", of_group)):
            errors[name].append((np.mean((mean - 3) ** 2), np.mean((rstd**-2 - 4) ** 2)))
    return {name: np.array(values).T for name, values in errors.items()}


def test_error_of_batch_norms_statistics_falls_as_one_over_m(squared_errors):
    values = np.array(BATCHES) * POSITIONS
    for error in squared_errors["batch"]:
        slope = np.polyfit(np.log(values), np.log(error), 1)[0]
        # 2400 channels a point: each mean square is known to sqrt(2/2400) = 3 %, the slope over a factor 64 to 1 %.
        assert slope == pytest.approx(-1, abs=0.05)
    mean_error, var_error = squared_errors["batch"]
    np.testing.assert_allclose(mean_error, 4 / values, rtol=0.15)  # sigma^2 / m; 5 times that 3 %
    # 2 sigma^4 / m (1 - 1/(2m)) for normal values; the square of a nearly normal error, known to about 5 %.
    np.testing.assert_allclose(var_error, 2 * 16 / values * (1 - 1 / (2 * values)), rtol=0.25)


def test_error_of_group_norms_statistics_does_not_move_with_the_batch(squared_errors):
    for error, expected in zip(squared_errors["group"], (4 / 64, 2 * 16 / 64 * (1 - 1 / 128)), strict=True):
        # 600 draws or more: known to sqrt(2/600) = 6 % (mean) and about 10 % (variance).
        np.testing.assert_allclose(error, expected, rtol=0.3)


def test_moments_count_the_values():
    x = images()
    assert np.all(cugn.moments(x, 3).count == 2 * 99)
    assert np.all(cugn.moments(x, 6, batch_axis=None, channel_axis=1).count == 4 * 99)


# 2. That noise degrades training: the accuracy of batch norm falls at a small batch, that of group norm does not.


def test_group_norm_trains_alike_at_small_and_large_batches_and_batch_norm_does_not():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    import train_digits

    accuracies = train_digits.experiment(("group", "batch"), (2, 32), seeds=2, epochs=3)
    percent = {key: 100 * values for key, values in accuracies.items()}
    # Accuracy at 2 less that at 32, of single seeds: 1.6 +- 0.8 points (group), -6.8 +- 1.3 (batch).
    assert abs(percent["group", 2].mean() - percent["group", 32].mean()) < 4
    assert percent["batch", 2].mean() < percent["batch", 32].mean() - 3
    assert percent["group", 2].min() > 92  # all of them learn
    assert percent["batch", 32].min() > 80


# 3. A sample is normalized by itself: a batch of 1 or of 100 makes no difference.


@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("groups", [4, [0, 1, 1, 0, 2, 2, 2, 0]], ids=["equal", "labels"])
def test_a_sample_of_a_batch_of_100_and_alone_has_the_same_bits(engine, layout, dtype, groups):
    x = (images(100, 8, (7, 9)) * 3 + 5).astype(dtype)
    dy = images(100, 8, (7, 9), seed=1).astype(dtype)
    axes = {}
    if layout == "channels last":
        x, dy = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (x, dy))
        axes = {"channel_axis": -1}
    elif layout == "strided":
        x, dy = (np.repeat(a, 2, axis=3)[:, :, ::-1, ::2] for a in (x, dy))
    y, dx = engine.group_norm(x, groups, **axes), engine.group_norm_backward(dy, x, groups, **axes).dx
    for n in (0, 1, 42, 99):
        alone = engine.group_norm(x[n : n + 1], groups, **axes)
        assert y[n : n + 1].tobytes() == alone.tobytes()
        dx_alone = engine.group_norm_backward(dy[n : n + 1], x[n : n + 1], groups, **axes).dx
        assert dx[n : n + 1].tobytes() == dx_alone.tobytes()


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_the_number_of_threads_makes_no_difference(channel_axis):
    x = images(32, 16, (40, 40)).astype(np.float32)
    if channel_axis == -1:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    dy = x[::-1].copy()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            y = cugn.group_norm(x, 4, channel_axis=channel_axis)
            results.append([y, *cugn.group_norm_backward(dy, x, 4, channel_axis=channel_axis)])
    for one, *many in zip(*results, strict=True):
        assert all(other.tobytes() == one.tobytes() for other in many)
    assert cugn.group_norm(x[5:6], 4, channel_axis=channel_axis).tobytes() == results[0][0][5:6].tobytes()


# 4. One group is layer norm, a group for each channel is instance norm: the squared difference is exactly zero.


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda t: t.__name__)
def test_layer_and_instance_norm_are_group_norm_with_1_and_c_groups(engine, dtype):
    x = (images() * 4 + 1).astype(dtype)
    weight, bias = (np.random.default_rng(2).normal(size=(2, 6))).astype(dtype)
    dy = images(seed=3).astype(dtype)
    for norm, backward, groups in (
        (engine.layer_norm, engine.layer_norm_backward, 1),
        (engine.instance_norm, engine.instance_norm_backward, 6),
    ):
        difference = engine.group_norm(x, groups, weight, bias).astype(float) - norm(x, weight, bias).astype(float)
        assert (difference**2).sum() == 0.0
        for ours, grouped in zip(
            backward(dy, x, weight, bias), engine.group_norm_backward(dy, x, groups, weight, bias), strict=True
        ):
            assert ((ours.astype(float) - grouped.astype(float)) ** 2).sum() == 0.0


def test_layer_and_instance_norm_are_the_textbooks(engine):
    """Against the formulas in extended precision, each written by itself."""
    x = images()
    exact = x.astype(np.longdouble)
    for ours, axes in (
        (engine.layer_norm(x), (1, 2, 3)),
        (engine.instance_norm(x), (2, 3)),
        (engine.batch_norm(x), (0, 2, 3)),
    ):
        textbook = (exact - exact.mean(axes, keepdims=True)) / np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
        np.testing.assert_allclose(ours, textbook.astype(float), rtol=0, atol=4 * np.finfo(float).eps * 5)  # |y| < 5


def test_layer_and_instance_norm_are_torchs():
    torch = pytest.importorskip("torch")
    x = images()
    weight, bias = np.random.default_rng(2).normal(size=(2, 6))
    t, tw, tb = (torch.from_numpy(a) for a in (x, weight, bias))
    pairs = (
        (cugn.layer_norm(x), torch.nn.functional.layer_norm(t, x.shape[1:])),
        (cugn.instance_norm(x, weight, bias), torch.nn.functional.instance_norm(t, weight=tw, bias=tb)),
        (cugn.group_norm(x, 3, weight, bias), torch.nn.functional.group_norm(t, 3, tw, tb)),
        (cugn.batch_norm(x, weight, bias), torch.nn.functional.batch_norm(t, None, None, tw, tb, training=True)),
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-13)  # |y| < 10, both in float64


# 5. In a group of a channel in -100..100 and one in -0.1..0.1 the large one dominates, the small one nearly vanishes.


@pytest.fixture(name="loud_and_quiet")
def loud_and_quiet_fixture():
    return loud_and_quiet()


def loud_and_quiet():
    rng = np.random.default_rng(5)
    return rng.uniform(-1, 1, (4, 4, 64, 64)) * np.array([100, 0.1, 100, 0.1]).reshape(4, 1, 1)


def test_a_quiet_channel_is_squashed_by_a_loud_one_in_its_group(engine, loud_and_quiet):
    mixed = engine.group_norm(loud_and_quiet, 2).std(axis=(2, 3))
    # sqrt(2) * 0.1 / 100; a standard deviation of 4096 uniform values is known to 0.7 %.
    np.testing.assert_allclose(mixed[:, 1::2], np.sqrt(2) * 1e-3, rtol=0.05)
    np.testing.assert_allclose(mixed[:, 0::2], np.sqrt(2), rtol=0.001)
    by_scale = engine.group_norm(loud_and_quiet, [0, 1, 0, 1], eps=0).std(axis=(2, 3))
    np.testing.assert_allclose(by_scale, 1, rtol=0.05)


def test_diagnostics_name_the_squashed_channel_and_propose_the_grouping_that_frees_it(loud_and_quiet):
    found = diagnose(loud_and_quiet, 2)
    assert [(s.channel, s.by) for s in found.squashed] == [(1, (0,)), (3, (2,))]
    assert all(set(s.by) <= {0, 2} for s in diagnose(loud_and_quiet, 1).squashed)
    labels = suggest_groups(loud_and_quiet, 2)
    assert labels.tolist() == [1, 0, 1, 0]
    assert not diagnose(loud_and_quiet, labels).squashed


# 6. The order of the channels matters to group norm unless the groups stay together; never to batch norm.

INSIDE = [1, 0, 2, 5, 3, 4]  # within (0, 1, 2) and (3, 4, 5)
WHOLE = [3, 4, 5, 0, 1, 2]
ACROSS = [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("order", [INSIDE, WHOLE])
def test_a_permutation_that_keeps_the_groups_permutes_the_result(engine, order):
    x = images()
    # The sums run in another order: rounding of float64 statistics, |y| < 5.
    np.testing.assert_allclose(
        engine.group_norm(np.take(x, order, axis=1), 2), engine.group_norm(x, 2)[:, order], rtol=0, atol=1e-14
    )


def test_a_permutation_across_groups_changes_the_result(engine):
    x = images() * np.arange(1, 7).reshape(6, 1, 1)
    assert np.abs(engine.group_norm(np.take(x, ACROSS, axis=1), 2) - engine.group_norm(x, 2)[:, ACROSS]).max() > 0.5


@pytest.mark.parametrize("order", [INSIDE, WHOLE, ACROSS])
def test_batch_norm_is_indifferent_to_the_order_of_channels(engine, order):
    x = images()
    assert engine.batch_norm(np.take(x, order, axis=1)).tobytes() == engine.batch_norm(x)[:, order].tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("order", [INSIDE, WHOLE, ACROSS])
def test_permuting_the_labels_along_gives_the_same_bits(engine, order, dtype):
    x, dy, labels = images().astype(dtype), images(seed=1).astype(dtype), np.array([0, 0, 0, 1, 1, 1])
    y, dx = engine.group_norm(x, labels), engine.group_norm_backward(dy, x, labels).dx
    assert engine.group_norm(np.take(x, order, axis=1), labels[order]).tobytes() == y[:, order].tobytes()
    assert (
        engine.group_norm_backward(np.take(dy, order, axis=1), np.take(x, order, axis=1), labels[order]).dx.tobytes()
        == dx[:, order].tobytes()
    )


# 7. The gradient is scaled by 1/sqrt(v + eps) of the group's own variance v, not of the batch.


def test_the_gradient_follows_the_variance_of_the_group_at_both_ends(engine):
    dy, z = images(1, seed=7), images(1, seed=8)
    z = engine.group_norm(z, 1, eps=0)  # variance 1
    variances = 10.0 ** np.arange(-14, 11, 2)
    norms = np.array([np.linalg.norm(engine.group_norm_backward(dy, np.sqrt(v) * z, 1).dx) for v in variances])
    centred = dy - dy.mean()
    parallel = (dy * z).mean() * z
    # dx = (dy - mean - x_hat * mean(dy x_hat)) / sqrt(v + eps), and x_hat = z sqrt(v / (v + eps)).
    across, along = np.linalg.norm(centred - parallel), np.linalg.norm(parallel)
    eps = 1e-5
    expected = np.hypot(across, along * eps / (variances + eps)) / np.sqrt(variances + eps)
    np.testing.assert_allclose(norms, expected, rtol=1e-12)
    assert norms[0] == pytest.approx(np.linalg.norm(centred) / np.sqrt(eps), rel=1e-6)  # finite and not zero at v = 0
    slope = np.polyfit(np.log(variances[-4:]), np.log(norms[-4:]), 1)[0]
    assert slope == pytest.approx(-0.5, abs=1e-6)  # damped at large v; v/eps > 1e9 there


def test_the_gradient_of_a_constant_group_is_finite_and_not_zero(engine):
    dy = images(1, seed=7)
    dx = engine.group_norm_backward(dy, np.full_like(dy, 3.0), 1).dx
    np.testing.assert_allclose(dx, (dy - dy.mean()) / np.sqrt(1e-5), rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_sample_does_not_depend_on_the_batch(engine):
    x, dy = images(8), images(8, seed=1)
    other = x.copy()
    other[1:] *= 1e6
    ours = engine.group_norm_backward(dy, x, 2).dx[0]
    assert engine.group_norm_backward(dy, other, 2).dx[0].tobytes() == ours.tobytes()
    batch = engine.batch_norm_backward(dy, x).dx[0], engine.batch_norm_backward(dy, other).dx[0]
    assert np.linalg.norm(batch[1]) < 1e-4 * np.linalg.norm(batch[0])  # batch norm: damped by the others' 1e6


# 8. Each image's own contrast is divided out exactly; batch norm's average fits no single image.

CONTRASTS = np.array([0.01, 0.2, 1.0, 3.0, 250.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda t: t.__name__)
def test_group_norm_divides_the_contrast_of_each_image_out(engine, dtype):
    x = images(5).astype(dtype)
    scaled = (CONTRASTS.reshape(5, 1, 1, 1) * x).astype(dtype)
    # x is rounded to dtype once more by the multiplication, by half an ulp of |x| < 5 sigma; and two roundings of y.
    np.testing.assert_allclose(
        engine.group_norm(scaled, 3, eps=0), engine.group_norm(x, 3, eps=0), rtol=0, atol=3 * 5 * np.finfo(dtype).eps
    )
    power_of_two = engine.group_norm(x * dtype(2.0**20), 3, eps=0)
    assert power_of_two.tobytes() == engine.group_norm(x, 3, eps=0).tobytes()


def test_batch_norm_leaves_the_spread_of_the_contrasts_behind(engine):
    x = images(5, positions=(64, 64))
    y = engine.batch_norm(CONTRASTS.reshape(5, 1, 1, 1) * x, eps=0)
    left = y.std(axis=(1, 2, 3))  # the contrast of each image after normalization
    # A standard deviation of 6 * 4096 values is known to 0.5 %.
    assert left.std() / left.mean() == pytest.approx(CONTRASTS.std() / CONTRASTS.mean(), rel=0.02)
    z = engine.group_norm(CONTRASTS.reshape(5, 1, 1, 1) * x, 3, eps=0).std(axis=(1, 2, 3))
    assert z.std() / z.mean() < 1e-6


# 9. What it is used for: volumes with a background, samples with a gain of their own, texture without contrast.


def test_the_background_of_a_masked_volume_has_no_part_in_the_statistics(engine):
    rng = np.random.default_rng(9)
    volume = rng.normal(40, 5, (1, 2, 12, 16, 16))
    inside = np.linalg.norm(np.mgrid[-1:1:12j, -1:1:16j, -1:1:16j], axis=0) < 0.8
    y = engine.group_norm(np.where(inside, volume, 0.0), 1, where=inside)
    kept = y[0][:, inside]
    assert abs(kept.mean()) < 1e-12
    assert kept.std() == pytest.approx(1, abs=1e-6)  # eps = 1e-5 against a variance of 25
    anything = np.where(inside, volume, 1e6)
    assert engine.group_norm(anything, 1, where=inside)[0][:, inside].tobytes() == kept.tobytes()
    assert engine.group_norm(np.where(inside, volume, 0.0), 1)[0][:, inside].mean() > 0.5  # without the mask


def test_tiles_of_a_volume_normalized_with_its_merged_moments_fit_together():
    volume = np.random.default_rng(10).normal(40, 5, (1, 4, 8, 20, 20))
    tiles = np.split(volume, 4, axis=2)
    whole = cugn.moments(tiles[0], 2)
    for tile in tiles[1:]:
        whole = whole.merge(cugn.moments(tile, 2))
    assembled = np.concatenate([cugn.normalize(tile, whole.mean, whole.rstd(1e-5), 2) for tile in tiles], axis=2)
    np.testing.assert_allclose(assembled, cugn.group_norm(volume, 2), rtol=0, atol=1e-13)


def test_a_gain_of_its_own_for_each_row_of_a_table_is_divided_out(engine):
    rng = np.random.default_rng(11)
    table, programs = rng.lognormal(size=(50, 30)), rng.permutation(np.arange(30) % 3)
    gains = rng.lognormal(0, 1, (50, 1))
    y = engine.group_norm(gains * table, programs, eps=0)
    np.testing.assert_allclose(y, engine.group_norm(table, programs, eps=0), rtol=0, atol=1e-13)
    for g in range(3):
        np.testing.assert_allclose(y[:, programs == g].std(axis=1), 1, rtol=1e-12)


def test_texture_statistics_of_instance_norm_do_not_see_contrast_and_brightness(engine):
    rng = np.random.default_rng(12)
    texture = rng.normal(size=(1, 3, 32, 32)).cumsum(axis=3)
    photographed = 0.2 * texture + np.array([5.0, -3.0, 70.0]).reshape(3, 1, 1)

    def correlations(x):
        y = engine.instance_norm(x, eps=0)[0].reshape(3, -1)
        return y @ y.T / y.shape[1]

    np.testing.assert_allclose(correlations(photographed), correlations(texture), rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.diag(correlations(texture)), 1, rtol=1e-12)
