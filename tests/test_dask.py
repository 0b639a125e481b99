"""Dask arrays give what NumPy arrays give, lazily, whatever the chunks."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from libraries import EVERYTHING, LIBRARIES

import cugn

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")

SHAPE = (3, 12, 6, 10)
OFFSET = 1e4
CHUNKINGS = {
    "one chunk": SHAPE,
    "batch": (1, 12, 6, 10),
    "channels between groups": (3, 6, 6, 10),
    "channels inside groups": (3, 4, 6, 10),
    "channels one by one": (3, 1, 6, 10),
    "rows": (3, 12, 2, 10),
    "columns": (3, 12, 6, 4),
    "batch and rows": (2, 12, 3, 10),
    "channels and columns": (3, 5, 6, 3),
    "everything": (2, 5, 4, 3),
}
LABELS = [2, 0, 1, 0, 2, 1, 0, 0, 1, 2, 0, 3]
GROUPS = {"G=4": 4, "G=1": 1, "G=C": 12, "labels": LABELS}


@pytest.fixture(autouse=True)
def _single_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def optimized(results: tuple[Any, ...]) -> tuple[dict[Any, Any], dict[Any, set[Any]]]:
    """The graph that a scheduler gets, and what each of its tasks waits for."""
    if hasattr(dask.base, "collections_to_expr"):
        graph = dict(dask.base.collections_to_expr(results).optimize().__dask_graph__())
        return graph, {key: set(task.dependencies) for key, task in graph.items()}
    graph = dict(dask.base.collections_to_dsk(results))  # before 2025
    return graph, dask.core.get_deps(graph)[0]


def data(dtype: Any, shape: tuple[int, ...] = SHAPE, offset: float = OFFSET) -> tuple[Any, Any, Any, Any, Any]:
    """x, dy, weight, bias, where."""
    rng = np.random.default_rng(7)
    x = (offset + rng.normal(size=shape)).astype(dtype)
    weight, bias = rng.normal(1, 0.5, (2, shape[1])).astype(np.float32)
    return x, rng.normal(size=shape).astype(dtype), weight, bias, rng.random(shape) < 0.6


def bounds(result: Any, scale: Any, factor: int) -> Any:
    """The promised bound: `factor` eps of the dtype times the scale; twice, for both sides may have used it up."""
    return 2 * factor * np.finfo(result.dtype).eps * scale


def check_forward(got: Any, wanted: Any, weight: Any, bias: Any) -> None:
    y, mean, rstd = wanted
    factor = 4 if y.dtype == np.float64 else 3
    w = 1 if weight is None else np.abs(weight).max()
    b = 0 if bias is None else np.abs(bias).max()
    x_hat_scale = max(1.0, (np.abs(y).max() + b) / w)
    assert np.abs(got[0] - y).max() <= bounds(y, w * x_hat_scale + b, factor)
    # a mean merged in float64 is off by some units in its last place; the variance by 1e-16 (1 + k^2), with block
    # means within k = 3 standard deviations of each other, and by the data's own rounding of the differences
    np.testing.assert_allclose(got[1], mean, rtol=1e-14)
    np.testing.assert_allclose(got[2], rstd, rtol=1e-11)


def check_backward(got: Any, wanted: Any, terms: Any) -> None:
    factor = 8 if wanted[0].dtype == np.float64 else 4
    assert np.abs(got[0] - wanted[0]).max() <= bounds(wanted[0], np.abs(wanted[0]).max(), factor)
    for gradient, reference in zip(got[1:], wanted[1:], strict=True):
        assert np.abs(gradient - reference).max() <= bounds(reference, terms, factor)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_equals_numpy(chunks: Any, groups: Any, dtype: Any) -> None:
    x, dy, weight, bias, where = data(dtype)
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    # what an activation adds is the same in both dtypes, and has kernels of its own
    for options in ({}, {"where": where, "activation": "silu" if dtype == np.float32 or EVERYTHING else None}):
        wanted = cugn.group_norm_forward(x, groups, weight, bias, **options)
        lazy = cugn.group_norm_forward(lazy_x, groups, weight, bias, **options)
        check_forward(same_kind(lazy, wanted, lazy_x), wanted, weight, bias)

        grads = cugn.group_norm_backward(dy, x, groups, weight, bias, **options)
        lazy_grads = cugn.group_norm_backward(lazy_dy, lazy_x, groups, weight, bias, **options)
        terms = np.abs(dy * np.abs(wanted.y).max()).sum((0, 2, 3)).max() + 1
        check_backward(same_kind(lazy_grads, grads, lazy_x), grads, terms)


def same_kind(lazy: Any, wanted: Any, x: Any) -> Any:
    """Computed fields, after a check that each says before what it is: type, shape, dtype, x's chunks."""
    assert type(lazy) is type(wanted)
    assert lazy[0].chunks == x.chunks
    computed = dask.compute(*lazy)
    for field, value, reference in zip(lazy, computed, wanted, strict=True):
        assert type(value) is np.ndarray
        assert field.shape == value.shape == reference.shape
        assert field.dtype == value.dtype == reference.dtype == field._meta.dtype
    return computed


