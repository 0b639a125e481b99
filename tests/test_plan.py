"""Promise: a plan says what a call works on (axes, sizes, groups, dtypes), once for all calls that are alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cugn
from cugn import engines
from cugn import plan as plan_module
from cugn.plan import Each, Plan, dtype_name, groups_key


def plan_of(x: np.ndarray, groups: Any, operands: dict[str, np.ndarray] | None = None, **options: Any) -> Plan:
    """Plan of a forward."""
    call = {"eps": 1e-5, "channel_axis": 1, "batch_axis": 0, "activation": None, **options}
    return engines.resolve(
        "forward",
        x,
        groups,
        tuple((operands or {}).items()),
        call["eps"],
        call["channel_axis"],
        call["batch_axis"],
        call["activation"],
    )[1]


X = np.zeros((2, 6, 4, 5), np.float32)


def test_sizes_and_axes() -> None:
    """N, C, G, S, M and the axes, non-negative."""
    plan = plan_of(X, 3)
    assert (plan.N, plan.C, plan.G, plan.S, plan.size) == (2, 6, 3, 20, 240)
    assert (plan.batch_axes, plan.channel_axis, plan.spatial_axes) == ((0,), 1, (2, 3))
    assert (plan.batch_shape, plan.stats_shape, plan.shape) == ((2,), (2, 3), X.shape)
    plan = plan_of(X, 2, channel_axis=-2, batch_axis=(-4, 3))
    assert (plan.N, plan.C, plan.G, plan.S) == (10, 4, 2, 6)
    assert (plan.batch_axes, plan.channel_axis, plan.spatial_axes) == ((0, 3), 2, (1,))
    assert plan.stats_shape == (2, 5, 2)
    plan = plan_of(X, 2, batch_axis=None)
    assert (plan.N, plan.S, plan.batch_axes, plan.batch_shape, plan.stats_shape) == (1, 40, (), (), (2,))


def test_family() -> None:
    """Instance norm is a group a channel; batch norm the same over one sample that holds them all."""
    instance, batch = plan_of(X, Each.CHANNEL), plan_of(X, Each.CHANNEL_OF_BATCH)
    assert (instance.N, instance.G, instance.S, instance.stats_shape) == (2, 6, 20, (2, 6))
    assert (batch.N, batch.G, batch.S, batch.stats_shape) == (1, 6, 40, (6,))
    assert batch.spatial_axes == (0, 2, 3)


def test_groups() -> None:
    """Equal contiguous groups, and labels of any partition; channels in their own order within a group."""
    plan = plan_of(X, 3)
    assert plan.labels is None
    assert plan.channel_order.tolist() == list(range(6))
    assert plan.group_bounds.tolist() == [0, 2, 4, 6]
    for labels in ([2, 0, 1, 0, 2, 2], (2, 0, 1, 0, 2, 2), np.array([2, 0, 1, 0, 2, 2], np.uint8)):
        plan = plan_of(X, labels)
        assert plan.G == 3
        assert plan.labels is not None
        assert plan.labels.tolist() == list(labels)
        assert plan.channel_order.tolist() == [1, 3, 2, 0, 4, 5]
        assert plan.group_bounds.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize("groups", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integers_of_any_kind(groups: Any) -> None:
    """Ints, NumPy ints and 0-d integer arrays are ints; ranges, lists and tuples are labels."""
    assert plan_of(X, groups) is plan_of(X, 3)
    assert plan_of(X, range(6)) is plan_of(X, [0, 1, 2, 3, 4, 5])
    assert plan_of(X, 3, channel_axis=np.int64(1), batch_axis=[np.int32(0)]).N == 2


@pytest.mark.parametrize("eps", [0, 0.0, -0.0, 1, np.float32(0.5), np.float16(0.5), np.array(0.5), True + 0])
def test_eps_of_any_kind(eps: Any) -> None:
    """Eps is any real number."""
    assert plan_of(X, 3, eps=eps).eps == float(eps)


def test_dtypes() -> None:
    """Names of the dtypes; float32 results of integers, or what out asks for; weights of their own."""
    half = np.zeros((2, 6, 4, 5), np.float16)
    plan = plan_of(half, 3, {"weight": np.zeros(6, np.float64), "bias": np.zeros(6, ml_dtypes.bfloat16)})
    assert (plan.x_dtype, plan.y_dtype, plan.weight_dtype, plan.bias_dtype) == (
        "float16",
        "float16",
        "float64",
        "bfloat16",
    )
    image = np.zeros((2, 6, 4, 5), np.uint8)
    assert (plan_of(image, 3).x_dtype, plan_of(image, 3).y_dtype, plan_of(image, 3).weight_dtype) == (
        "uint8",
        "float32",
        "float32",
    )
    assert plan_of(image, 3, {"out": half}).y_dtype == "float16"
    assert [dtype_name(d) for d in (np.dtype("f4"), np.dtype(ml_dtypes.bfloat16))] == ["float32", "bfloat16"]


def test_options() -> None:
    """The activation and the mask."""
    assert not plan_of(X, 3).masked
    assert plan_of(X, 3, {"where": np.ones(5, bool)}).masked
    assert plan_of(X, 3, activation="silu").activation == "silu"
    assert plan_of(X, 3, activation=np.str_("silu")) is plan_of(X, 3, activation="silu")


def test_cache() -> None:
    """Calls alike share a plan, whatever the values; another shape, stride, dtype or option has its own."""
    plan = plan_of(X, 3)
    assert plan_of(X + 1, 3) is plan
    last = np.zeros((2, 4, 5, 6), np.float32).transpose(0, 3, 1, 2)
    others = [
        plan_of(X[:1], 3),
        plan_of(last, 3),
        plan_of(X.astype(np.float64), 3),
        plan_of(X, 2),
        plan_of(X, [0, 0, 1, 1, 2, 2]),
        plan_of(X, 3, eps=1e-3),
        plan_of(X, 3, batch_axis=None),
        plan_of(X, 1, channel_axis=3),
        plan_of(X, 3, activation="relu"),
        plan_of(X, 3, {"weight": np.zeros(6)}),
    ]
    assert len({id(p) for p in (plan, *others)}) == len(others) + 1


def test_cache_does_not_mix_alike_values() -> None:
    """1 and True, 0 and False are equal keys, but not equal calls: the second must not find the first's plan."""
    plan_of(X, 1)
    with pytest.raises(TypeError, match="groups is True"):
        cugn.group_norm(X, True)
    cugn.group_norm(X, 3, channel_axis=1, batch_axis=0)
    with pytest.raises(TypeError, match="batch_axis is False"):
        cugn.group_norm(X, 3, batch_axis=False)
    with pytest.raises(TypeError, match=r"groups is 3\.0"):
        cugn.group_norm(X, 3.0)


