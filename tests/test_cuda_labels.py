"""Label groups of tables on the GPU, cells x genes: a block of threads has whole samples, if they fit.

Promises: the accuracy of any other call; the same bits whatever the order of a group's channels and the batch around a
sample; and what does not fit in a block is put together from its channels, with the same result to that accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import simt
from covering import pairwise
from cuda_on_cpu import EMULATOR_NEEDED, NEEDED, emulated
from libraries import FLOATS, Library, dtype_of
from test_accuracy import check_gradients, check_y
from test_cuda_values import check_call, check_statistics, random

import cugn

pytestmark = NEEDED


def consecutive(labels: Any) -> np.ndarray:
    """The same groups, numbered from 0."""
    return np.unique(labels, return_inverse=True)[1]


# N, C and labels: groups of one element and of two, unequal ones that lie apart, one group of all, many small ones,
# samples that begin anywhere, and more channels than a block has threads.
TABLES: dict[str, tuple[int, int, np.ndarray]] = {
    "unequal": (5, 24, consecutive(np.arange(24) ** 2 % 7)),
    "small": (7, 9, np.array([2, 0, 1, 2, 3, 3, 2, 2, 2])),
    "one group": (3, 40, np.zeros(40, int)),
    "many": (33, 100, np.arange(100) * 7 % 50),
    "odd": (4, 61, np.arange(61) * 5 % 4),
    "long": (2, 1500, consecutive(np.arange(1500) % 11 * (np.arange(1500) % 3))),
}
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")


@pytest.mark.parametrize(("name", "dtype", "masked"), pairwise(list(TABLES), FLOATS, (False, True)), ids=str)
def test_tables(name: str, dtype: str, masked: bool, checked: Library) -> None:
    """Forward and backward against the oracle, with statistics given and without."""
    N, C, labels = TABLES[name]
    options: dict[str, Any] = {}
    if masked:
        options["where"] = np.random.default_rng(1).random((N, C)) < 0.7
        for group in np.unique(labels):  # each has something to be taken from
            options["where"][:, np.flatnonzero(labels == group)[:1]] = True
    check_call(checked, random((N, C), dtype), labels.tolist(), False, **options)


@pytest.mark.parametrize(("dtype", "activation", "masked"), pairwise(FLOATS, ACTIVATIONS, (False, True)), ids=str)
def test_options(dtype: str, activation: str | None, masked: bool, checked: Library) -> None:
    """An activation and a mask beside labels; the jvp is the adjoint of the backward, to the bounds of both."""
    N, C, labels = TABLES["unequal"]
    x, dy, weight, bias = random((N, C), dtype, seed=3)
    options: dict[str, Any] = {"activation": activation}
    device = dict(options)
    if masked:
        options["where"] = np.random.default_rng(0).random((N, C)) < 0.8
        device["where"] = checked.array(options["where"])
    X, DY, W, B = (checked.array(v) for v in (x, dy, weight, bias))
    groups = labels.tolist()
    expected = oracle.forward(x, groups, weight, bias, **options)
    expected = expected._replace(scale=1.13 * expected.scale)  # the largest slope of an activation
    check_y(checked.numpy(cugn.group_norm(X, groups, W, B, **device)), expected, dtype, str(options))
    found = cugn.GroupNormGrads(*map(checked.numpy, cugn.group_norm_backward(DY, X, groups, W, B, **device)))
    gradients = oracle.backward(dy, x, groups, weight, bias, **options)
    gradients = gradients._replace(group_max=gradients.terms)
    check_gradients(found, gradients, dtype, str(options))
    ty = checked.numpy(cugn.group_norm_jvp(DY, X, groups, W, B, **device)).astype(np.float64)
    dx = checked.numpy(cugn.group_norm_backward(X, X, groups, W, B, **device).dx).astype(np.float64)
    one, other = (ty * x.astype(np.float64)).sum(), (dx * dy.astype(np.float64)).sum()
    e = oracle.epsilon(dtype_of(dtype))
    size = np.abs(ty * x.astype(np.float64)).sum() + np.abs(dx * dy.astype(np.float64)).sum()
    assert abs(one - other) <= 64 * e * size


@pytest.mark.parametrize("dtype", FLOATS)
def test_order_of_channels_and_batch(dtype: str, fast: Library) -> None:
    """No bit depends on them: of y, the statistics, dx and the tangent; dweight and dbias go with their channels."""
    N, C, labels = TABLES["many"]
    x, dy, weight, bias = random((N, C), dtype)
    x = (x.astype(np.float64) * np.exp(2 * np.random.default_rng(2).normal(size=C))).astype(x.dtype)

    def results(of: np.ndarray, samples: slice) -> list[np.ndarray]:
        X, DY = (fast.array(np.ascontiguousarray(a[samples][:, of])) for a in (x, dy))
        W, B = (fast.array(a[of]) for a in (weight, bias))
        groups = labels[of].tolist()
        y, mean, rstd = cugn.group_norm_forward(X, groups, W, B)
        back = np.argsort(of)
        gradients = cugn.group_norm_backward(DY, X, groups, W, B)
        tangent = cugn.group_norm_jvp(DY, X, groups, W, B)
        of_elements = [fast.numpy(a)[:, back] for a in (y, gradients.dx, tangent)]
        of_channels = [fast.numpy(a)[back] for a in gradients[1:]] if samples == slice(None) else []
        return [
            np.ascontiguousarray(a).view(np.uint8)
            for a in (*of_elements, fast.numpy(mean), fast.numpy(rstd), *of_channels)
        ]

    expected = results(np.arange(C), slice(None))
    for seed in range(3):
        of = np.random.default_rng(seed).permutation(C)
        for one, other in zip(results(of, slice(None)), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    for samples in (slice(3, 4), slice(1, 20)):
        for one, other in zip(results(np.arange(C), samples), expected, strict=False):
            np.testing.assert_array_equal(one, other[samples])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_far_from_zero(dtype: str, offset: float, fast: Library) -> None:
    """A mean of many standard deviations costs no accuracy; nor does float64 of the weights get lost in float32's."""
    N, C, labels = TABLES["unequal"]
    rng = np.random.default_rng(0)
    if dtype == "float16":
        offset = min(offset, 1e3)
    x = (offset + rng.normal(0, 3, (N, C))).astype(dtype_of(dtype))
    dy = rng.normal(size=(N, C)).astype(dtype_of(dtype))
    for parameters in {dtype, "float64"}:
        weight, bias = (rng.normal(size=C).astype(dtype_of(parameters)) for _ in range(2))
        X, DY, W, B = (fast.array(v) for v in (x, dy, weight, bias))
        expected = oracle.forward(x, labels.tolist(), weight, bias)
        y, mean, rstd = cugn.group_norm_forward(X, labels.tolist(), W, B)
        check_y(fast.numpy(y), expected, dtype, f"mean {offset}")
        check_statistics(fast.numpy(mean), fast.numpy(rstd), expected, dtype)
        found = cugn.group_norm_backward(DY, X, labels.tolist(), W, B)
        gradients = oracle.backward(dy, x, labels.tolist(), weight, bias)
        gradients = gradients._replace(group_max=gradients.terms)
        found = cugn.GroupNormGrads(*map(fast.numpy, found))
        if parameters == dtype:
            check_gradients(found, gradients, dtype, f"mean {offset}")
        else:
            for name in ("dweight", "dbias"):
                error = np.abs(getattr(found, name) - getattr(gradients, name))
                assert (error <= 16 * 2.0**-52 * getattr(gradients, f"{name}_terms")).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_of_the_range(dtype: str, fast: Library) -> None:
    """The largest and the smallest numbers, in groups of their own."""
    labels = np.arange(40) % 4
    info = np.finfo(dtype)
    size = np.array([float(info.max) / 8, float(info.tiny) / 4, 1.0, float(info.max) ** 0.5])[labels]
    _, _, weight, bias = random((3, 40), dtype)
    x = (np.random.default_rng(0).uniform(-1, 1, (3, 40)) * size).astype(dtype)
    X, W, B = (fast.array(v) for v in (x, weight, bias))
    for eps in (0.0, 1e-5):
        expected = oracle.forward(x, labels.tolist(), weight, bias, eps=eps)
        # the emulator flushes float64's subnormals together with float32's; the device leaves them
        with simt.using(flush_subnormals=False if dtype == "float64" else None):
            y = cugn.group_norm(X, labels.tolist(), W, B, eps=eps)
        check_y(fast.numpy(y), expected, dtype, f"{eps=}")