def test_gradients_of_channels_add_up_in_float64() -> None:
    """Rounded once, to the nearest: sums in float32 of 64 chunks are off by some units.

    Where groups are cut, and for a float64 weight everywhere, the terms are float64 sums, and the gradients exact to
    half a unit. Where no group is cut a chunk is one call, whose dx must have the bits of the NumPy call, and a weight
    of float32 (or none) makes that a computation in float32 blocks: its dweight is rounded to float32, in each chunk.
    What Dask adds to those is still half a unit; against the exact sum the bound is the promised one of each chunk, 4
    eps of the sum of its terms, and so of all of them.
    """
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 64, 4, 5)).astype(np.float32)
    weight = np.ones(4, np.float32)
    exact = cugn.group_norm_backward(dy.astype(float), x.astype(float), 2)[1:]
    x_hat = cugn.group_norm(x.astype(float), 2)
    sizes = [np.abs(terms).sum((0, 2)) for terms in (dy * x_hat, dy)]
    eps = np.finfo(np.float32).eps
    for chunks in ((1, 4, 5), (1, 2, 5), (1, 3, 2)):
        for w in (weight, None, weight.astype(float)):
            grads = cugn.group_norm_backward(da.from_array(dy, chunks), da.from_array(x, chunks), 2, w)
            got = dask.compute(*grads[1:])
            expected = exact
            if chunks[1] != 3 and (w is None or w.dtype == np.float32):
                terms = [
                    [cugn.group_norm_backward(dy[n : n + 1, c], x[n : n + 1, c], chunks[1] // 2)[1:] for n in range(64)]
                    for c in (slice(c, c + chunks[1]) for c in range(0, 4, chunks[1]))
                ]
                expected = np.concatenate(np.sum(np.array(terms, float), axis=1), axis=-1)
            e = 0.51 * eps if w is None or w.dtype == np.float32 else 1e-14
            for value, wanted, true, size in zip(got, expected, exact, sizes, strict=True):
                assert np.abs(value - wanted).max() <= e * np.abs(wanted).max()
                assert (np.abs(value - true) <= 4 * eps * size).all()


@pytest.mark.rare(when=lambda activation: activation == "relu")
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("supplied", ["full", "one for all samples", "dask"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["channels between groups"], CHUNKINGS["everything"]])
def test_supplied_statistics(chunks: Any, dtype: Any, supplied: str, activation: str) -> None:
    x, dy, weight, bias, where = data(dtype)
    if supplied == "one for all samples":
        x[:] = x[:1]
    statistics = cugn.moments(x, 4)
    mean, rstd = statistics.mean, statistics.rstd(1e-5)
    if supplied == "one for all samples":
        mean, rstd = mean[0], rstd[:1]
    given = (da.from_array(mean, 1), da.from_array(rstd, 1)) if supplied == "dask" else (mean, rstd)
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    y = cugn.normalize(x, mean, rstd, 4, weight, bias, activation=activation)
    lazy = cugn.normalize(lazy_x, *given, 4, weight, bias, activation=activation)
    assert lazy.chunks == lazy_x.chunks
    np.testing.assert_array_equal(lazy.compute(), y)
    for mask in (None, where):
        wanted = cugn.group_norm_backward(dy, x, 4, weight, mean=mean, rstd=rstd, where=mask)
        got = cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight, mean=given[0], rstd=given[1], where=mask)
        check_backward(dask.compute(*got), wanted, 4 * np.abs(dy).sum((0, 2, 3)).max())


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_moments(chunks: Any) -> None:
    x, _, _, _, where = data(np.float32)
    for mask in (None, where, where[:1, :, :1], np.arange(10) > 4, np.arange(3)[:, None, None, None] > 0):
        wanted = cugn.moments(x, LABELS, where=mask)
        lazy = cugn.moments(da.from_array(x, chunks), LABELS, where=mask)
        count, mean, m2 = dask.compute(*lazy)
        assert (count.dtype, mean.dtype, m2.dtype) == (np.int64, np.float64, np.float64)
        np.testing.assert_array_equal(count, wanted.count)
        np.testing.assert_allclose(mean, wanted.mean, rtol=1e-14)
        np.testing.assert_allclose(m2, wanted.m2, rtol=1e-11)
        if count.all():
            np.testing.assert_allclose(lazy.rstd(1e-5).compute(), wanted.rstd(1e-5), rtol=1e-11)
    merged = cugn.moments(da.from_array(x, chunks), LABELS, where=~where).merge(
        cugn.moments(da.from_array(x, chunks), LABELS, where=where)
    )
    np.testing.assert_allclose(merged.mean.compute(), cugn.moments(x, LABELS).mean, rtol=1e-14)


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("family", ["layer_norm", "instance_norm", "batch_norm"])
def test_family(family: str, chunks: Any) -> None:
    x, dy, weight, bias, where = data(np.float32)
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    forward, backward = (getattr(cugn, f"{family}_{name}") for name in ("forward", "backward"))
    wanted = forward(x, weight, bias, where=where)
    check_forward(
        same_kind(forward(lazy_x, weight, bias, where=da.from_array(where, 2)), wanted, lazy_x), wanted, weight, bias
    )
    grads = backward(dy, x, weight, bias)
    terms = 8 * np.abs(dy).sum((0, 2, 3)).max()
    check_backward(same_kind(backward(lazy_dy, lazy_x, weight, bias), grads, lazy_x), grads, terms)


@pytest.mark.parametrize("chunks", [(1, 5, 2, 20), (3, 8, 3, 5), (2, 3, 4, 7)])
@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (5, {"channel_axis": -1, "batch_axis": (2, 0)}),
        (2, {"channel_axis": 1, "batch_axis": (0, 3)}),
        (4, {"channel_axis": 1, "batch_axis": None}),
        (2, {"channel_axis": 2, "batch_axis": -1}),
    ],
)
def test_axes(groups: int, axes: Any, chunks: Any) -> None:
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 3, 8, 4, 20)).astype(np.float32)
    x += 1e4
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    wanted = cugn.group_norm_forward(x, groups, **axes)
    check_forward(same_kind(cugn.group_norm_forward(lazy_x, groups, **axes), wanted, lazy_x), wanted, None, None)
    grads = cugn.group_norm_backward(dy, x, groups, **axes)
    got = same_kind(cugn.group_norm_backward(lazy_dy, lazy_x, groups, **axes), grads, lazy_x)
    check_backward(got, grads, 4 * np.abs(dy).sum())


