"""Promise: the reference's formulas are the derivatives of the definition, to 1e-10, and so is the oracle's arithmetic.

The definition stands here once, in mpmath with 60 digits. Its derivatives are central differences with a step of 1e-20,
whose truncation error of 1e-40 and rounding error of 1e-40 do not show at 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import mpmath
import numpy as np
import oracle
import pytest
from libraries import LIBRARIES, Library, use_reference

import cugn

SHAPE = (2, 4, 3)
GROUPINGS: dict[str, Any] = {"2": 2, "1": 1, "4": 4, "labels": [1, 0, 1, 1], "three labels": [2, 0, 1, 0]}
ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh"]
TOLERANCE = 1e-10
STEP = mpmath.mpf(10) ** -20
CASES = [
    *[(g, None, "all") for g in GROUPINGS],
    *[("2", a, "all") for a in ACTIVATIONS if a],
    *[("labels", None, "some"), ("2", None, "some"), ("2", "gelu", "some"), ("three labels", "silu", "broadcast")],
    *[("batch", None, "all"), ("batch", "gelu_tanh", "some")],
]


class Case:
    """Arrays of one case and the definition on them."""

    def __init__(self, grouping: str, activation: str | None, where: str) -> None:
        rng = np.random.default_rng(11)
        self.x, self.dy, self.u = rng.normal(2, 1.5, size=(3, *SHAPE))
        self.dy -= 2
        self.weight, self.bias, self.v, self.t = rng.normal(size=(4, SHAPE[1]))
        self.activation, self.grouping = activation, grouping
        self.where = {"all": None, "some": rng.random(SHAPE) < 0.6, "broadcast": np.array([True, False, True])}[where]
        if where == "some":
            self.where[:, :, 0] = True  # no empty group
        self.groups = SHAPE[1] if grouping == "batch" else GROUPINGS[grouping]
        self.batch_axis = None if grouping == "batch" else 0
        self.eps = 0.01
        self.options = {"eps": self.eps, "activation": activation, "where": self.where, "batch_axis": self.batch_axis}

    def y(self, x: Any, weight: Any, bias: Any) -> np.ndarray:
        """The definition, on mpmath numbers, element by element."""
        labels = oracle.labels_of(self.groups, SHAPE[1])
        mask = np.ones(SHAPE, bool) if self.where is None else np.broadcast_to(self.where, SHAPE)
        y = np.empty(SHAPE, dtype=object)
        samples = [range(SHAPE[0])] if self.batch_axis is None else [[n] for n in range(SHAPE[0])]
        for sample in samples:
            for g in set(labels):
                members = [
                    (n, c, s) for n in sample for c in range(SHAPE[1]) if labels[c] == g for s in range(SHAPE[2])
                ]
                kept = [x[i] for i in members if mask[i]]
                mean = mpmath.fsum(kept) / len(kept)
                var = mpmath.fsum((v - mean) ** 2 for v in kept) / len(kept)
                for i in members:
                    x_hat = (x[i] - mean) / mpmath.sqrt(var + mpmath.mpf(self.eps))
                    y[i] = oracle.mp_act(self.activation, weight[i[1]] * x_hat + bias[i[1]])
        return y

    @cached_property
    def expected_y(self) -> np.ndarray:
        """y in float64."""
        return self.y(*self.point()).astype(np.float64)

    @cached_property
    def expected_gradients(self) -> list[np.ndarray]:
        """Derivatives of sum(dy y) by x, weight and bias."""
        return gradient(lambda *p: (mp(self.dy) * self.y(*p)).sum(), *self.point())

    @cached_property
    def expected_double_gradients(self) -> list[np.ndarray]:
        """Derivatives of sum(dy * the derivative of y along (ddx, ddweight, ddbias)) by dy, x, weight and bias."""

        def scalar(dy: Any, *point: Any) -> Any:
            return (dy * self.along(mp(self.u), mp(self.v), mp(self.t), point)).sum()

        return gradient(scalar, mp(self.dy), *self.point())

    def along(self, tx: Any, tweight: Any, tbias: Any, at: tuple[Any, Any, Any] | None = None) -> np.ndarray:
        """Directional derivative of y."""
        x, weight, bias = at or self.point()
        ahead = self.y(x + STEP * tx, weight + STEP * tweight, bias + STEP * tbias)
        behind = self.y(x - STEP * tx, weight - STEP * tweight, bias - STEP * tbias)
        return (ahead - behind) / (2 * STEP)

    @cache  # noqa: B019 - cases live as long as the module
    def tangent(self, given: str) -> np.ndarray:
        """Derivative of y along the tangents of "x", of "x and bias" or of "all"."""
        none = mp(np.zeros(SHAPE[1]))
        v, t = mp(self.v) if given == "all" else none, none if given == "x" else mp(self.t)
        return self.along(mp(self.u), v, t).astype(np.float64)

    def point(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, weight and bias as mpmath numbers."""
        return mp(self.x), mp(self.weight), mp(self.bias)