def test_errors_are_not_cached_as_plans() -> None:
    """A wrong call raises each time."""
    for _ in range(3):
        with pytest.raises(ValueError, match="groups is 4"):
            cugn.group_norm(X, 4)


def test_a_plan_does_not_change() -> None:
    """Plans are shared between threads: frozen, their arrays read-only."""
    plan = plan_of(X, [0, 1, 2, 0, 1, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.N = 3  # type: ignore[misc]
    for array in (plan.labels, plan.channel_order, plan.group_bounds):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    labels = np.array([0, 1, 2, 0, 1, 2])
    plan = plan_of(X, labels)
    labels[:] = 0
    assert plan.labels is not None
    assert plan.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan_of(X, [0, 1, 2, 0, 1, 2]) is plan


def test_engines() -> None:
    """NumPy goes to the compiled engine where it serves the call, empty arrays to the reference."""
    call = (3, (), 1e-5, 1, 0, None)
    assert engines.resolve("forward", X[:0], *call)[0].__name__ == "cugn.reference"
    for name in ("forward", "backward", "jvp", "double_backward", "moments", "normalize"):
        serving = engines.resolve(name, X, *call)[0]
        assert serving.serves(plan_of(X, 3), name)
        assert serving.__name__ in ("cugn.cpu", "cugn.reference")
    assert engines.resolve("forward", X.astype(">f4"), *call)[0].__name__ == "cugn.reference"


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_labels_are_known_again(kind: Any) -> None:
    """The same object with the same labels has the same key, with others another one; equal keys are one entry."""
    labels = kind([2, 0, 1, 0, 2, 2])
    key = groups_key(labels)
    assert groups_key(labels) is key
    assert groups_key([2, 0, 1, 0, 2, 2]) == key == (2, 0, 1, 0, 2, 2)
    assert hash(groups_key([2, 0, 1, 0, 2, 2])) == hash(key)
    if kind is not tuple:
        labels[0] = 1
        assert groups_key(labels) == (1, 0, 1, 0, 2, 2)
        assert groups_key(labels) != key


def test_changed_labels_change_the_groups() -> None:
    """Through the public function, in a list and in an array that the caller writes to between two calls."""
    x = np.random.default_rng(0).normal(size=X.shape)
    for labels in ([0, 0, 1, 1, 1, 1], np.array([0, 0, 1, 1, 1, 1])):
        before = cugn.group_norm(x, labels)
        labels[1] = 1
        after = cugn.group_norm(x, labels)
        np.testing.assert_array_equal(after, cugn.group_norm(x, (0, 1, 1, 1, 1, 1)))
        assert not np.array_equal(before, after)


def test_many_labels_are_forgotten() -> None:
    """What is remembered of callers' objects is bounded."""
    kept = [[k % 3, 0, 1, 2, 0, 1] for k in range(1000)]
    for labels in kept:
        assert groups_key(labels) == tuple(labels)
    assert len(plan_module._known) <= plan_module._MOST_KNOWN