@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["everything"]])
@pytest.mark.rare(when=lambda groups: groups != 4)
@pytest.mark.parametrize("groups", [4, LABELS], ids=["G=4", "labels"])
def test_dtypes(groups: Any, chunks: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(1)
    for dtype in (ml_dtypes.bfloat16, np.uint8, *((np.float16, np.int16) if EVERYTHING else ())):
        x = (100 * rng.random(SHAPE)).astype(dtype)
        wanted = cugn.group_norm_forward(x, groups)
        got = same_kind(cugn.group_norm_forward(da.from_array(x, chunks), groups), wanted, da.from_array(x, chunks))
        # half an ulp of y on each side of a statistic that differs in its last bits
        eps = float(ml_dtypes.finfo(wanted.y.dtype).eps)
        assert np.abs(got[0].astype(float) - wanted.y.astype(float)).max() <= eps * np.abs(wanted.y.astype(float)).max()
        dy = rng.normal(size=SHAPE).astype(wanted.y.dtype)
        weight = rng.normal(size=12).astype(ml_dtypes.bfloat16)
        lazy = cugn.group_norm_backward(da.from_array(dy, chunks), da.from_array(x, chunks), groups, weight)
        grads = cugn.group_norm_backward(dy, x, groups, weight)
        assert lazy.dweight.dtype == grads.dweight.dtype == weight.dtype
        for value, reference in zip(dask.compute(*lazy), grads, strict=True):
            assert value.dtype == reference.dtype
            reference = reference.astype(float)
            eps = float(ml_dtypes.finfo(value.dtype).eps)
            assert np.abs(value.astype(float) - reference).max() <= eps * np.abs(reference).max()


def test_batch_chunks_give_the_bits_of_numpy() -> None:
    x, dy, weight, bias, where = data(np.float32)
    for chunks in ((1, 12, 6, 10), (2, 6, 6, 10)):
        lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
        np.testing.assert_array_equal(
            cugn.group_norm(lazy_x, 4, weight, bias, where=where).compute(),
            cugn.group_norm(x, 4, weight, bias, where=where),
        )
        np.testing.assert_array_equal(
            cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight).dx.compute(),
            cugn.group_norm_backward(dy, x, 4, weight).dx,
        )