def mp(a: np.ndarray) -> np.ndarray:
    """Array of mpmath numbers."""
    return np.array([mpmath.mpf(float(v)) for v in a.ravel()], dtype=object).reshape(a.shape)


def gradient(f: Callable[..., Any], *arrays: np.ndarray) -> list[np.ndarray]:
    """Derivatives of a scalar function by every element of its arguments."""
    result = []
    for k, a in enumerate(arrays):
        slopes = np.empty(a.shape)
        for i in np.ndindex(a.shape):
            values = []
            for sign in (1, -1):
                moved = a.copy()
                moved[i] += sign * STEP
                values.append(f(*arrays[:k], moved, *arrays[k + 1 :]))
            slopes[i] = float((values[0] - values[1]) / (2 * STEP))
        result.append(slopes)
    return result


@pytest.fixture(autouse=True)
def sixty_digits() -> Any:
    """60 digits, 40 of which are left after one difference and 20 after two."""
    with mpmath.workdps(60):
        yield


@pytest.fixture(params=CASES, ids=lambda c: f"groups {c[0]}, {c[1]}, {c[2]}")
def case(request: pytest.FixtureRequest) -> Case:
    """Every grouping, activation and mask."""
    return _case(*request.param)


@cache
def _case(*parameters: Any) -> Case:
    """One for all libraries, so that its derivatives are taken once."""
    return Case(*parameters)


@pytest.fixture(params=["engine", "reference", "array_api_strict", "torch", "jax", "cupy"])
def serving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Each library, NumPy by its engine and by the reference."""
    if request.param == "reference":
        use_reference(monkeypatch)
    return LIBRARIES[request.param if request.param in LIBRARIES else "numpy"]()


def close(value: Any, wanted: Any) -> None:
    """Within 1e-10 of the largest."""
    wanted = np.asarray(wanted, dtype=np.float64)
    np.testing.assert_allclose(value, wanted, rtol=0, atol=TOLERANCE * max(1, np.abs(wanted).max()))


def arrays(library: Library, *values: np.ndarray | None) -> list[Any]:
    """Arrays of the library."""
    return [None if v is None else library.array(v) for v in values]


def options(case: Case, library: Library) -> dict[str, Any]:
    """Keywords of the case."""
    return {**case.options, "where": None if case.where is None else library.array(case.where)}


def _rare(case: tuple[str, str | None, str], serving: str) -> bool:
    """The compiled loops of an activation under masks, which test_second_order has in other ways."""
    return serving == "engine" and case[1] is not None and (case[2] != "all" or case[1] == "gelu_tanh")


def test_forward(case: Case, serving: Library) -> None:
    """y is the definition's."""
    x, weight, bias = arrays(serving, case.x, case.weight, case.bias)
    y = cugn.group_norm(x, case.groups, weight, bias, **options(case, serving))
    close(serving.numpy(y), case.expected_y)


@pytest.mark.rare(when=_rare)
def test_backward(case: Case, serving: Library) -> None:
    """dx, dweight and dbias are the derivatives of sum(dy y)."""
    dy, x, weight, bias = arrays(serving, case.dy, case.x, case.weight, case.bias)
    result = cugn.group_norm_backward(dy, x, case.groups, weight, bias, **options(case, serving))
    for value, expected in zip(result, case.expected_gradients, strict=True):
        close(serving.numpy(value), expected)


@pytest.mark.rare(when=_rare)
def test_jvp(case: Case, serving: Library) -> None:
    """ty is the derivative of y along the tangents; without some of them too."""
    tx, x, weight, bias, tw, tb = arrays(serving, case.u, case.x, case.weight, case.bias, case.v, case.t)
    for given, tweight, tbias in (("all", tw, tb), ("x", None, None), ("x and bias", None, tb)):
        ty = cugn.group_norm_jvp(
            tx, x, case.groups, weight, bias, tweight=tweight, tbias=tbias, **options(case, serving)
        )
        close(serving.numpy(ty), case.tangent(given))


