"""Changes to cugn's CUDA kernels that the tests have to notice, and the checks that do.

``python tests/cuda_mutants.py`` runs all of them and prints a table; with names, these.

The checks are small versions of tests/test_cuda_values.py and tests/test_cuda_traffic.py: values against the oracle,
every access looked at, and what is read and written. A device with 48 KiB of shared memory a block splits groups of
12,000 elements, so that the paths for large groups are short, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import simt
from cuda_on_cpu import emulated
from simt import host_cupy, mutants
from simt.mutants import Mutant
from test_accuracy import check_gradients, check_y

import cugn
from cugn import reference
from cugn.cuda import compile as cuda
from cugn.engines import resolve

SMALL_DEVICE = host_cupy.Properties(
    "48 KiB a block", major=7, minor=5, shared_opt_in=48 << 10, shared_per_multiprocessor=64 << 10
)

MUTANTS: list[Mutant] = []


def mutant(name: str, file: str, after: str, old: str, new: str, by: str) -> None:
    """Add one to the list."""
    MUTANTS.append(Mutant(name, file, after, old, new, by))


# ---------------------------------------------------------------- the checks


@lru_cache(maxsize=64)
def inputs(shape: tuple[int, ...], dtype: str, mean: float, std: float) -> tuple[np.ndarray, ...]:
    """x, dy, weight, bias: (N, C, S)."""
    rng = np.random.default_rng(sum(shape))
    own = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    x, dy = (rng.normal(size=shape) * std + mean).astype(own), rng.normal(size=shape).astype(own)
    return x, dy, rng.normal(size=shape[1]).astype(own), rng.normal(size=shape[1]).astype(own)


@cache
def expected(
    shape: tuple[int, ...],
    dtype: str,
    mean: float,
    std: float,
    groups: Any,
    eps: float,
    masked: bool,
    activation: str | None,
) -> tuple[Any, Any, Any]:
    """The oracle's forward and backward, and the mask."""
    x, dy, weight, bias = inputs(shape, dtype, mean, std)
    where = np.random.default_rng(1).random(shape) < 0.6 if masked else None
    options = {"eps": eps, "where": where, "activation": activation}
    forward = oracle.forward(x, groups, weight, bias, **options)
    backward = oracle.backward(dy, x, groups, weight, bias, **options)
    if np.prod(shape[1:]) / (np.max(groups) if np.ndim(groups) == 0 else np.max(groups) + 1) < 32:
        backward = backward._replace(group_max=backward.terms)
    return forward, backward, where


def call(
    shape: tuple[int, ...],
    groups: Any,
    *,
    dtype: str = "float32",
    mean: float = 3.0,
    std: float = 2.0,
    last: bool = False,
    shift: int = 0,
    shift_out: bool = True,
    eps: float = 1e-5,
    masked: bool = False,
    activation: str | None = None,
    backward: bool = False,
    given: bool = False,
    small: bool = False,
    seed: int = 7,
    wide: bool = True,
    passes: int = 0,
) -> list[simt.Launch]:
    """One call against the oracle, y or gradients, and its traffic; `shift` elements off an aligned address.

    Without `shift_out` the result lies at one.
    """
    key = tuple(groups) if np.ndim(groups) else groups
    forward, gradients, where = expected(shape, dtype, mean, std, key, eps, masked, activation)
    x, dy, weight, bias = inputs(shape, dtype, mean, std)
    turn = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)
    back = (lambda a: np.moveaxis(a, -1, 1)) if last else (lambda a: a)

    def on_device(a: np.ndarray, shift: int = shift) -> Any:
        a = turn(a)
        return host_cupy.to_device(np.concatenate([np.zeros(shift, a.dtype), a.ravel()]))[shift:].reshape(a.shape)

    options: dict[str, Any] = {"eps": eps, "activation": activation, "channel_axis": -1 if last else 1}
    with emulated(*([SMALL_DEVICE] if small else []), seed=seed), simt.recorded() as launches:
        X, DY, out = on_device(x), on_device(dy), on_device(np.zeros_like(x), shift if shift_out else 0)
        W, B = host_cupy.to_device(weight), host_cupy.to_device(bias)
        if masked:
            options["where"] = host_cupy.to_device(turn(where))
        if backward:
            if given:
                options["mean"], options["rstd"] = (
                    host_cupy.to_device(v.astype(np.float64)) for v in (forward.mean, forward.rstd)
                )
            found = cugn.group_norm_backward(
                DY, X, key if np.ndim(groups) == 0 else list(groups), W, B, out=out, **options
            )
            found = cugn.GroupNormGrads(back(host_cupy.to_host(found.dx)), *map(host_cupy.to_host, found[1:]))
            check_gradients(found, gradients, dtype, "gradients")
        else:
            y, mean_, rstd = cugn.group_norm_forward(
                X, key if np.ndim(groups) == 0 else list(groups), W, B, out=out, **options
            )
            check_y(back(host_cupy.to_host(y)), forward, dtype, "y")
            np.testing.assert_allclose(host_cupy.to_host(mean_), forward.mean.astype(float), rtol=1e-6, atol=1e-6 * std)
            with np.errstate(over="ignore"):  # 1e-310 has an infinite one
                np.testing.assert_allclose(host_cupy.to_host(rstd), forward.rstd.astype(float), rtol=1e-6)
    passes = passes or (2 if small else 1)
    reads = sum(b.read.bytes for launch in launches for name, b in launch.buffers.items() if name in ("x", "dy"))
    assert reads <= 1.02 * passes * x.nbytes * (1 + backward), "more is read than has to be"
    if wide:
        flows = [
            flow
            for launch in launches
            for name, b in launch.buffers.items()
            if name in ("x", "dy", "y", "dx")
            for flow in (b.read, b.write)
        ]
        assert sum(f.wide for f in flows) >= 0.8 * sum(f.bytes for f in flows), "narrow accesses"
    return launches


def slow_beside_fast() -> None:
    """Two groups in a block, one of which has to go through float64."""
    shape = (1, 2, 2000)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[:, 1] *= 1e-25
    with emulated(seed=3):
        y = host_cupy.to_host(cugn.group_norm(host_cupy.to_device(x), 2, eps=0.0))
    check_y(y, oracle.forward(x, 2, eps=0.0), "float32", "slow beside fast")


def one_element() -> None:
    """Groups of one element: dx exactly zero."""
    x, dy, weight, bias = inputs((3, 16, 1), "float32", 1e4, 1.0)
    with emulated(seed=2):
        X, DY, W, B = (host_cupy.to_device(v) for v in (x, dy, weight, bias))
        found = cugn.group_norm_backward(DY, X, 16, W, B)
        assert not host_cupy.to_host(found.dx).any()
        np.testing.assert_array_equal(
            host_cupy.to_host(cugn.group_norm(X, 16, W, B)), np.broadcast_to(bias[:, None], x.shape)
        )


def subnormal_weights() -> None:
    """Weights that float32 has as subnormals only, and y like them."""
    x, _, weight, _ = inputs((2, 4, 90), "float32", 3.0, 2.0)
    weight = weight * np.float32(1e-40)
    with emulated(seed=3):
        y = host_cupy.to_host(cugn.group_norm(host_cupy.to_device(x), 2, host_cupy.to_device(weight)))
    wanted = oracle.forward(x, 2, weight).y.astype(np.float64)
    # a few of the steps between subnormals
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=4 * 2.0**-149)


def same_bits() -> None:
    """A sample's bits do not depend on the batch around it, in a full box or in the last one."""
    for shape, groups, last in (((9, 8, 33), 4, False), ((9, 24, 37), 8, True)):
        x, dy, weight, bias = inputs(shape, "float32", 3.0, 2.0)
        options = {"groups": groups, "channel_axis": -1 if last else 1}
        if last:
            x, dy = (np.moveaxis(v, 1, -1) for v in (x, dy))
        with emulated(mode="fast", seed=4):
            W, B = (host_cupy.to_device(v) for v in (weight, bias))

            found = []
            for part in (slice(None), slice(0, 1), slice(8, 9)):
                X, DY = (host_cupy.to_device(np.ascontiguousarray(v[part])) for v in (x, dy))
                y = cugn.group_norm(X, weight=W, bias=B, **options)
                dx = cugn.group_norm_backward(DY, X, weight=W, bias=B, **options).dx
                found.append([host_cupy.to_host(v) for v in (y, dx)])
        for of_all, of_first, of_last in zip(*found, strict=True):
            assert of_all[:1].tobytes() == of_first.tobytes()
            assert of_all[8:].tobytes() == of_last.tobytes()