def test_same_bits_from_run_to_run_and_for_any_number_of_threads() -> None:
    x, dy, weight, _, _ = data(np.float32)

    def run(workers: int) -> list[bytes]:
        lazy_x, lazy_dy = (da.from_array(a, CHUNKINGS["everything"]) for a in (x, dy))
        grads = cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight)
        return [a.tobytes() for a in dask.compute(*grads, scheduler="threads", num_workers=workers)]

    first = run(1)
    assert all(run(workers) == first for workers in (1, 2, 4))


@pytest.mark.parametrize("offset", [1e8, 1e12])
def test_float64_far_from_zero(offset: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    x = offset + np.random.default_rng(2).normal(size=(1, 2, 4, 6))
    with mpmath.workdps(40):
        values = [mpmath.mpf(float(v)) for v in x.ravel()]
        mean = mpmath.fsum(values) / len(values)
        var = mpmath.fsum((v - mean) ** 2 for v in values) / len(values)
        oracle = np.array([float((v - mean) / mpmath.sqrt(var)) for v in values]).reshape(x.shape)
    y = cugn.group_norm(da.from_array(x, (1, 1, 2, 3)), 1, eps=0).compute()
    assert np.abs(y - oracle).max() <= 4 * np.finfo(float).eps * np.abs(oracle).max()


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e307])
def test_float64_whose_squares_leave_the_range(scale: float) -> None:
    rng = np.random.default_rng(2)
    plain, dy = rng.uniform(-1, 1, (2, 2, 4, 4, 6))
    wanted = cugn.group_norm(plain, 2, eps=0)
    chunks = (1, 3, 2, 3)
    y = cugn.group_norm(da.from_array(scale * plain, chunks), 2, eps=0).compute()
    # the rounding of scale * plain, 1 eps of x, comes to the engine's 4
    assert np.abs(y - wanted).max() <= 12 * np.finfo(float).eps * np.abs(wanted).max()
    got = cugn.group_norm_backward(da.from_array(dy, chunks), da.from_array(scale * plain, chunks), 2, eps=0).dx
    dx = cugn.group_norm_backward(dy, plain, 2, eps=0).dx
    assert np.abs(got.compute() * scale - dx).max() <= 24 * np.finfo(float).eps * np.abs(dx).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_and_empty_groups_stay_by_themselves(dtype: Any) -> None:
    x, _, weight, bias, where = data(dtype)
    x[1, 0, 0, 0], x[2, 11, 5, 9] = np.nan, np.inf
    where[0, 3:6] = False
    wanted = cugn.group_norm(x, 4, weight, bias, where=where)
    assert np.isnan(wanted).sum() > 0
    got = cugn.group_norm(da.from_array(x, CHUNKINGS["everything"]), 4, weight, bias, where=where).compute()
    np.testing.assert_allclose(got, wanted, rtol=1e-4 if dtype == np.float32 else 1e-10)
    assert np.isnan(got).tolist() == np.isnan(wanted).tolist()