@pytest.mark.rare(when=_rare)
def test_double_backward(case: Case, serving: Library) -> None:
    """gdy, gx, gweight and gbias are the derivatives of sum(ddx dx) + sum(ddweight dweight) + sum(ddbias dbias).

    That scalar is sum(dy * the derivative of y along (ddx, ddweight, ddbias)): the definition alone says it.
    """
    u, dy, x, weight, bias, v, t = arrays(serving, case.u, case.dy, case.x, case.weight, case.bias, case.v, case.t)
    result = cugn.group_norm_double_backward(
        u, dy, x, case.groups, weight, bias, ddweight=v, ddbias=t, **options(case, serving)
    )
    for value, expected in zip((*result, result.gbias), case.expected_double_gradients, strict=True):
        close(serving.numpy(value), expected)


def test_oracle_of_second_order(case: Case) -> None:
    """The oracle of jvp and double backward gives the definition's derivatives."""
    result = oracle.second(case.u, case.dy, case.x, case.groups, case.weight, case.bias, case.v, case.t, **case.options)
    for value, expected in zip(result[:4], case.expected_double_gradients, strict=True):
        close(value.astype(np.float64), expected)


def test_double_backward_without_optional_arguments(serving: Library) -> None:
    """No weight, no bias, no ddweight, no ddbias: as with ones and zeros."""
    case = Case("2", None, "all")
    u, dy, x, one, zero = arrays(serving, case.u, case.dy, case.x, np.ones(SHAPE[1]), np.zeros(SHAPE[1]))
    result = cugn.group_norm_double_backward(u, dy, x, 2, eps=case.eps)
    wanted = cugn.group_norm_double_backward(u, dy, x, 2, one, zero, ddweight=zero, ddbias=zero, eps=case.eps)
    for value, expected in zip((*result, result.gbias), (*wanted, wanted.gbias), strict=True):
        close(serving.numpy(value), serving.numpy(expected))


def test_normalize_and_moments(case: Case, serving: Library) -> None:
    """Moments are the definition's, and normalize applies them as the forward does."""
    x, weight, bias = arrays(serving, case.x, case.weight, case.bias)
    where = options(case, serving)["where"]
    m = cugn.moments(x, case.groups, where=where, batch_axis=case.batch_axis)
    expected = oracle.forward(case.x, case.groups, where=case.where, batch_axis=case.batch_axis)
    np.testing.assert_array_equal(serving.numpy(m.count), expected.count)
    close(serving.numpy(m.mean), expected.mean)
    close(serving.numpy(m.m2), expected.m2)
    close(serving.numpy(m.var), expected.m2 / expected.count)
    y = cugn.normalize(
        x, m.mean, m.rstd(case.eps), case.groups, weight, bias, batch_axis=case.batch_axis, activation=case.activation
    )
    close(serving.numpy(y), case.expected_y)


@pytest.mark.rare(when=_rare)
def test_backward_of_parts(case: Case, serving: Library) -> None:
    """Sums of two parts, merged and applied to each, are the backward of the whole."""
    given = options(case, serving)
    where = None if case.where is None else np.broadcast_to(case.where, SHAPE)
    axes = {"batch_axis": case.batch_axis}
    cuts = (np.s_[:, :, :1], np.s_[:, :, 1:])
    weight, bias = arrays(serving, case.weight, case.bias)
    parts = [arrays(serving, case.dy[cut], case.x[cut], None if where is None else where[cut]) for cut in cuts]
    m = [cugn.moments(x, case.groups, where=w, **axes) for _, x, w in parts]
    m = m[0].merge(m[1])
    statistics = (m.mean, m.rstd(case.eps))
    per_channel = {"weight": weight, "bias": bias, "activation": case.activation, **axes}
    sums = [cugn.backward_sums(dy, x, *statistics, case.groups, **per_channel) for dy, x, _ in parts]
    sums = sums[0].merge(sums[1])
    count = serving.array(serving.numpy(m.count).astype(np.float64))  # the standard mixes no kinds in a division
    means = (sums.sum_wdy / count, sums.sum_wdy_xhat / count)
    dx = [
        serving.numpy(cugn.backward_apply(dy, x, *statistics, *means, case.groups, where=w, **per_channel))
        for dy, x, w in parts
    ]
    whole = cugn.group_norm_backward(*arrays(serving, case.dy, case.x), case.groups, weight, bias, **given)
    close(np.concatenate(dx, axis=2), serving.numpy(whole.dx))
    close(serving.numpy(sums.dweight), serving.numpy(whole.dweight))
    close(serving.numpy(sums.dbias), serving.numpy(whole.dbias))