def test_one_nan_spoils_its_own_group(checked: Library) -> None:
    """And nothing else, in y and in dx."""
    N, C, labels = TABLES["unequal"]
    x, dy, weight, bias = random((N, C), "float32")
    for bad in (np.nan, np.inf):
        dirty = x.copy()
        dirty[1, 5] = bad
        X, DY, W, B = (checked.array(v) for v in (dirty, dy, weight, bias))
        y = checked.numpy(cugn.group_norm(X, labels.tolist(), W, B))
        dx = checked.numpy(cugn.group_norm_backward(DY, X, labels.tolist(), W, B).dx)
        clean = np.ones((N, C), bool)
        clean[1, labels == labels[5]] = False
        for found in (y, dx):
            assert np.isfinite(found[clean]).all()
            assert not np.isfinite(found[~clean]).any()


@EMULATOR_NEEDED
@pytest.mark.parametrize("dtype", FLOATS)
def test_beyond_a_block(dtype: str) -> None:
    """Samples that fit in a block's shared memory and those that do not: within the same bounds."""
    from simt import host_cupy

    N, C, labels = TABLES["long"]
    small = host_cupy.Properties("small", shared_per_block=16 << 10, shared_opt_in=16 << 10)
    for device in (host_cupy.H100, small):
        with emulated(device, mode="fast") as library:
            check_call(library, random((N, C), dtype), labels.tolist(), False)


@EMULATOR_NEEDED
def test_one_going_through(checked: Library) -> None:
    """Samples that fit in a block are read once and written once, by one kernel; dweight and dbias take another."""
    N, C, labels = TABLES["many"]
    x, dy, weight, bias = random((N, C), "float32")
    X, DY, W, B = (checked.array(v) for v in (x, dy, weight, bias))
    for inputs, kernels, call in (
        (("x",), ["forward"], lambda: cugn.group_norm(X, labels.tolist(), W, B)),
        (
            ("x", "dy"),
            ["backward", "parameter_gradients"],
            lambda: cugn.group_norm_backward(DY, X, labels.tolist(), W, B),
        ),
    ):
        call()  # brings the labels to the device
        with simt.recorded() as launches:
            call()
        assert [launch.kernel for launch in launches] == kernels
        buffers = launches[0].buffers
        assert all(buffers[name].read.bytes == x.nbytes for name in inputs)
        assert buffers["y" if inputs == ("x",) else "dx"].write.bytes == x.nbytes