@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["channels inside groups"], (2, 6, 4, 5)])
def test_jvp_and_double_backward(chunks: Any) -> None:
    x, dy, weight, bias, where = data(np.float64, offset=0)
    ddx = np.random.default_rng(5).normal(size=SHAPE)
    options = {"where": where, "activation": "gelu_tanh"}
    lazy_x, lazy_dy, lazy_ddx = (da.from_array(a, chunks) for a in (x, dy, ddx))
    wanted = cugn.group_norm_jvp(ddx, x, LABELS, weight, bias, tweight=bias, tbias=weight, **options)
    got = cugn.group_norm_jvp(lazy_ddx, lazy_x, LABELS, weight, bias, tweight=bias, tbias=weight, **options)
    assert (got.chunks, got.dtype) == (lazy_x.chunks, wanted.dtype)
    np.testing.assert_allclose(got.compute(), wanted, atol=1e-12)
    wanted = cugn.group_norm_double_backward(ddx, dy, x, LABELS, weight, bias, ddweight=bias, ddbias=weight, **options)
    got = cugn.group_norm_double_backward(
        lazy_ddx, lazy_dy, lazy_x, LABELS, weight, bias, ddweight=bias, ddbias=weight, **options
    )
    assert got.gdy.chunks == got.gx.chunks == lazy_x.chunks
    for lazy, reference in zip((*got, got.gbias), (*wanted, wanted.gbias), strict=True):
        assert lazy.dtype == reference.dtype
        np.testing.assert_allclose(lazy.compute(), reference, atol=1e-5 if lazy.dtype == np.float32 else 1e-11)


def unknown_batch(x: Any, chunks: Any) -> Any:
    lazy = da.from_array(x, chunks)
    return lazy[da.from_array(np.arange(len(x)) >= 0, chunks[0])]  # keeps all, but Dask cannot know


@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["everything"]])
def test_unknown_batch_chunks(chunks: Any) -> None:
    x, dy, weight, bias, where = data(np.float32)
    lazy_x, lazy_dy, lazy_where = (unknown_batch(a, chunks) for a in (x, dy, where))
    assert np.isnan(lazy_x.shape[0])
    terms = 8 * np.abs(dy).sum((0, 2, 3)).max()
    for function in ("group_norm", "batch_norm"):
        groups = (4,) if function == "group_norm" else ()
        forward, backward = (getattr(cugn, f"{function}_{name}") for name in ("forward", "backward"))
        for options, lazy_options in (({}, {}), ({"where": where}, {"where": lazy_where})):
            wanted = forward(x, *groups, weight, bias, **options)
            lazy = forward(lazy_x, *groups, weight, bias, **lazy_options)
            assert lazy.y.numblocks == lazy_x.numblocks
            check_forward(dask.compute(*lazy), wanted, weight, bias)
            grads = backward(dy, x, *groups, weight, **options)
            for statistics in ({}, {"mean": lazy.mean, "rstd": lazy.rstd}):
                got = backward(lazy_dy, lazy_x, *groups, weight, **statistics, **lazy_options)
                check_backward(dask.compute(*got), grads, terms)
            how = {"groups": 12, "batch_axis": None} if function == "batch_norm" else {"groups": 4}
            y = cugn.normalize(lazy_x, lazy.mean, lazy.rstd, **how)
            assert y.numblocks == lazy_x.numblocks
            np.testing.assert_allclose(y.compute(), forward(x, *groups, **options).y, rtol=1e-4, atol=1e-5)


