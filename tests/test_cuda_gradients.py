"""The jvp, the double backward and the moments on the CUDA engine, and the gradients of images, on the emulator.

The oracle is `cugn.reference` in float64 of the same values (held against mpmath in test_reference.py), and torch's
autograd. Every access is checked, in more than one order of execution (simt/README.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import simt
from covering import pairwise
from cuda_on_cpu import NEEDED, emulated
from libraries import FLOATS, dtype_of
from simt import host_cupy

import cugn
from cugn import cuda, reference
from cugn.engines import resolve

pytestmark = NEEDED

SMALL = host_cupy.Properties(
    "48 KiB a block", major=7, minor=5, shared_opt_in=48 << 10, shared_per_multiprocessor=64 << 10
)
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")
LABELS = (0, 1, 0, 2, 2, 2)


class Inputs(NamedTuple):
    """Arrays of a call: x, two like it, and four of a channel."""

    x: np.ndarray
    u: np.ndarray
    v: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    where: np.ndarray | None


def inputs(shape: tuple[int, ...], dtype: str, masked: bool = False, x_dtype: str | None = None) -> Inputs:
    rng = np.random.default_rng(sum(shape))
    x = rng.normal(3, 2, shape)
    x = x.astype(dtype_of(dtype)) if x_dtype is None else (20 * x).clip(0, 120).astype(x_dtype)
    u, v = (rng.normal(size=shape).astype(dtype_of(dtype)) for _ in range(2))
    channels = (rng.normal(size=shape[1]).astype(dtype_of(dtype)) for _ in range(4))
    return Inputs(x, u, v, *channels, rng.random(shape) < 0.7 if masked else None)


def close(found: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    """Rounded once from float64, in which sums of a few thousand products lose some bits."""
    expected = np.asarray(expected)
    assert found.dtype == dtype_of(dtype), what
    error = np.abs(found.astype(np.float64) - expected)
    scale = np.abs(expected).max(initial=0)
    # 2^-44: the terms are up to 16 times the result, and their sums lose 4 bits
    bound = 1.01 * oracle.half_ulp(expected, dtype_of(dtype)).astype(np.float64) + 2.0**-44 * scale
    assert (error <= bound).all(), f"{what}: {float((error / np.maximum(bound, 1e-300)).max()):.3g} times the bound"


def expected_double(case: Inputs, groups: Any, activation: str | None, given: bool) -> tuple[np.ndarray, ...]:
    """gdy, gx, gweight, gbias in float64."""
    x, u, v, weight, bias, dweight, dbias = (a.astype(np.float64) for a in case[:7])
    if not given:
        weight = bias = dweight = dbias = None
    operands = [("ddx", u), ("dy", v), ("weight", weight), ("bias", bias), ("where", case.where)]
    plan = resolve("double_backward", x, groups, operands, 1e-5, 1, 0, activation)[1]
    return reference.double_backward(plan, u, v, x, weight, bias, dweight, dbias, case.where)


def check_double(
    case: Inputs,
    groups: Any,
    *,
    activation: str | None = None,
    last: bool = False,
    given: bool = True,
    devices: tuple[Any, ...] = (),
    **settings: Any,
) -> list[simt.Launch]:
    """One call against the reference; returns its launches."""
    turn = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)
    expected = expected_double(case, groups, activation, given)
    with emulated(*devices, **settings) as library, simt.recorded() as launches:
        x, u, v = (library.array(turn(a)) for a in case[:3])
        weight, bias, dweight, dbias = (library.array(a) if given else None for a in case[3:7])
        where = None if case.where is None else library.array(turn(case.where))
        result = cugn.group_norm_double_backward(
            *(u, v, x, groups, weight, bias),
            ddweight=dweight,
            ddbias=dbias,
            where=where,
            activation=activation,
            channel_axis=-1 if last else 1,
        )
        found = [library.numpy(a) for a in (*result, result.gbias)]
    if last:
        found[:2] = (np.moveaxis(a, -1, 1) for a in found[:2])
    for name, value, wanted in zip(("gdy", "gx", "gweight", "gbias"), found, expected, strict=True):
        close(value, wanted, case.u.dtype.name, f"{name}, {case.x.shape}, {groups}, {activation}, {last=}")
    return launches


SHAPES = [
    ((3, 6, 5, 7), 3),
    ((2, 8, 1, 1), 4),
    ((5, 8), 2),
    ((2, 64), 32),
    ((2, 6, 3, 3), 6),
    ((2, 6, 17), 1),
    ((1, 96, 4), 32),
    ((1, 1, 1), 1),
    ((1, 2, 31, 103), 2),
]


@pytest.mark.parametrize(("problem", "dtype", "last"), pairwise(SHAPES, FLOATS, (False, True)), ids=str)
def test_double_backward(problem: tuple[tuple[int, ...], int], dtype: str, last: bool) -> None:
    """Every dtype, layout and kind of shape, in two orders of execution."""
    shape, groups = problem
    case = inputs(shape, dtype)
    for seed in (0, 1 + sum(shape)):
        check_double(case, groups, last=last, seed=seed)


@pytest.mark.parametrize(
    ("activation", "masked", "groups", "last", "given"),
    pairwise(ACTIVATIONS, (False, True), (3, LABELS), (False, True), (True, False)),
    ids=str,
)
def test_options_of_double_backward(activation: str | None, masked: bool, groups: Any, last: bool, given: bool) -> None:
    """Activations, masks, labels and absent parameters."""
    case = inputs((2, 6, 5, 7), "float64", masked)
    groups = list(groups) if isinstance(groups, tuple) else groups
    check_double(case, groups, activation=activation, last=last, given=given)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_double_backward_of_large_groups(activation: str | None, last: bool) -> None:
    """Groups over several blocks, of equal size and labelled: x is read three times, dy and ddx twice."""
    for shape, groups in (((1, 4, 9001), 2), ((2, 24, 1201), 2), ((1, 3, 8001), [0, 1, 0])):
        case = inputs(shape, "float32")
        launches = check_double(case, groups, activation=activation, last=last, devices=(SMALL,), seed=5)
        flows: dict[str, int] = {}
        for launch in launches:
            for name, buffer in launch.buffers.items():
                flows[name] = flows.get(name, 0) + buffer.read.bytes + buffer.write.bytes
        size = case.x.nbytes
        assert flows["x"] <= 1.02 * 3 * size
        assert flows["dy"] <= 1.02 * 2 * size
        assert flows["ddx"] <= 1.02 * 2 * size
        assert flows["gdy"] == flows["gx"] == size
        for launch in launches:
            for name in ("x", "dy", "ddx", "gdy", "gx"):
                if name in launch.buffers:
                    flow = launch.buffers[name].read if name in ("x", "dy", "ddx") else launch.buffers[name].write
                    assert flow.efficiency >= 0.9, (launch.kernel, name)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_order_of_execution_and_batch_change_no_bit_of_the_double_backward(dtype: str) -> None:
    """Blocks and threads in other orders: the same bits; gdy and gx of a sample alone: the same bits."""
    case = inputs((5, 8, 33), dtype)
    found = set()
    for seed in range(4):
        with emulated(mode="fast", seed=seed) as library:
            X, U, V, W = (library.array(a) for a in case[:4])
            result = cugn.group_norm_double_backward(U, V, X, 4, W, activation="gelu")
            found.add(tuple(library.numpy(a).tobytes() for a in (*result, result.gbias)))
            one = cugn.group_norm_double_backward(U[2:3], V[2:3], X[2:3], 4, W, activation="gelu")
            for of_one, of_all in zip(one[:2], result[:2], strict=True):
                assert library.numpy(of_one).tobytes() == library.numpy(of_all[2:3]).tobytes()
    assert len(found) == 1


def test_permuted_labels_permute_the_double_backward() -> None:
    """Channels and labels in another order: gdy and gx are permuted, to the bit."""
    case, order = inputs((2, 6, 35), "float32"), np.random.default_rng(0).permutation(6)
    with emulated(mode="fast") as library:

        def result(of: np.ndarray) -> list[np.ndarray]:
            X, U, V = (library.array(np.ascontiguousarray(a[:, of])) for a in case[:3])
            W, D = library.array(case.weight[of]), library.array(case.dweight[of])
            labels = [LABELS[c] for c in of]
            found = cugn.group_norm_double_backward(U, V, X, labels, W, ddweight=D)
            return [library.numpy(a) for a in found[:2]]

        for permuted, plain in zip(result(order), result(np.arange(6)), strict=True):
            assert permuted.tobytes() == np.ascontiguousarray(plain[:, order]).tobytes()


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
def test_double_backward_is_torchs(activation: str | None) -> None:
    """Against autograd of autograd."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    act = {
        None: lambda z: z,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    }[activation]
    case = inputs((2, 6, 35), "float64")
    tensors = [torch.tensor(a, requires_grad=True) for a in (case.v, case.x, case.weight, case.bias)]
    y = act(torch.nn.functional.group_norm(tensors[1], 3, tensors[2], tensors[3]))
    first = torch.autograd.grad(y, tensors[1:], tensors[0], create_graph=True)
    scalar = sum((a * torch.tensor(b)).sum() for a, b in zip(first, (case.u, case.dweight, case.dbias), strict=True))
    second = torch.autograd.grad(scalar, tensors, allow_unused=True)
    with emulated() as library:
        x, u, v, weight, bias, dweight, dbias = (library.array(a) for a in case[:7])
        result = cugn.group_norm_double_backward(
            u, v, x, 3, weight, bias, ddweight=dweight, ddbias=dbias, activation=activation
        )
        for value, expected in zip((*result, result.gbias), second, strict=True):
            wanted = np.zeros(value.shape) if expected is None else expected.numpy()
            close(library.numpy(value), wanted, "float64", str(activation))