def far_apart() -> None:
    """Samples more than 2^31 elements apart, of x and of the mask, in one block and in two."""
    for size in (8, 4000):
        x = inputs((2, 4, size), "float16", 3.0, 2.0)[0]
        where = np.random.default_rng(1).random(x.shape) < 0.6
        with emulated(mode="fast"):
            arrays = []
            for a in (x, where):
                arrays.append(host_cupy.sparse(a.shape, a.dtype, (((1 << 31) + 64) * a.itemsize, *a.strides[1:])))
                host_cupy.to_host(arrays[-1])[...] = a
            y = host_cupy.to_host(cugn.group_norm(arrays[0], 2, where=arrays[1]))
        check_y(y, oracle.forward(x, 2, where=where), "float16", "far apart")


def ends_of_the_range() -> None:
    """float64 near its largest values and below its normal ones, in one block and over several, and constant."""
    with simt.using(flush_subnormals=False):
        for std, eps in ((4e307, 1e-5), (1e-310, 0.0)):
            call((1, 4, 100), 2, dtype="float64", mean=0.0, std=std, eps=eps)
            call((1, 2, 6000), 1, dtype="float64", mean=0.0, std=std, eps=eps, small=True)
        call((1, 4, 100), 2, dtype="float64", mean=1.7e308, std=0.0)
        # the parts of a group in two units
        x = np.random.default_rng(0).normal(size=(1, 1, 12000)) * np.repeat([1e-310, 1.0], 6000)
        with emulated(SMALL_DEVICE, seed=5):
            y = host_cupy.to_host(cugn.group_norm(host_cupy.to_device(x), 1))
        check_y(y, oracle.forward(x, 1), "float64", "parts in two units")


def double(
    shape: tuple[int, ...],
    groups: Any,
    *,
    last: bool = False,
    masked: bool = False,
    activation: str | None = None,
    small: bool = False,
    dtype: str = "float64",
) -> None:
    """One double backward against the reference in float64; x read three times, dy and ddx twice, 16 bytes wide."""
    x, dy, weight, bias = inputs(shape, dtype, 3.0, 2.0)
    rng = np.random.default_rng(5)
    ddx = rng.normal(size=shape).astype(x.dtype)
    ddweight, ddbias = (rng.normal(size=shape[1]).astype(x.dtype) for _ in range(2))
    where = rng.random(shape) < 0.6 if masked else None
    turn = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)
    operands = [("ddx", ddx), ("dy", dy), ("weight", weight), ("where", where)]
    plan = resolve("double_backward", x, groups, operands, 1e-5, 1, 0, activation)[1]
    wanted = reference.double_backward(plan, ddx, dy, x, weight, bias, ddweight, ddbias, where)
    with emulated(*([SMALL_DEVICE] if small else []), seed=7), simt.recorded() as launches:
        U, DY, X, W, B, DW, DB = (
            host_cupy.to_device(turn(a) if a.ndim > 1 else a) for a in (ddx, dy, x, weight, bias, ddweight, ddbias)
        )
        mask = None if where is None else host_cupy.to_device(turn(where))
        options = {"where": mask, "activation": activation, "channel_axis": -1 if last else 1}
        found = cugn.group_norm_double_backward(U, DY, X, groups, W, B, ddweight=DW, ddbias=DB, **options)
        values = [host_cupy.to_host(a) for a in (*found, found.gbias)]
    for value, expected_value in zip(values, wanted, strict=True):
        value = np.moveaxis(value, -1, 1) if last and value.ndim > 1 else value
        error = np.abs(value - expected_value).max()
        # rounded once from float64 sums of a few thousand products
        assert error <= 1e-12 * np.abs(expected_value).max(), "double backward"
    reads = sum(b.read.bytes for launch in launches for n, b in launch.buffers.items() if n in ("x", "dy", "ddx"))
    assert reads <= 1.02 * 7 * x.nbytes, "more is read than has to be"