def test_unknown_sizes_where_they_are_needed() -> None:
    x = unknown_batch(data(np.float32)[0], CHUNKINGS["everything"])
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        cugn.group_norm_jvp(x, x, 4)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        cugn.group_norm_double_backward(x, x, x, 4)
    other = unknown_batch(data(np.float32)[1], (1, 5, 4, 3))
    with pytest.raises(ValueError, match=r"dy has .* chunks of unknown size"):
        cugn.group_norm_backward(other, x, 4)
    channels = da.from_array(np.ones((2, 4, 6), np.float32), 2)[:, da.from_array(np.ones(4, bool), 2)]
    with pytest.raises(ValueError, match="unknown size along axis 1, the channels"):
        cugn.group_norm(channels, 2)


def test_nothing_is_computed_before_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed")

    for name in ("moments", "normalize", "backward_sums", "backward_apply"):
        monkeypatch.setattr(f"cugn.parts.{name}", forbidden)
    x, _, weight, bias, where = data(np.float32)
    for chunks in (CHUNKINGS["batch"], CHUNKINGS["channels between groups"], (2, 6, 4, 5)):
        source = da.from_array(x, chunks).map_blocks(forbidden, dtype=x.dtype, meta=x[:0, :0, :0, :0])
        results = [
            *cugn.group_norm_forward(source, 4, weight, bias, where=where),
            *cugn.group_norm_backward(source, source, 4, weight, bias),
            *cugn.moments(source, 4),
            cugn.normalize(source, np.zeros(4), np.ones(4), 4),
            cugn.group_norm_jvp(source, source, 4),
            *cugn.group_norm_double_backward(source, source, source, 4),
            *cugn.batch_norm_forward(source),
        ]
        for result in results:
            with pytest.raises(AssertionError, match="computed"):
                result.compute()


def tasks(array: Any) -> int:
    return len(dask.optimize(array)[0].__dask_graph__())


def test_one_task_a_chunk_where_only_the_batch_is_chunked() -> None:
    x = da.ones((64, 8, 4, 4), chunks=(1, 8, 4, 4), dtype=np.float32)
    # the chunk's source is fused with the call; labels are one task
    assert tasks(cugn.group_norm(x, 4)) <= 64 + 2
    assert tasks(cugn.group_norm(x, [0, 1, 2, 0, 1, 2, 0, 3])) <= 64 + 2


def test_each_chunk_is_read_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        function = getattr(cugn, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("moments", "normalize", "backward_sums", "backward_apply"):
        monkeypatch.setattr(f"cugn.parts.{name}", counted(name))
    x = da.ones(SHAPE, chunks=(1, 5, 6, 4), dtype=np.float32)
    y, mean, rstd = cugn.group_norm_forward(x, 4)
    dask.compute(y, mean, rstd, *cugn.group_norm_backward(x, x, 4))
    once = x.npartitions
    assert calls == {"moments": once, "normalize": once, "backward_sums": once, "backward_apply": once}
    calls.clear()
    dask.compute(*cugn.group_norm_backward(x, x, 4, mean=mean.compute(), rstd=rstd.compute()))
    assert calls == {"moments": 2 * once, "backward_sums": once, "backward_apply": once}  # moments: of mean, of rstd


def test_graphs_are_linear() -> None:
    """In tasks, and in the work of building them: Python calls are counted, since a busy machine's seconds vary."""

    def built(edge: int) -> tuple[int, int]:
        x = da.ones((10, 8, 10 * edge, 10), chunks=(1, 4, 10, 1), dtype=np.float32)
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            results = (*cugn.group_norm_forward(x, 1), *cugn.group_norm_backward(x, x, 1))
            graph, inputs = optimized(results)
        finally:
            sys.setprofile(before)
        assert max(map(len, inputs.values())) <= 16  # no task waits for all chunks
        return len(graph), calls

    built(1)  # what is imported or cached the first time
    small_tasks, small_calls = built(1)
    tasks, calls = built(5)  # 200 and 1,000 chunks
    assert tasks <= 5.5 * small_tasks
    assert calls <= 5.5 * small_calls
    assert calls <= 1000 * 1000  # 540,000 as this is written, which take a second; almost all are Dask's own


def test_empty_arrays() -> None:
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        x = da.ones(shape, dtype=np.float32)
        groups = 2
        wanted = cugn.group_norm_forward(np.ones(shape, np.float32), groups)
        got = dask.compute(*cugn.group_norm_forward(x, groups))
        for value, reference in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(value, reference)
        grads = cugn.group_norm_backward(np.ones(shape, np.float32), np.ones(shape, np.float32), groups)
        for value, reference in zip(dask.compute(*cugn.group_norm_backward(x, x, groups)), grads, strict=True):
            np.testing.assert_array_equal(value, reference)


def test_chunks_without_elements() -> None:
    x, dy, weight, _, _ = data(np.float32)
    chunks = ((0, 3), (4, 0, 8), (6,), (0, 7, 0, 3))
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    wanted = cugn.group_norm_forward(x, 4, weight)
    check_forward(same_kind(cugn.group_norm_forward(lazy_x, 4, weight), wanted, lazy_x), wanted, weight, None)
    grads = cugn.group_norm_backward(dy, x, 4, weight)
    got = same_kind(cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight), grads, lazy_x)
    check_backward(got, grads, 4 * np.abs(dy).sum((0, 2, 3)).max())