VIEWS = {
    "cropped": lambda a: a[:, :, 1:-1],
    "flipped": lambda a: a[:, :, ::-1],
    "channels apart": lambda a: a[:, ::2],
    "samples last": lambda a: np.ascontiguousarray(a.transpose(1, 2, 0)).transpose(2, 0, 1),
    "one element in": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_double_backward(view: str) -> None:
    """Any strides, alike or apart."""
    base = inputs((4, 12, 22), "float32")
    x, u, v = (VIEWS[view](a) for a in base[:3])
    case = Inputs(x, u, np.ascontiguousarray(v), *(a[: x.shape[1]] for a in base[3:7]), None)
    check_double(case, 3, activation="silu")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("gradient", FLOATS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_gradients_of_images(dtype: str, gradient: str) -> None:
    """Integers are taken exactly; dy, tx and ddx have the dtype of y, which is that of out, or float32."""
    case = inputs((2, 6, 5, 7), gradient, x_dtype=dtype)
    e = oracle.epsilon(dtype_of(gradient))
    expected = oracle.backward(case.v, case.x, 3, case.weight, case.bias)
    with emulated() as library:
        x, u, v, weight, bias = (library.array(a) for a in case[:5])
        out = library.array(np.zeros(case.x.shape, dtype_of(gradient)))
        found = cugn.group_norm_backward(v, x, 3, weight, bias, out=out)
        assert found.dx is out
        assert (np.abs(library.numpy(out).astype(np.float64) - expected.dx) <= 8 * e * expected.group_max).all()
        for name in ("dweight", "dbias"):
            value = library.numpy(getattr(found, name))
            assert value.dtype == dtype_of(gradient)
            bound = 8 * e * getattr(expected, f"{name}_terms")
            assert (np.abs(value.astype(np.float64) - getattr(expected, name)) <= bound).all(), name
        ty = cugn.group_norm_jvp(u, x, 3, weight, bias, out=library.array(np.zeros_like(case.u)))
        wanted = tangent(case, 3, None, given=False)
        error = np.abs(library.numpy(ty).astype(np.float64) - wanted)
        assert (error <= 8 * e * np.abs(wanted).max()).all()
    if gradient == "float32":
        check_double(case, 3, activation="gelu")


# ---------------------------------------------------------------- jvp and moments


def tangent(case: Inputs, groups: Any, activation: str | None, given: bool = True) -> np.ndarray:
    """The reference's jvp in float64."""
    x, u, _, weight, bias, tweight, tbias = (a.astype(np.float64) for a in case[:7])
    operands = [("tx", u), ("weight", weight), ("bias", bias), ("where", case.where)]
    plan = resolve("jvp", x, groups, operands, 1e-5, 1, 0, activation)[1]
    tangents = (tweight, tbias) if given else (None, None)
    return reference.jvp(plan, u, x, weight, bias, *tangents, case.where, None)


# In one block, by labels, and over several blocks.
JVP = [((2, 6, 5, 7), 3, ()), ((2, 6, 5, 7), LABELS, ()), ((1, 4, 7001), 2, (SMALL,))]


@pytest.mark.parametrize(
    ("activation", "dtype", "masked", "problem", "last"),
    pairwise(ACTIVATIONS, FLOATS, (False, True), JVP, (False, True)),
)
def test_jvp(dtype: str, activation: str | None, masked: bool, problem: tuple[Any, ...], last: bool) -> None:
    """In one block and over several, both layouts, labels too."""
    shape, groups, devices = problem
    groups = list(groups) if isinstance(groups, tuple) else groups
    case = inputs(shape, dtype, masked)
    wanted = tangent(case, groups, activation)
    turn = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)
    with emulated(*devices, seed=2) as library:
        x, u = (library.array(turn(a)) for a in case[:2])
        weight, bias, tweight, tbias = (library.array(a) for a in case[3:7])
        where = None if case.where is None else library.array(turn(case.where))
        ty = library.numpy(
            cugn.group_norm_jvp(
                *(u, x, groups, weight, bias),
                tweight=tweight,
                tbias=tbias,
                where=where,
                activation=activation,
                channel_axis=-1 if last else 1,
            )
        )
    ty = np.moveaxis(ty, -1, 1) if last else ty
    assert ty.dtype == dtype_of(dtype)
    # a difference of terms a few times its largest value, each with the rounding of x_hat: as dx, 4 e, twice
    bound = 8 * oracle.epsilon(dtype_of(dtype)) * np.abs(wanted).max()
    assert (np.abs(ty.astype(np.float64) - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", [*FLOATS, "uint8", "int16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_moments(dtype: str, masked: bool) -> None:
    """Count, mean and m2 in float64 of every dtype, to 1e-12, in one block and over several, by labels, and strided."""
    for shape, groups, view in (
        ((2, 6, 5, 7), 3, None),
        ((2, 6, 35), list(LABELS), None),
        ((1, 2, 9001), 1, None),
        ((2, 6, 22), 2, "cropped"),
    ):
        floats = dtype if dtype in FLOATS else "float32"
        case = inputs(shape, floats, masked, None if dtype in FLOATS else dtype)
        x, where = (a if view is None or a is None else VIEWS[view](a) for a in (case.x, case.where))
        expected = oracle.forward(x, groups, where=where)
        for last in (False, True) if view is None else (False,):
            turn = (lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))) if last else (lambda a: a)
            with emulated(SMALL, seed=3) as library:
                mask = None if where is None else library.array(turn(where))
                found = cugn.moments(library.array(turn(x)), groups, where=mask, channel_axis=-1 if last else 1)
                count, mean, m2 = (library.numpy(a) for a in found)
            assert count.dtype == np.int64
            np.testing.assert_array_equal(count, expected.count)
            np.testing.assert_allclose(mean, expected.mean.astype(float), rtol=1e-12)
            np.testing.assert_allclose(m2, expected.m2.astype(float), rtol=1e-12)


def test_everything_is_served() -> None:
    """By the kernels: no operation on CuPy's arrays goes to the reference."""
    for dtype in (*FLOATS, "int8", "uint16"):
        with emulated() as library:
            x = library.array(np.zeros((2, 4, 6), dtype_of(dtype)))
            y = library.array(np.zeros((2, 4, 6), dtype_of(dtype if dtype in FLOATS else "float32")))
            for operation, names in (
                *(("forward", ()), ("normalize", ()), ("moments", ()), ("backward", ("dy",)), ("jvp", ("tx",))),
                ("double_backward", ("ddx", "dy")),
            ):
                engine, _ = resolve(operation, x, 2, [(name, y) for name in names], 1e-5, 1, 0, None)
                assert engine is cuda


def test_empty_double_backward() -> None:
    """Empty results and zero gradients, without a launch."""
    with emulated() as library, simt.recorded() as launches:
        x = library.array(np.zeros((0, 4, 6), np.float32))
        result = cugn.group_norm_double_backward(x, x, x, 2)
        assert result.gdy.shape == result.gx.shape == (0, 4, 6)
        assert not library.numpy(result.gweight).any()
        assert cugn.group_norm_jvp(x, x, 2).shape == (0, 4, 6)
        assert cugn.moments(x, 2).count.shape == (0, 2)
    assert all(launch.mode == "host" for launch in launches)