def test_complex_step() -> None:
    """The backward against the imaginary part of the definition in complex arithmetic: nothing is subtracted."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(3, 2, size=(2, 2, 8, 9))
    weight = rng.normal(size=8)

    def loss(z: np.ndarray, w: np.ndarray) -> complex:
        grouped = z.reshape(2, 4, -1)
        mean = grouped.mean(axis=2, keepdims=True)
        d = grouped - mean
        hat = d / np.sqrt((d * d).mean(axis=2, keepdims=True) + 1e-5)
        return complex((dy * hat.reshape(z.shape) * w[:, None]).sum())

    dx, dweight, _ = cugn.group_norm_backward(dy, x, 4, weight)
    for i in np.ndindex(x.shape):
        z = x.astype(complex)
        z[i] += 1e-200j
        assert abs(loss(z, weight.astype(complex)).imag * 1e200 - dx[i]) < TOLERANCE
    for c in range(8):
        w = weight.astype(complex)
        w[c] += 1e-200j
        assert abs(loss(x.astype(complex), w).imag * 1e200 - dweight[c]) < TOLERANCE * 10


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch(activation: str | None) -> None:
    """Forward, backward and double backward are those of torch's autograd in float64."""
    torch = LIBRARIES["torch"]() and pytest.importorskip("torch")
    F = torch.nn.functional
    act = {
        None: lambda z: z,
        "relu": F.relu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    }[activation]
    rng = np.random.default_rng(4)
    x, dy, ddx = rng.normal(size=(3, 3, 6, 5, 4))
    weight, bias, ddweight, ddbias = rng.normal(size=(4, 6))
    tensors = [torch.tensor(a, requires_grad=True) for a in (dy, x, weight, bias)]
    y = act(F.group_norm(tensors[1], 3, tensors[2], tensors[3]))
    close(cugn.group_norm(x, 3, weight, bias, activation=activation), y.detach().numpy())
    first = torch.autograd.grad(y, tensors[1:], tensors[0], create_graph=True)
    for value, expected in zip(
        cugn.group_norm_backward(dy, x, 3, weight, bias, activation=activation), first, strict=True
    ):
        close(value, expected.detach().numpy())
    scalar = sum((a * torch.tensor(b)).sum() for a, b in zip(first, (ddx, ddweight, ddbias), strict=True))
    second = torch.autograd.grad(scalar, tensors, allow_unused=True)
    result = cugn.group_norm_double_backward(
        ddx, dy, x, 3, weight, bias, ddweight=ddweight, ddbias=ddbias, activation=activation
    )
    for value, expected in zip((*result, result.gbias), second, strict=True):
        close(value, np.zeros(value.shape) if expected is None else expected.numpy())


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e12])
def test_oracle(mean: float) -> None:
    """The longdouble oracle itself is right to 1e-16 of its scale at mean/std up to 1e12, forward and backward."""
    case = Case("2", "silu", "some")
    case.x = case.x + mean
    point = case.point()
    forward = oracle.forward(case.x, 2, case.weight, case.bias, **case.options)
    for i in np.ndindex(SHAPE):
        assert abs(oracle._mpf(forward.y[i]) - case.y(*point)[i]) < 1e-16
    wanted = gradient(lambda *p: (mp(case.dy) * case.y(*p)).sum(), *point)
    result = oracle.backward(case.dy, case.x, 2, case.weight, case.bias, **case.options)
    for value, expected in zip(result[:3], wanted, strict=True):
        np.testing.assert_allclose(value.astype(np.float64), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [3e305, 4e305, 5e305, -5e305])
def test_values_that_a_mask_leaves_out_reach_the_end_of_the_range(value: float) -> None:
    """A group without variance multiplies the others by 1 / sqrt(eps): no overflow before y itself."""
    x = np.array([[[0.0, value, 4 * value]]])
    y = cugn.group_norm(x, 1, where=np.array([True, False, False]))
    np.testing.assert_allclose(y[0, 0, :2], [0, value / math.sqrt(1e-5)], rtol=1e-15)
    for activation in ("silu", "gelu", "gelu_tanh"):
        z = cugn.group_norm(x, 1, where=np.array([True, False, False]), activation=activation)
        np.testing.assert_array_equal(z, np.where(y < 0, 0, y))


def test_reference_serves_everything() -> None:
    """No operation is refused."""
    assert cugn.reference.serves(None, "forward") is True