def on_numpy(array: Any, library: Any) -> Any:
    """Values of a Dask array, by its blocks: the emulator has none of CuPy's own kernels to join them."""
    blocks = array.to_delayed()
    values = np.empty(blocks.shape, object)
    for index, block in zip(np.ndindex(blocks.shape), dask.compute(*blocks.ravel()), strict=True):
        assert type(block) is type(array._meta)
        values[index] = library.numpy(block)
    return np.block(values.tolist())


def check_cupy(library: Any, chunks: Any) -> None:
    x, dy, weight, bias, _ = data(np.float32)
    lazy_x, lazy_dy = (da.from_array(library.array(a), chunks, asarray=False) for a in (x, dy))
    weight_there = library.array(weight)
    got = cugn.group_norm_forward(lazy_x, 4, weight_there, library.array(bias))
    assert all(type(field._meta) is type(weight_there) for field in got)
    check_forward(
        [on_numpy(field, library) for field in got], cugn.group_norm_forward(x, 4, weight, bias), weight, bias
    )
    grads = cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight_there)
    wanted = cugn.group_norm_backward(dy, x, 4, weight)
    assert np.abs(on_numpy(grads.dx, library) - wanted.dx).max() <= bounds(wanted.dx, np.abs(wanted.dx).max(), 4)
    if library.name == "cupy":
        check_backward([on_numpy(grad, library) for grad in grads], wanted, 4 * np.abs(dy).sum((0, 2, 3)).max())


@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["channels between groups"]])
def test_cupy_chunks_on_the_emulator(chunks: Any) -> None:
    """Whole groups in a chunk: the calls of the CUDA engine, arrays that stay on their device."""
    if cuda_on_cpu.REASON is not None:
        pytest.skip(cuda_on_cpu.REASON)
    with cuda_on_cpu.emulated() as library:
        check_cupy(library, chunks)


@pytest.mark.parametrize("chunks", [CHUNKINGS["batch"], CHUNKINGS["everything"]])
def test_cupy_chunks(chunks: Any) -> None:
    check_cupy(LIBRARIES["cupy"](), chunks)


def test_out_is_refused() -> None:
    x = da.ones((2, 4, 3))
    with pytest.raises(TypeError, match="out is from dask"):
        cugn.group_norm(x, 2, out=x)