def tangent_in_a_unit() -> None:
    """Tangents of values whose squares leave the range are those of a multiple that is in it."""
    x, tx, weight, bias = inputs((1, 4, 100), "float64", 3.0, 2.0)
    wanted = cugn.group_norm_jvp(tx, x, 2, weight, bias, eps=0.0)
    with emulated(seed=3):
        X, T, W, B = map(host_cupy.to_device, (np.ldexp(x, 900), np.ldexp(tx, 900), weight, bias))
        found = host_cupy.to_host(cugn.group_norm_jvp(T, X, 2, W, B, eps=0.0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14 * np.abs(wanted).max())


LABELS = [0, 1, 0, 2, 2, 2, 1, 0, 2, 2, 2, 2]


def order_of_channels() -> None:
    """Of tables by labels: y, the mean and dx go along with the channels, to the bit."""
    x, dy, weight, bias = inputs((7, 48, 1), "float32", 3.0, 2.0)
    x = x * np.exp(np.arange(48, dtype=np.float32) / 4)[:, None]
    labels = np.array(LABELS * 4)
    found = []
    for of in (np.arange(48), np.random.default_rng(0).permutation(48)):
        with emulated(seed=6):
            X, DY, W, B = (host_cupy.to_device(a) for a in (x[:, of], dy[:, of], weight[of], bias[of]))
            y, mean, _ = cugn.group_norm_forward(X, labels[of].tolist(), W, B)
            dx = cugn.group_norm_backward(DY, X, labels[of].tolist(), W, B).dx
            y, mean, dx = map(host_cupy.to_host, (y, mean, dx))
        found.append([y[:, np.argsort(of)].tobytes(), mean.tobytes(), dx[:, np.argsort(of)].tobytes()])
    assert found[0] == found[1]


def masks_of_other_strides() -> None:
    """A mask of positions, for all channels; one that begins off a word; one whose elements lie apart."""
    parts: list[Callable[[Any, int], Any]] = [
        lambda mask, size: mask[:, :1, :size],
        lambda mask, size: mask[:, :, 1 : size + 1],
        lambda mask, size: mask[:, :, ::2],
    ]
    for part, size, last in product(parts, (24, 35), (False, True)):
        x, _, weight, bias = inputs((3, 8, size), "float32", 3.0, 2.0)
        where = np.random.default_rng(4).random((3, 8, 2 * size)) < 0.6
        wanted = oracle.forward(x, 4, weight, bias, where=part(where, size))
        turn = (lambda a: np.moveaxis(a, 1, -1)) if last else (lambda a: a)
        back = (lambda a: np.moveaxis(a, -1, 1)) if last else (lambda a: a)
        with emulated(seed=8):
            mask = host_cupy.to_device(np.ascontiguousarray(turn(where)))
            X, W, B = (host_cupy.to_device(a) for a in (np.ascontiguousarray(turn(x)), weight, bias))
            mask = turn(part(back(mask), size))
            y = cugn.group_norm(X, 4, W, B, channel_axis=-1 if last else 1, where=mask)
            check_y(back(host_cupy.to_host(y)), wanted, "float32", "a mask of other strides")


CHECKS: dict[str, Callable[[], Any]] = {
    # four samples a block; 41 is a divisor whose float32 inverse is too small
    "first": lambda: call((9, 24, 41), 3),
    "last": lambda: call((2, 24, 37), 8, last=True),
    "aligned": lambda: (call((3, 6, 132), 3), call((2, 2, 1028), 2)),
    "last aligned": lambda: call((2, 32, 37), 8, last=True),
    # of 7 vectors in a row 8 threads take one each
    "tables": lambda: (call((40, 24, 1), 4), call((40, 36, 1), 6), call((40, 28, 1), 4)),
    "out of range, aligned": lambda: call((2, 4, 64), 2, std=1e25, mean=0.0),
    "out of range, tables": lambda: call((9, 24, 1), 4, std=1e25, mean=0.0),
    "out of range, bfloat16": lambda: call((2, 4, 64), 2, dtype="bfloat16", std=1e25, mean=0.0),
    "out of range, split": lambda: call((1, 2, 9001), 1, std=1e25, mean=0.0, small=True, wide=False),
    "x off the vectors of y": lambda: (
        call((1, 2, 9004), 1, shift=1, shift_out=False, small=True, wide=False),
        call((1, 2, 9001), 1, shift=1, shift_out=False, small=True, wide=False),
    ),
    "tiny groups": lambda: call((130, 4, 1), 2),
    "short rows": lambda: call((5, 24, 7), 3, last=True, wide=False),
    # a group of 110 channels a block: rows apart, each with a head of its own
    "rows apart": lambda: call((2, 330, 37), 3, last=True),
    # the rows of the first group begin at vectors, but are no whole number of them
    "rows with ends": lambda: call((1, 660, 20), 2, last=True),
    # a thread meets the same channels at the end of the first sample, half of whose vector is the second's
    "ends of samples": lambda: call((2, 2, 1023), 2, last=True),
    "misaligned": lambda: (call((2, 6, 57), 1, shift=1), call((2, 6, 57), 3, shift=3, last=True, wide=False)),
    "float16": lambda: (call((2, 6, 85), 1, dtype="float16", shift=3), call((2, 32, 9), 4, dtype="float16", last=True)),
    "bfloat16": lambda: call((2, 6, 40), 2, dtype="bfloat16"),
    "split": lambda: (call((1, 2, 9001), 1, small=True), call((2, 3, 14000), 3, small=True)),
    "split last": lambda: call((1, 24, 1201), 2, small=True, last=True),
    "float64": lambda: call((2, 6, 57), 2, dtype="float64"),
    "float64, far from zero": lambda: (
        call((1, 4, 200), 2, dtype="float64", mean=1e12, std=1.0),
        call((1, 2, 6000), 1, dtype="float64", mean=1e12, std=1.0, small=True),
    ),
    "float64, out of range": lambda: call((1, 4, 100), 2, dtype="float64", mean=0.0, std=1e200),
    "float64, ends of the range": ends_of_the_range,
    "far from zero": lambda: (
        call((2, 4, 300), 2, mean=1e6, std=1.0),
        call((1, 2, 9001), 1, mean=1e6, std=1.0, small=True),
    ),
    "out of range": lambda: (
        call((2, 4, 90), 2, mean=0.0, std=1e20),
        call((2, 4, 90), 2, mean=0.0, std=1e-25, eps=0.0),
    ),
    "slow beside fast": slow_beside_fast,
    "masked": lambda: call((2, 6, 35), 3, masked=True),
    "masked last": lambda: (
        call((2, 24, 37), 8, masked=True, last=True),
        call((1, 330, 37), 3, masked=True, last=True),
    ),
    "labels": lambda: call((2, 12, 35), LABELS, small=True),
    "tables by labels": lambda: (
        call((70, 48, 1), LABELS * 4),
        call((7, 48, 1), LABELS * 4, masked=True),
        call((7, 12, 1), LABELS, dtype="float64", mean=1e12, std=1.0),
    ),
    "backward, tables by labels": lambda: (
        call((40, 48, 1), LABELS * 4, backward=True, activation="silu"),
        call((7, 48, 1), LABELS * 4, dtype="float64", backward=True, masked=True),
    ),
    "order of channels": order_of_channels,
    "masks of other strides": masks_of_other_strides,
    "silu": lambda: call((2, 6, 35), 3, activation="silu"),
    "backward": lambda: call((40, 24, 41), 3, backward=True),
    "backward last": lambda: call((2, 24, 37), 8, backward=True, last=True),
    "backward, statistics given": lambda: call((3, 6, 35), 3, backward=True, given=True),
    # groups of 8 in float64, of 16 and 5 (no whole number of vectors) in the dtype's arithmetic
    "backward, one element a channel": lambda: (
        call((9, 64, 1), 8, backward=True),
        call((9, 64, 1), 8, backward=True, activation="silu"),
        call((9, 80, 1), 5, backward=True, activation="silu"),
        call((9, 60, 1), 12, dtype="float16", backward=True),
        call((9, 64, 1), 4, dtype="float16", backward=True),
    ),
    "backward, few elements across groups": lambda: call((9, 24, 1), 4, backward=True),
    "backward, out of range": lambda: call((2, 4, 64), 2, std=1e25, mean=0.0, backward=True),
    "backward float64, out of range": lambda: (
        call((1, 4, 100), 2, dtype="float64", mean=0.0, std=1e300, backward=True),
        call((1, 2, 6000), 1, dtype="float64", mean=0.0, std=1e300, backward=True, small=True),
    ),
    "tangent in a unit": tangent_in_a_unit,
    "backward last, few elements": lambda: call((9, 24, 3), 12, backward=True, last=True),
    "backward last silu": lambda: call((2, 24, 37), 8, backward=True, last=True, activation="silu"),
    "backward float16 last": lambda: call((2, 6, 35), 3, dtype="float16", backward=True, last=True, wide=False),
    "few elements, far from zero": lambda: call((9, 24, 1), 4, mean=1e6, std=1.0),
    # the second has 35 rows of partial sums, which two warps add up
    "backward, many samples": lambda: (
        call((9, 2050, 1), 2, backward=True),
        call((70, 2, 516), 2, backward=True),
    ),
    "backward split": lambda: (
        call((1, 2, 9001), 1, backward=True, small=True),
        call((2, 3, 14000), 3, backward=True, small=True),
    ),
    "backward split last": lambda: call((1, 24, 1201), 2, backward=True, small=True, last=True),
    "backward masked": lambda: (
        call((2, 6, 35), 3, backward=True, masked=True),
        call((2, 6, 57), 1, backward=True, masked=True, shift=1),
    ),
    "backward labels": lambda: (
        call((2, 12, 35), LABELS, backward=True, small=True, passes=3),
        call((1, 3, 40001), [0, 1, 0], backward=True, small=True, passes=3),
        # 12 parts a channel and 9 channels in a group: their sums are written by one warp and read by another
        call((1, 10, 36001), [0] * 9 + [1], dtype="float64", backward=True, small=True, passes=3),
    ),
    "backward silu": lambda: call((2, 6, 35), 3, backward=True, activation="silu"),
    # an odd number of 2-byte elements a channel: every second channel first
    "backward float16": lambda: call((4, 24, 35), 24, dtype="float16", backward=True),
    "double backward": lambda: double((2, 6, 57), 2),
    "double backward last": lambda: double((2, 24, 37), 8, last=True),
    "double backward silu": lambda: double((2, 6, 35), 3, activation="silu"),
    "double backward gelu": lambda: double((2, 6, 35), 3, activation="gelu_tanh", masked=True, last=True),
    "double backward split": lambda: (
        double((1, 2, 9001), 1, small=True),
        double((1, 24, 1201), 2, small=True, last=True, activation="gelu"),
    ),
    "double backward labels": lambda: (
        double((2, 12, 35), LABELS),
        double((1, 10, 25001), [0] * 9 + [1], small=True),
    ),
    "double backward, one element": lambda: double((3, 16, 1), 16),
    "one element": one_element,
    "subnormals": lambda: call((2, 4, 90), 2, mean=0.0, std=3e-44, eps=0.0),
    "subnormal weights": subnormal_weights,
    "same bits": same_bits,
    "far apart": far_apart,
}


# ---------------------------------------------------------------- the list

mutant(
    "samples are not clipped",
    "box.cuh",
    "Box(BOX_PARAMETERS",
    "(int)min((long long)samples, N - n0)",
    "samples",
    "first",
)
mutant(
    "rows are not clipped",
    "box.cuh",
    "Box(BOX_PARAMETERS",
    "(int)min((long long)rows, outer - o0)",
    "rows",
    "split last",
)
mutant(
    "columns are not clipped",
    "box.cuh",
    "Box(BOX_PARAMETERS",
    "(int)min((long long)columns, inner - i0)",
    "columns",
    "split",
)
mutant("channels are not clipped", "box.cuh", "Box(BOX_PARAMETERS", "min(channels, (", "max(channels, (", "aligned")
mutant(
    "a box starts at its own sample",
    "box.cuh",
    "Box(BOX_PARAMETERS",
    "(long long)(tile / row_tiles) * samples",
    "tile / row_tiles",
    "first",
)
mutant(
    "columns of a box start at zero",
    "box.cuh",
    "struct Global",
    "+ box.c0 * inner + box.i0",
    "+ box.c0 * inner",
    "split",
)
mutant("channels of a box start at zero", "box.cuh", "struct Global", "+ box.c0 * inner + box.i0", "+ box.i0", "split")
mutant("rows of a box start at zero", "box.cuh", "struct Global", " + box.o0 * so", "", "split last")
mutant(
    "parts of a group share a place", "box.cuh", "Box(BOX_PARAMETERS", "spatial_part * tiles_of_group + k", "k", "split"
)
mutant(
    "the distance from 16 bytes is lost", "box.cuh", "elements_past_16_bytes", "% (16 / sizeof(T))", "% 1", "misaligned"
)
mutant(
    "the places in shared memory forget their sample",
    "box.cuh",
    "struct Shared",
    "(n * nr + r) * row_step",
    "r * row_step",
    "first",
)
mutant(
    "samples at offsets of 32 bits",
    "box.cuh",
    "struct Global",
    "base + box.n0 * sn",
    "base + (int)(box.n0 * sn)",
    "far apart",
)
mutant(
    "samples of a box at offsets of 32 bits",
    "box.cuh",
    "struct Global",
    "origin + n * sn",
    "origin + (int)(n * sn)",
    "far apart",
)
mutant(
    "a mask at offsets of 32 bits",
    "box.cuh",
    "struct Mask",
    "from + n * sn",
    "from + (int)(n * sn)",
    "far apart",
)
mutant(
    "rows that lie apart are taken for aligned",
    "box.cuh",
    "void fill(const Global",
    "(int)(from.sn | from.so) & (V - 1)",
    "0",
    "rows apart",
)
mutant(
    "vectors are loaded several times",
    "box.cuh",
    "void fill(const Global",
    "v += blockDim.x) copy",
    "v += blockDim.x / 2) copy",
    "first",
)
mutant(
    "a vector before the box is loaded",
    "box.cuh",
    "void fill(const Global",
    "e >= 0 && e + V <= length",
    "e + V <= length",
    "misaligned",
)
mutant(
    "a vector across the end is loaded",
    "box.cuh",
    "void fill(const Global",
    "e + V <= length",
    "e <= length",
    "misaligned",
)
mutant(
    "one element past the end is loaded",
    "box.cuh",
    "void fill(const Global",
    "k < min(e + V, length)",
    "k <= min(e + V, length)",
    "misaligned",
)
mutant("the ends are not loaded", "box.cuh", "void fill(const Global", "if (rest) {", "if (false) {", "split")
mutant(
    "x is loaded element by element",
    "box.cuh",
    "void fill(const Global",
    "if (e >= 0 && e + V <= length) {",
    "if (false) {",
    "misaligned",
)
mutant("the mask of channel zero", "box.cuh", "struct Mask", "+ box.c0 * sc", "", "masked last")
mutant(
    "the mask forgets its row",
    "box.cuh",
    "struct Mask",
    "data[(n * nr + r) * width + q]",
    "data[n * nr * width + q]",
    "masked last",
)
mutant(
    "no barrier before the scratch is written",
    "box.cuh",
    "void team_sums(",
    "__syncthreads();  // the scratch",
    "// the scratch",
    "rows apart",
)
mutant(
    "no barrier before the scratch is read",
    "box.cuh",
    "scratch[k * MOST_WARPS + warp] = v[k];",
    "__syncthreads();",
    "",
    "split",
)
mutant(
    "every lane writes the scratch",
    "box.cuh",
    "void team_sums(",
    "if ((threadIdx.x & 31) == 0)",
    "",
    "split",
)
mutant("the last step of a warp's sum is missing", "box.cuh", "void sum_of_lanes(", "offset > 0", "offset > 1", "first")
mutant("a sum over the whole warp", "box.cuh", "void team_sums(", "min(team, 32)", "32", "tiny groups")
mutant(
    "the last warp is not added",
    "box.cuh",
    "void team_sums(",
    "sum_of_lanes(v, warps)",
    "sum_of_lanes(v, warps / 2)",
    "split",
)
mutant(
    "the second sum is the first",
    "box.cuh",
    "void team_sums(",
    "v[k] = scratch[k * MOST_WARPS + other]",
    "v[k] = scratch[other]",
    "backward split",
)
mutant(
    "a team asks its own warp only",
    "box.cuh",
    "bool any_of_team",
    "team > 32 ? __syncthreads_or(v) != 0 : __any_sync(0xffffffffu, v) != 0",
    "__any_sync(0xffffffffu, v) != 0",
    "rows apart",
)
mutant("chunks of a team overlap", "box.cuh", "void deal(", "j += STEPS * team", "j += STEPS * team - 1", "first")
mutant("chunks are an element apart", "box.cuh", "void deal(", "at.place * V", "at.place", "short rows")
mutant(
    "a short run is not added up",
    "box.cuh",
    "void deal(",
    "flush();",
    "if (j + STEPS * team < per_row) flush();",
    "float16",
)
mutant(
    "vectors where rows are no multiple of them",
    "box.cuh",
    "void walk(int rows",
    "run % VX == 0",
    "run >= VX",
    "tables",
)
mutant(
    "a vector has one channel",
    "box.cuh",
    "void apply_anywhere(",
    "ENTRIES == 2 && k >= here",
    "ENTRIES == 2 && k > VY",
    "first",
)
mutant(
    "channels in turn meet twice", "box.cuh", "int in_turn(", "2 * (i - half) + 1", "2 * (i - half)", "backward float16"
)
mutant("y is written past the box", "box.cuh", "void apply_anywhere(", "min(e + VY, length)", "e + VY", "misaligned")
mutant(
    "y is written element by element",
    "box.cuh",
    "void apply_anywhere(",
    "bool plain = first == e && last == e + VY",
    "bool plain = false",
    "split",
)
mutant(
    "channels of the vector before",
    "box.cuh",
    "void apply_anywhere(",
    "position < 0 || position != known",
    "known < 0",
    "first",
)
mutant(
    "a vector keeps entries of the next sample",
    "box.cuh",
    "void apply_anywhere(",
    ": one_sample ?",
    ": true ?",
    "ends of samples",
)
mutant(
    "half of y is not written",
    "box.cuh",
    "void apply_anywhere(",
    "v < count; v += stride",
    "v < count / 2; v += stride",
    "first",
)
mutant("a step into the next sample is missed", "box.cuh", "struct Place", "r = 0, ++n", "r = 0", "ends of samples")
mutant("quotients without their half", "box.cuh", "struct Divisor", "((float)n + 0.5f)", "((float)n)", "first")

mutant(
    "the variance about zero",
    "moments.cuh",
    "Moments moments_of",
    "v[j] - estimate : (real)0",
    "v[j] : (real)0",
    "first",
)
mutant(
    "the mean's rounding stays in the variance",
    "moments.cuh",
    "m.unit = unit",
    "total.b - total.a * (total.a / count)",
    "total.b",
    "far from zero",
)
mutant("masked elements enter the mean", "moments.cuh", "Moments moments_of", "if (!used[j]) v[j] = 0;", "", "masked")
mutant(
    "masked elements enter the variance",
    "moments.cuh",
    "Moments moments_of",
    "const real d = used[j] ?",
    "const real d = true ?",
    "masked",
)
mutant(
    "masked elements are counted",
    "moments.cuh",
    "Moments moments_of",
    "run_count += used[j]",
    "run_count += 1",
    "masked",
)
mutant(
    "no way out of float32's range",
    "moments.cuh",
    "#else\n  const bool slow",
    "!(total.b >= count * 0x1p-96 && total.b <= 0x1p+1000)",
    "false",
    "out of range",
)
mutant(
    "no scaling in float64",
    "moments.cuh",
    "walk_slowly(slow_rows",
    "wanted = to_unity(",
    "wanted = 0 * (",
    "float64, out of range",
)
mutant(
    "the mean's second part is dropped",
    "moments.cuh",
    "struct Centre",
    "(real)((s.mean - high) + s.low)",
    "(real)(s.mean - high)",
    "float64, far from zero",
)
mutant(
    "float32 loses the mean's remainder",
    "moments.cuh",
    "struct Centre",
    "low = (real)((s.mean - high) + s.low);",
    "low = (real)s.low;",
    "far from zero",
)
mutant("eps is forgotten", "moments.cuh", "double rstd(double eps)", "m2 / count + eps", "m2 / count", "tiny groups")
mutant(
    "parts weigh the same",
    "moments.cuh",
    "Moments merge_parts",
    "shifted = fma(m, d, shifted)",
    "shifted += d",
    "split",
)
mutant(
    "means of parts without their spread", "moments.cuh", "Moments merge_parts", "m * (d * d))", "0 * (d * d))", "split"
)
mutant(
    "parts are counted several times",
    "moments.cuh",
    "double elements = 0, shifted",
    "p += team",
    "p += 1",
    "split last",
)
mutant(
    "weights of the first channels",
    "moments.cuh",
    "void fill_scales",
    "p.weight, p.weight_dtype, box.c0 + c",
    "p.weight, p.weight_dtype, c",
    "split",
)
mutant(
    "the mean's second part is not loaded",
    "moments.cuh",
    "Statistic statistic_of(",
    "from.at(LOW, group)",
    "0",
    "float64, far from zero",
)

mutant(
    "the least numbers are in no unit",
    "moments.cuh",
    "double to_unity(",
    "if (largest < 0x1p-1000) return 0x1p+1000;",
    "if (largest < 0x1p-1000) return 1;",
    "float64, ends of the range",
)
mutant(
    "the largest numbers have the unit 0",
    "moments.cuh",
    "double to_unity(",
    "(2047ull << 52)",
    "(2046ull << 52)",
    "float64, ends of the range",
)
mutant(
    "eps leaves the range of the unit",
    "moments.cuh",
    "void fit(double eps)",
    "change_unit(0x1p+800)",
    "change_unit(1)",
    "float64, ends of the range",
)
mutant(
    "parts are taken to be in one unit",
    "moments.cuh",
    "Moments merge_parts",
    "REAL_IS_DOUBLE ? merged.unit / q[4] : 1",
    "1",
    "float64, ends of the range",
)
mutant(
    "x is not brought to the unit",
    "moments.cuh",
    "real centred(",
    "fma(x, e.unit, -e.high)",
    "x - e.high",
    "float64, ends of the range",
)

mutant("no barrier after x is loaded", "forward.cu", "    forward(BOX_PARAMETERS", "__syncthreads();", "", "first")
mutant(
    "no barrier after the statistics",
    "forward.cu",
    "rstd[at] = r * m.unit;",
    "__syncthreads();",
    "",
    "first",
)
mutant(
    "teams without a group write",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "if (u < units && lane == 0)",
    "if (lane == 0)",
    "first",
)
mutant(
    "every thread of a team writes",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "if (u < units && lane == 0)",
    "if (u < units)",
    "first",
)
mutant(
    "teams without a group read",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "u < units ? box.nr : 0",
    "box.nr",
    "tiny groups",
)
mutant(
    "statistics of the first sample",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "(box.n0 + n) * G",
    "n * G",
    "first",
)
mutant(
    "room for one sample's statistics",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "samples * (LABELLED ? G : max(1, channels / D))",
    "max(1, channels / D)",
    "tiny groups",
)
mutant(
    "blocks of 64 threads are the bound",
    "box.cuh",
    "#define FORWARD_BOUNDS",
    "LABELLED ? 256 : 512",
    "64",
    "first",
)
mutant("no barrier before moments", "forward.cu", "    moments(BOX_PARAMETERS", "__syncthreads();", "", "split")
mutant(
    "all parts write to one place",
    "forward.cu",
    "    moments(BOX_PARAMETERS",
    "box.parts + box.part)",
    "box.parts)",
    "split",
)
mutant(
    "groups that are not there are merged",
    "forward.cu",
    "    merge_moments(const double",
    "group < groups_of_all ? parts : 0",
    "parts",
    "split",
)
mutant(
    "labels are ignored",
    "forward.cu",
    "    merge_labels(const double",
    "order[bounds[g] + k]",
    "(bounds[g] + k)",
    "labels",
)
mutant("no barrier before y", "forward.cu", "    apply_statistics(BOX_PARAMETERS", "__syncthreads();", "", "split")

mutant(
    "dz is not weighted",
    "backward.cu",
    "struct Gradient",
    "dx = fma(e.scale, dz,",
    "dx = fma(e.rstd, dz,",
    "backward",
)
mutant(
    "dx stays in the group's unit",
    "backward.cu",
    "struct Gradient",
    "REAL_IS_DOUBLE ? dx * e.unit : dx",
    "dx",
    "backward float64, out of range",
)
mutant(
    "coefficients of dx are of x itself",
    "backward.cu",
    "coefficients_of(",
    "TANGENT ? rstd_in_unit * unit : rstd_in_unit",
    "rstd_in_unit * unit",
    "backward float64, out of range",
)
mutant(
    "a tangent's coefficients are in the group's unit",
    "backward.cu",
    "coefficients_of(",
    "TANGENT ? rstd_in_unit * unit : rstd_in_unit",
    "rstd_in_unit",
    "tangent in a unit",
)
mutant(
    "no barrier between boxes",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "if (i > 0) __syncthreads();  //",
    "if (false) ;  //",
    "backward, many samples",
)
mutant(
    "no barrier after x and dy are loaded",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "    __syncthreads();\n\n    const int units",
    "    const int units",
    "backward",
)
mutant(
    "no barrier before the sums",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "    __syncthreads();\n\n    const SumsOfChannels",
    "    const SumsOfChannels",
    "backward",
)
mutant(
    "no barrier after the sums",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "(channel_team, shared);\n    __syncthreads();",
    "(channel_team, shared);",
    "backward",
)
mutant(
    "no barrier before dx", "backward.cu", "set_coefficients(coefficients_of(sum", "__syncthreads();", "", "backward"
)
mutant(
    "sums of the last box only",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "box.nc, i > 0,",
    "box.nc, false,",
    "backward, many samples",
)
mutant(
    "coefficients before all sums are there",
    "backward.cu",
    "tables.held_sum(1, u) = sum.b;",
    "__syncthreads();",
    "",
    "backward",
)
mutant(
    "statistics before all moments are there",
    "backward.cu",
    "if (MASKED || LABELLED) work.counts[u] = m.count;",
    "__syncthreads();",
    "",
    "backward",
)
mutant(
    "vectors across groups",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "if (box.group_channels % COLUMNS == 0)",
    "if (true)",
    "backward, one element a channel",
)
mutant(
    "no slope at single elements",
    "backward.cu",
    "struct SumsOfChannels",
    "to_real<X_DTYPE>(vs.element[k]) * bend",
    "to_real<X_DTYPE>(vs.element[k])",
    "backward, one element a channel",
)
mutant(
    "no exact slope at single elements",
    "backward.cu",
    "struct SumsOfChannels",
    "exact_slope(x_hat, tables.scale(c))",
    "1",
    "backward, one element a channel",
)
mutant(
    "single elements of the wrong group",
    "backward.cu",
    "struct SumsOfChannels",
    "grouping.unit(n, c)",
    "grouping.of(c)",
    "backward, one element a channel",
)
mutant(
    "few elements about a rounded mean",
    "moments.cuh",
    "Moments moments_of",
    "few ? average : (double)estimate",
    "estimate",
    "few elements, far from zero",
)
mutant(
    "blocks share their partial sums",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "(long long)sample_block * C + c0",
    "c0",
    "backward, many samples",
)
mutant(
    "statistics that were given are ignored",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "rstd_given[(box.n0 + n) * G + box.g0 + (u - n * grouping.groups)] / m.unit",
    "m.rstd(eps)",
    "backward, statistics given",
)
mutant(
    "masked elements feel the statistics",
    "backward.cu",
    "struct Gradient",
    "values.used[k] ? along : (real)0",
    "along",
    "backward masked",
)
mutant(
    "no slope in the sums",
    "backward.cu",
    "struct SumChannels",
    "vs[k] * slope(fma(x_hat, scale(k).weight, scale(k).bias))",
    "vs[k]",
    "backward silu",
)
mutant(
    "the mean of dy stays",
    "backward.cu",
    "coefficients_of(",
    "-rstd * (sums.a / count)",
    "0",
    "backward",
)
mutant(
    "the elements' own part stays",
    "backward.cu",
    "coefficients_of(",
    "-rstd * (sums.b / count)",
    "0",
    "backward",
)
mutant(
    "one element feels rounding", "backward.cu", "void set_coefficients", "if (count == 1)", "if (false)", "one element"
)
mutant(
    "sums stay about the box's mean",
    "backward.cu",
    "    merge_backward(const int C",
    "sum_v_x_hat = fma(q[0], (box[0] * to_unit - m.mean) + (box[1] * to_unit - m.low), sum_v_x_hat * to_unit);",
    "",
    "backward split",
)
mutant(
    "sums stay in the box's units",
    "backward.cu",
    "    backward_sums(BOX_PARAMETERS",
    "sum.b / tables.statistic(c / box.group_channels).rstd",
    "sum.b",
    "backward split",
)
mutant(
    "no barrier before the parts' sums",
    "backward.cu",
    "    backward_sums(BOX_PARAMETERS",
    "(channel_team, shared);\n  __syncthreads();",
    "(channel_team, shared);",
    "backward split last",
)
mutant(
    "no barrier before dx of a part",
    "backward.cu",
    "    backward_apply(BOX_PARAMETERS",
    "__syncthreads();",
    "",
    "backward split",
)
mutant(
    "labels are not sorted",
    "backward.cu",
    "    merge_backward(const int C",
    "order[bounds[g] + k]",
    "(bounds[g] + k)",
    "backward labels",
)
mutant(
    "no barrier before labels are added",
    "backward.cu",
    "    merge_backward(const int C",
    "__syncthreads();  // the sums",
    "// the sums",
    "backward labels",
)
mutant("no barrier before rows are added", "backward.cu", "void add_rows", "__syncthreads();", "", "backward")
mutant(
    "a row in two is left out",
    "backward.cu",
    "void add_rows",
    "half = blockDim.x >> 6",
    "half = blockDim.x >> 7",
    "backward, many samples",
)
mutant("rows overlap", "backward.cu", "void add_rows", "r += parts", "r += parts - 1", "backward")
mutant(
    "channels that are not there",
    "backward.cu",
    "void add_rows",
    "if (part == 0 && c < C)",
    "if (part == 0)",
    "backward, one element a channel",
)

mutant(
    "no barrier after three arrays are loaded",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "  __syncthreads();",
    "",
    "double backward",
)
mutant(
    "masked elements enter the mean of u",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "if (mask.at(0, r, q0 + i + k)) {",
    "{",
    "double backward gelu",
)
mutant(
    "no curvature in the sums",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "dys[k] * curvature(z)",
    "dys[k]",
    "double backward silu",
)
mutant(
    "parts of the sums share a place",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "box.spatial_parts + box.spatial_part)",
    "box.spatial_parts)",
    "double backward split",
)
mutant(
    "sums of threads without a channel",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "if (c < box.nc && lane == 0)",
    "if (lane == 0)",
    "double backward",
)
mutant(
    "no barrier before sums of channels are added",
    "double_backward.cu",
    "    merge_second(const int C",
    "__syncthreads();  // the sums",
    "// the sums",
    "double backward labels",
)
mutant(
    "labels of the double backward are not sorted",
    "double_backward.cu",
    "    merge_second(const int C",
    "order[bounds[g] + k]",
    "(bounds[g] + k)",
    "double backward labels",
)
mutant(
    "u is not centred in gweight",
    "double_backward.cu",
    "    merge_second(const int C",
    "(of(k)[Z_U] - u_mean * of(k)[Z])",
    "of(k)[Z_U]",
    "double backward",
)
mutant(
    "gweight without the curvature",
    "double_backward.cu",
    "    merge_second(const int C",
    "fma(rstd, pushed(k), gz_x_hat(k))",
    "rstd * pushed(k)",
    "double backward silu",
)
mutant(
    "one part of the sums is left out",
    "double_backward.cu",
    "    merge_second(const int C",
    "int p = lane; p < spatial_parts",
    "int p = lane; p < spatial_parts - 1",
    "double backward split",
)
mutant(
    "u is not centred in gdy",
    "double_backward.cu",
    "struct Second",
    "to_real<X_DTYPE>(values.u.element[k]) - e.u_mean",
    "to_real<X_DTYPE>(values.u.element[k])",
    "double backward",
)
mutant(
    "masked elements feel the statistics twice",
    "double_backward.cu",
    "struct Second",
    "values.used[k] ? fma(e.of_u",
    "true ? fma(e.of_u",
    "double backward gelu",
)
mutant(
    "gdy without the slope",
    "double_backward.cu",
    "struct Second",
    "return gdz * act;",
    "return gdz;",
    "double backward silu",
)
mutant(
    "ddweight is not in gx",
    "double_backward.cu",
    "struct Second",
    "fma(-g.true_rstd * g.u_along, w, ddw)",
    "(-g.true_rstd * g.u_along * w)",
    "double backward",
)
mutant(
    "x_hat meets u once",
    "double_backward.cu",
    "    second_apply(BOX_PARAMETERS",
    "2 * (value(U_ALONG) * value(Q_ALONG))",
    "(value(U_ALONG) * value(Q_ALONG))",
    "double backward",
)
mutant(
    "no barrier before gdy",
    "double_backward.cu",
    "    second_apply(BOX_PARAMETERS",
    "  __syncthreads();",
    "",
    "double backward",
)
mutant(
    "one element moves against its mean",
    "double_backward.cu",
    "    second_apply(BOX_PARAMETERS",
    "alone ? 0 :",
    "false ? 0 :",
    "double backward, one element",
)
mutant(
    "the curvature of another gate",
    "activation.cuh",
    "real curvature(",
    "gate.down - gate.up",
    "gate.up - gate.down",
    "double backward silu",
)
mutant("bfloat16 is cut off", "types.cuh", "float_to_bfloat", "u + 0x7fffu + ((u >> 16) & 1u)", "u", "bfloat16")
mutant(
    "float16 bits are shifted too far",
    "types.cuh",
    "bfloat_to_float",
    "(unsigned)b << 16",
    "(unsigned)b << 15",
    "bfloat16",
)
mutant(
    "subnormals are flushed",
    "types.cuh",
    "double widen(float f)",
    'asm("cvt.f64.f32 %0, %1;" : "=d"(d) : "f"(f));',
    "d = (double)f;",
    "subnormals",
)
mutant(
    "weights of the wrong dtype",
    "types.cuh",
    "double load_any",
    "case FLOAT32: return widen(((const float*)p)[i]);",
    "case FLOAT32: return ((const double*)p)[i];",
    "first",
)
mutant("the sigmoid overflows", "activation.cuh", "struct Sigmoid", "exponential(-fabs(t))", "exponential(-t)", "silu")

# ---------------------------------------------------------------- copies, steps, columns, lines, what is held

mutant(
    "nobody waits for the copies",
    "types.cuh",
    "void copies_arrived()",
    'asm volatile("cp.async.wait_all;" : : : "memory");',
    "",
    "first",
)
mutant(
    "forward does not wait for its copies", "forward.cu", "    forward(BOX_PARAMETERS", "copies_arrived();", "", "last"
)
mutant(
    "moments does not wait for its copies", "forward.cu", "    moments(BOX_PARAMETERS", "copies_arrived();", "", "split"
)
mutant(
    "backward does not wait for its copies",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "copies_arrived();",
    "",
    "backward last",
)
mutant(
    "the last vector of a stretch is not loaded",
    "box.cuh",
    "void fill(const Global",
    "v < vectors; v += blockDim.x",
    "v < vectors - 1; v += blockDim.x",
    "first",
)
mutant(
    "rows are copied over each other",
    "box.cuh",
    "void fill(const Global",
    "data + at.row * row_step + at.place * V, from",
    "data + at.place * V, from",
    "masked last",
)
mutant(
    "an element of the rest is left out",
    "box.cuh",
    "void fill(const Global",
    "i < segments * rest",
    "i < segments * rest - 1",
    "split",
)
mutant(
    "shifted vectors lie an element off",
    "box.cuh",
    "void fill(const Global",
    "store_anywhere(to + e,",
    "store_anywhere(to + e + 1,",
    "misaligned",
)
mutant(
    "a shifted word is another one",
    "box.cuh",
    "void store_anywhere(",
    "j == 2 ? words[2]",
    "j == 2 ? words[1]",
    "misaligned",
)
mutant(
    "odd places lose their first element", "box.cuh", "void store_anywhere(", "p[0] = pack.element[0];", "", "float16"
)
mutant(
    "a step passes the end of its row", "box.cuh", "void next()", "place >= per_row", "place > per_row", "masked last"
)
mutant("a step forgets its rows", "box.cuh", "void next()", "row += rows;", "", "masked last")
mutant(
    "a short run takes elements of others",
    "box.cuh",
    "void deal(",
    "if (u == 0 || j + u * team < per_row)",
    "",
    "float16",
)
mutant("the next one begins without its row", "box.cuh", "void next()", "++row;", "", "last")
mutant(
    "columns are summed up by halves",
    "box.cuh",
    "void sum_columns(",
    "step = sharing * slots_of_warp",
    "step = 2 * sharing * slots_of_warp",
    "backward last",
)
mutant(
    "no barrier between those who share columns",
    "box.cuh",
    "void sum_columns(",
    "if (other) __syncthreads();",
    "",
    "backward, one element a channel",
)
mutant(
    "sums of columns lose those before",
    "box.cuh",
    "void sum_columns(",
    "other || more ? at(",
    "more ? at(",
    "backward, one element a channel",
)
mutant(
    "lanes of a column are not added",
    "box.cuh",
    "void sum_columns(",
    "offset >= lanes; offset >>= 1",
    "offset > lanes; offset >>= 1",
    "backward last",
)
mutant(
    "a line forgets where it starts",
    "box.cuh",
    "bool apply_in_lines(",
    "slot * lanes + units.lane",
    "units.lane",
    "aligned",
)
mutant(
    "teams skip units",
    "box.cuh",
    "bool apply_in_lines(",
    "unit += units.teams) {\n      const int run",
    "unit += 2 * units.teams) {\n      const int run",
    "out of range, aligned",
)
mutant(
    "columns of rows are skipped",
    "box.cuh",
    "bool apply_in_lines(",
    "line<SLOW>(op, entry, slot, box.nr, units.slots",
    "line<SLOW>(op, entry, slot, box.nr, 2 * units.slots",
    "last aligned",
)
mutant(
    "what goes to float64 is left out",
    "box.cuh",
    "void apply(const Op& op",
    "if (op.all_slow() || apply_in_lines<false>(op, out, box))",
    "apply_in_lines<false>(op, out, box); if (false)",
    "slow beside fast",
)
mutant(
    "all channels of a vector are in one group",
    "box.cuh",
    "bool apply_in_lines(",
    "one_group = one_group && group_of[k] == group_of[0]",
    "one_group = true",
    "tables",
)
mutant("the channels of the first vector", "box.cuh", "void look_up(", "place.step(box);", "", "last aligned")
mutant(
    "a slow element is taken for a fast one",
    "box.cuh",
    "bool line(",
    "plain = plain && !op.slow(entry[k])",
    "plain = plain",
    "out of range, aligned",
)
mutant(
    "the second element of a slow vector is the first",
    "box.cuh",
    "void apply_slowly(",
    "place.step(box);",
    "",
    "rows apart",
)
mutant(
    "the mean is held as the variance",
    "moments.cuh",
    "void hold(int u",
    "exact[units + u] = m.m2 / m.count;",
    "exact[units + u] = m.mean;",
    "first",
)
mutant(
    "the second part of the mean is not held",
    "moments.cuh",
    "void hold(int u",
    "group(1, u) = (real)m.low;",
    "group(1, u) = 0;",
    "float64, far from zero",
)
mutant(
    "both held sums are in one place",
    "moments.cuh",
    "double& held_sum(",
    "(2 + which) * units",
    "2 * units",
    "backward",
)
mutant(
    "rstd is never in need of squares",
    "backward.cu",
    "bool usual_rstd(",
    "rstd > 0x1p-48 && rstd < 0x1p+48",
    "true",
    "backward",
)
mutant(
    "partial sums are read from the row before",
    "backward.cu",
    "void add_rows(",
    "partial[2 * ((long long)r * C + c)];",
    "partial[2 * ((long long)max(r - 1, 0) * C + c)];",
    "backward",
)
mutant(
    "backward_sums does not wait for its copies",
    "backward.cu",
    "    backward_sums(BOX_PARAMETERS",
    "copies_arrived();",
    "",
    "backward split",
)
mutant(
    "second_sums does not wait for its copies",
    "double_backward.cu",
    "    second_sums(BOX_PARAMETERS",
    "copies_arrived();",
    "",
    "double backward",
)
mutant(
    "second_apply does not wait for its copies",
    "double_backward.cu",
    "    second_apply(BOX_PARAMETERS",
    "copies_arrived();",
    "",
    "double backward",
)
mutant(
    "no barrier after the boxes of two arrays",
    "backward.cu",
    "    backward_sums(BOX_PARAMETERS",
    "copies_arrived();\n  __syncthreads();",
    "copies_arrived();",
    "backward split",
)
mutant(
    "no barrier before a thread takes a group",
    "forward.cu",
    "tables.hold(u, m);",
    "__syncthreads();",
    "",
    "first",
)
mutant(
    "the last row is not loaded",
    "box.cuh",
    "void fill(const Global",
    "at.row < segments; at.next()) {\n          const",
    "at.row < segments - 1; at.next()) {\n          const",
    "last",
)
mutant(
    "the last row off the vectors is not loaded",
    "box.cuh",
    "void fill(const Global",
    "at.row < segments; at.next()) {\n      const",
    "at.row < segments - 1; at.next()) {\n      const",
    "rows apart",
)
mutant(
    "rows are counted over all samples",
    "box.cuh",
    "void fill(const Global",
    "at.row - n * rows_of_sample) + at.place * V",
    "at.row) + at.place * V",
    "last",
)
mutant(
    "the ends of rows are copied over each other",
    "box.cuh",
    "void fill(const Global",
    "data[s * row_step + e] =",
    "data[e] =",
    "rows with ends",
)
mutant(
    "the ends are taken from the beginning",
    "box.cuh",
    "void fill(const Global",
    "e = vectors * V + i - s * rest",
    "e = i - s * rest",
    "split",
)
mutant(
    "a vector too few where heads are apart",
    "box.cuh",
    "void fill(const Global",
    "(length + 2 * V - 2) / V;",
    "(length + V - 1) / V;",
    "misaligned",
)
mutant(
    "a step into the next row begins at zero",
    "box.cuh",
    "void next()",
    "place -= per_row;",
    "place = 0;",
    "last",
)
mutant(
    "a step is longer than it is",
    "box.cuh",
    "struct Stepper",
    "places = step - rows * per_row;",
    "places = step;",
    "last",
)
mutant(
    "a step starts in the first row",
    "box.cuh",
    "struct Stepper",
    "row = by_row.quotient(i);",
    "row = 0;",
    "last",
)
mutant(
    "a row's chunks are an element apart",
    "box.cuh",
    "void deal(",
    "(j + u * team) * V",
    "(j + u * team)",
    "aligned",
)
mutant(
    "the last row is not added up",
    "box.cuh",
    "void deal(",
    "while (at.row < rows)",
    "while (at.row < rows - 1)",
    "last aligned",
)
mutant(
    "a short run goes on behind the last row",
    "box.cuh",
    "void deal(",
    "u < STEPS && (u == 0 || at.row < rows)",
    "u < STEPS",
    "last",
)
mutant(
    "the last chunk is not added up",
    "box.cuh",
    "void deal(",
    "j < per_row; j += STEPS",
    "j < per_row - 1; j += STEPS",
    "first",
)
mutant(
    "half vectors where rows are no multiple of them",
    "box.cuh",
    "void walk(int rows",
    "run % (VX / 2) == 0",
    "run >= VX",
    "backward",
)
mutant(
    "sums of columns lose those of other boxes",
    "box.cuh",
    "void sum_columns(",
    "other || more ?",
    "other ?",
    "backward, many samples",
)
mutant(
    "lanes of a column are added by halves",
    "box.cuh",
    "void sum_columns(",
    "offset = 16; offset >= lanes",
    "offset = 8; offset >= lanes",
    "backward last",
)
mutant(
    "sharers begin in each other's rows",
    "box.cuh",
    "void sum_columns(",
    "share * slots_of_warp + lane / lanes",
    "share + lane / lanes",
    "backward, one element a channel",
)
mutant(
    "columns that are not there",
    "box.cuh",
    "void sum_columns(",
    "unit < units && v < vectors",
    "unit < units",
    "backward, many samples",
)
mutant(
    "samples that are not there have columns",
    "box.cuh",
    "void sum_columns(",
    "place < at_once && unit < units &&",
    "place < at_once &&",
    "backward last",
)
mutant(
    "columns of the first line",
    "box.cuh",
    "void sum_columns(",
    "(unit - n * lines) * lanes",
    "(unit - unit) * lanes",
    "backward last",
)
mutant(
    "all sharers write at once",
    "box.cuh",
    "void sum_columns(",
    "&& share == other)",
    ")",
    "backward, one element a channel",
)
mutant(
    "the batch decides who shares columns",
    "box.cuh",
    "void sum_columns(",
    "warps / (most_samples * lines)",
    "warps / (samples * lines)",
    "same bits",
)
mutant(
    "columns side by side are in one group",
    "backward.cu",
    "void by_columns()",
    "grouping.unit(n, c + k);",
    "grouping.unit(n, c);",
    "backward last",
)
mutant(
    "columns side by side have one weight",
    "backward.cu",
    "void by_columns()",
    "tables.scale(c + k);",
    "tables.scale(c);",
    "backward last silu",
)
mutant(
    "columns of few elements stay in float32",
    "backward.cu",
    "void by_columns()",
    "plain && tables.in_reals(u) &&",
    "plain &&",
    "backward last, few elements",
)
mutant(
    "columns in float64 are the first ones",
    "backward.cu",
    "void by_columns()",
    "slowly(n, r, c + k,",
    "slowly(n, r, c,",
    "backward last, few elements",
)
mutant(
    "channels out of range stay in float32",
    "backward.cu",
    "void by_teams(",
    "tables.in_reals(u) && in_reals(scale)",
    "in_reals(scale)",
    "backward, out of range",
)
mutant(
    "every second sample is skipped",
    "box.cuh",
    "bool apply_in_lines(",
    "place.n += units.slots",
    "place.n += 2 * units.slots",
    "tables",
)
mutant(
    "groups of the first sample",
    "box.cuh",
    "bool apply_in_lines(",
    "of_sample = place.n * op.grouping.groups",
    "of_sample = 0",
    "tables",
)
mutant(
    "a vector has one weight",
    "box.cuh",
    "bool apply_in_lines(",
    "scale[k] = op.scale(next.c)",
    "scale[k] = op.scale(c)",
    "tables",
)
mutant(
    "vectors behind the end of a row",
    "box.cuh",
    "bool apply_in_lines(",
    "if (v >= vectors) continue;",
    "",
    "tables",
)
mutant(
    "slow samples are left out",
    "box.cuh",
    "bool apply_in_lines(",
    "left |= line<SLOW>(op, entry, 0, 1, 1",
    "line<SLOW>(op, entry, 0, 1, 1",
    "out of range, tables",
)
mutant(
    "units of a run overlap",
    "box.cuh",
    "bool apply_in_lines(",
    "vectors, units.slots * lanes, aligned",
    "vectors, lanes, aligned",
    "aligned",
)
mutant(
    "a line ends too late",
    "box.cuh",
    "bool line(",
    "if (v + u * step >= end) break;",
    "",
    "aligned",
)
mutant(
    "a vector has one entry",
    "box.cuh",
    "bool line(",
    "entry[ENTRIES == VY ? k : 0], values[u]",
    "entry[0], values[u]",
    "last aligned",
)
mutant(
    "nothing is left to float64",
    "box.cuh",
    "bool line(",
    "if (!plain) return true;",
    "if (!plain) return false;",
    "slow beside fast",
)
mutant(
    "x is taken for as aligned as y",
    "box.cuh",
    "bool line(",
    "plain = aligned && !op.all_slow()",
    "plain = !op.all_slow()",
    "x off the vectors of y",
)
mutant(
    "x is taken for as aligned as y, anywhere",
    "box.cuh",
    "void apply_anywhere(",
    "op.aligned_at(from, e));",
    "true);",
    "x off the vectors of y",
)
mutant(
    "a slow vector is written elsewhere",
    "box.cuh",
    "void store_slowly(",
    "box, from, to - q);",
    "box, from, to);",
    "slow beside fast",
)
mutant(
    "ends are written as vectors",
    "box.cuh",
    "void apply_anywhere(",
    "first == e && last == e + VY, box, from",
    "true, box, from",
    "misaligned",
)
mutant(
    "the last slow element is not written",
    "box.cuh",
    "void apply_slowly(",
    "k < last; ++k",
    "k < last - 1; ++k",
    "misaligned",
)
mutant(
    "slow elements are done in float32",
    "box.cuh",
    "void apply_slowly(",
    "op.slow(one) ?",
    "false ?",
    "slow beside fast",
)
mutant(
    "16-bit elements are pushed too far",
    "box.cuh",
    "void push(",
    "vector.z >> 16 | vector.w << 16",
    "vector.z",
    "out of range, bfloat16",
)
mutant(
    "a vector in float64 has one channel",
    "box.cuh",
    "void mixed_vector(",
    "place.step(box);",
    "",
    "backward, few elements across groups",
)
mutant(
    "a vector in float64 has one group",
    "box.cuh",
    "void mixed_vector(",
    "if (other != unit) {",
    "if (unit < 0) {",
    "backward, few elements across groups",
)
mutant(
    "entries that are not kept are of one channel",
    "box.cuh",
    "void apply_anywhere(",
    "op.scale(next.c)",
    "op.scale(place.c)",
    "backward float16 last",
)
mutant(
    "entries that are not kept are of one group",
    "box.cuh",
    "one = ENTRIES == 2",
    "if (other != unit) group",
    "if (unit < 0) group",
    "backward float16 last",
)
mutant(
    "mean and variance change places",
    "moments.cuh",
    "Moments held(",
    "{1, exact[u], group(1, u), exact[units + u], 1}",
    "{1, exact[units + u], group(1, u), exact[u], 1}",
    "first",
)
mutant(
    "the sum of the squares is held as their mean",
    "moments.cuh",
    "void hold(int u",
    "group(2, u) = m.m2 / m.count;",
    "group(2, u) = m.m2;",
    "float64",
)
mutant(
    "float64 finds no mean",
    "moments.cuh",
    "void set(int u, const Statistic",
    "if (mean) exact[u] = s.mean;",
    "",
    "out of range, split",
)
mutant(
    "coefficients in float64 change places",
    "moments.cuh",
    "void set_exact_coefficient(",
    "exact[3 * units + u] = coefficient.offset",
    "exact[3 * units + u] = coefficient.along",
    "backward, few elements across groups",
)
mutant(
    "no room for held sums",
    "moments.cuh",
    "Tables(double* p",
    "(2 + coefficients) * units",
    "2 * units",
    "backward",
)
mutant(
    "rstd out of range stays in float32",
    "moments.cuh",
    "real in_range(",
    "(size <= FLOAT_RANGE && size >= 1 / FLOAT_RANGE)",
    "true",
    "backward, out of range",
)
mutant(
    "small weights are flushed",
    "moments.cuh",
    "real safe_weight(",
    "size != 0 && size <",
    "false && size <",
    "subnormal weights",
)
mutant(
    "a vector's mean is of its half",
    "moments.cuh",
    "Moments moments_of",
    "int half = K / 2; half > 0",
    "int half = K / 4; half > 0",
    "first",
)
mutant(
    "float32's mean stays rounded",
    "moments.cuh",
    "Moments moments_of",
    "total.a = (average - estimate) * count;",
    "total.a = 0;",
    "far from zero",
)
mutant(
    "partial sums of another dtype",
    "backward.cu",
    "    parameter_gradients(const",
    "if (doubles)",
    "if (!doubles)",
    "backward",
)
mutant(
    "dweight and dbias change places",
    "backward.cu",
    "void add_rows(",
    "store_any(dweight, dtype, (long long)c * step, sum_v_x_hat)",
    "store_any(dweight, dtype, (long long)c * step, sum_v)",
    "backward",
)
mutant(
    "subnormals are flushed when rounded",
    "types.cuh",
    "float narrow(double d)",
    'asm("cvt.rn.f32.f64 %0, %1;" : "=f"(f) : "d"(d));',
    "f = (float)d;",
    "subnormal weights",
)


# ---------------------------------------------------------------- running them
mutant(
    "all channels have one label", "box.cuh", "struct Grouping", "return labels[c];", "return 0;", "tables by labels"
)
mutant(
    "channels are not in the order of labels",
    "box.cuh",
    "struct Grouping",
    "return order[bounds[g] + k];",
    "return bounds[g] + k;",
    "tables by labels",
)
mutant(
    "room for one label group",
    "forward.cu",
    "    forward(BOX_PARAMETERS",
    "samples * (LABELLED ? G : max(1, channels / D))",
    "samples * max(1, channels / D)",
    "tables by labels",
)
mutant(
    "label sums in the order of the channels",
    "box.cuh",
    "struct AnyOrder",
    "cut = (v + first) - first",
    "cut = v",
    "order of channels",
)
mutant(
    "label sums are cut once",
    "box.cuh",
    "struct AnyOrder",
    "sums.b += (rest + second) - second;",
    "",
    "tables by labels",
)
mutant(
    "masked elements enter the moments of a label",
    "moments.cuh",
    "Moments moments_of_label(",
    "if (!used(c)) continue;\n    const double d",
    "const double d",
    "tables by labels",
)
mutant(
    "a label's mean is rounded",
    "moments.cuh",
    "Moments moments_of_label(",
    "two_sum(centre, left / m.count, m.mean, m.low);",
    "m.mean = centre, m.low = 0;",
    "tables by labels",
)
mutant(
    "masked elements of a label are counted",
    "moments.cuh",
    "Moments moments_of_label(",
    "m.count = MASKED ? team_sum(elements, team, scratch) : channels;",
    "m.count = channels;",
    "tables by labels",
)
mutant(
    "weights are left out of the sums of a label",
    "backward.cu",
    "    backward(BOX_PARAMETERS",
    "return Pair{w * one[0].a, w * one[0].b};",
    "return one[0];",
    "backward, tables by labels",
)
mutant(
    "channels of a vector have the label of the first",
    "backward.cu",
    "struct SumsOfChannels",
    "if constexpr (LABELLED && K > 1)",
    "if constexpr (false)",
    "backward, tables by labels",
)
mutant(
    "words of a mask that begin anywhere",
    "box.cuh",
    "struct Mask",
    "(step == 1 && aligned)",
    "step == 1",
    "masks of other strides",
)
mutant(
    "a mask of positions is one of channels",
    "box.cuh",
    "struct Mask",
    "*p * 0x01010101u",
    "*p",
    "masks of other strides",
)
mutant(
    "words across the rows of a mask",
    "box.cuh",
    "struct Mask",
    "columns || box.ncol == 1",
    "true",
    "masks of other strides",
)
mutant(
    "several elements of a mask at once, anywhere",
    "box.cuh",
    "struct Mask",
    "aligned || at % K == 0",
    "true",
    "backward masked",
)
mutant(
    "a mask's last words",
    "box.cuh",
    "struct Mask",
    "if (e < count) reinterpret",
    "if (e + 1 < count) reinterpret",
    "masked",
)


def verdict(one: Mutant) -> mutants.Verdict:
    """Change the engine's source, and run the checks until one fails."""
    unchanged = cuda.source

    def changed(file: str) -> str:
        text = unchanged(file)
        start = text.find(f'#line 1 "{one.file}"')
        if start < 0:
            return text
        end = text.find("#line 1 ", start + 1)
        end = len(text) if end < 0 else end
        return text[:start] + mutants.applied(one, text[start:end]) + text[end:]

    cuda.source = changed
    cuda._kernels.clear()
    try:
        return mutants.killer_of(one, CHECKS)
    finally:
        cuda.source = unchanged
        cuda._kernels.clear()


COMMAND = (sys.executable, __file__, "--work")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        mutants.work(sys.argv[2:], MUTANTS, verdict)
    else:
        mutants.main(COMMAND, sys.argv[1:] or [m.name for m in MUTANTS])