def test_operands_in_other_chunks() -> None:
    x, dy, weight, bias, where = data(np.float32)
    lazy = cugn.group_norm_backward(
        da.from_array(dy, (3, 2, 5, 5)),
        da.from_array(x, CHUNKINGS["everything"]),
        4,
        da.from_array(weight, 5),
        da.from_array(bias, 12),
        where=da.from_array(where, (3, 12, 1, 10)),
        activation="silu",
    )
    wanted = cugn.group_norm_backward(dy, x, 4, weight, bias, where=where, activation="silu")
    check_backward(dask.compute(*lazy), wanted, 8 * np.abs(dy).sum((0, 2, 3)).max())


def test_two_tasks_a_chunk_where_groups_are_cut() -> None:
    """And none that is a graph of its own, which the scheduler would order again for every chunk: 0.1 ms each."""
    x = da.from_array(np.ones((4, 8, 64, 4), np.float32), (1, 4, 4, 4)).persist()  # 128 chunks
    _, mean, rstd = dask.persist(*cugn.group_norm_forward(x, 4))
    for results in (
        cugn.group_norm_forward(x, 4),
        cugn.group_norm_backward(x, x, 4, mean=mean, rstd=rstd),
    ):
        graph, _ = optimized(results)
        of_chunks = [key for key in graph if isinstance(key, tuple) and len(key) == 1 + x.ndim]
        names = Counter(str(key[0]).rpartition("-")[0] for key in of_chunks if key[0] != x.name)
        assert sorted(names.values())[-2:] == [128, 128]
        assert len(graph) <= 3 * 128 + 60  # the chunks of x, two tasks for each, small ones
        assert not [key for key in of_chunks if "_execute_subgraph" in repr(getattr(graph[key], "func", None))]


def test_a_chunk_waits_for_the_chunks_of_its_groups_alone() -> None:
    """Space in parts, channels between groups: an array that memory does not hold goes through group by group."""
    x = da.from_array(np.ones((2, 8, 6, 4), np.float32), (1, 4, 3, 2))
    statistics = cugn.group_norm_forward(x, 4)[1:]
    for y in (
        cugn.group_norm(x, 4),
        cugn.group_norm_backward(x, x, 4)[0],
        cugn.group_norm_backward(x, x, 4, mean=statistics[0], rstd=statistics[1])[0],
        cugn.group_norm(x, 4, where=x > 0),
    ):
        needs = y.__dask_graph__().get_all_dependencies()
        for place in np.ndindex(y.numblocks):
            sources, todo = set(), {(y.name, *place)}
            while todo:
                key = todo.pop()
                todo |= needs[key]
                sources |= {key[1:3]} if key[0] == x.name else set()
            assert sources == {place[:2]}


def test_a_chunk_is_computed_by_the_thread_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from cugn import threads

    x = np.random.default_rng(0).normal(size=(1, 8, 1 << 18)).astype(np.float32)
    monkeypatch.setattr(threads, "count", 2)
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    wanted = [da.from_array(x, chunks) for chunks in (x.shape, (1, 8, 1 << 17))]
    got = [cugn.group_norm(lazy, 2).compute() for lazy in wanted]
    assert threads._pool.size == 0
    y = cugn.group_norm(x, 2)
    assert threads._pool.size == 1  # the same work in a call of its own has help
    np.testing.assert_array_equal(got[0], y)
    with pytest.raises(ZeroDivisionError), threads.alone():
        _ = 1 / 0
    assert not threads._here.alone


def test_large_results_of_chunks_leave_the_caches() -> None:
    """8 MB stay in cache for the caller of one array; of a chunk, whose neighbours need the room, they do not."""
    from cugn.cpu import geometry, words
    from cugn.engines import resolve

    def streams(size: int, setting: int) -> bool:
        x = np.empty((1, 2, size), np.float32)
        plan = resolve("forward", x, 2, [], 1e-5, 1, 0, None)[1]
        return bool(geometry.of(plan, [x, x], setting, compute="float32", phases=2).words[words.STREAM])

    assert [streams(size, setting) for size in (1 << 18, 1 << 20, 1 << 22) for setting in (0, 2)] == [
        *(False, False),  # 2 MB
        *(True, False),  # 8 MB
        *(True, True),  # 32 MB
    ]
