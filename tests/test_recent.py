"""Calls that are known again are the calls that they look like: everything that a plan depends on is looked at."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cugn
from cugn import engines
from cugn.cpu import recent as module
from cugn.plan import groups_key

X = np.random.default_rng(0).normal(size=(2, 6, 4, 5)).astype(np.float32)
WEIGHT = np.linspace(0.5, 2, 6, dtype=np.float32)
PLAIN = {"groups": 3, "eps": 1e-5, "channel_axis": 1, "batch_axis": 0, "activation": None}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Recent calls of this test alone."""
    table = module.recent.__wrapped__()
    assert table is not None
    monkeypatch.setattr(engines, "_recent", table)
    monkeypatch.setattr(module, "recent", lambda: table)
    return table


def forward(arrays: tuple[Any, ...], **options: Any) -> Any:
    """Plan of a forward by the public way."""
    return engines.dispatch("forward", arrays, **{**PLAIN, **options})[1]


def twice(arrays: tuple[Any, ...], **options: Any) -> Any:
    """Plan of a call that is known by then."""
    forward(arrays, **options)
    forward(arrays, **options)
    return forward(arrays, **options)


def array(shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...] = (), step: int = 1) -> np.ndarray:
    """Zeros with a memory order of their own."""
    made = np.zeros([n * step for n in shape], dtype)[tuple(slice(None, None, step) for _ in shape)]
    return made.transpose(axes) if axes else made


ARRAYS = {
    "plain": (X, None, None, None, None),
    "other shape": (array((2, 6, 5, 4), "f4"), None, None, None, None),
    "fewer axes": (array((2, 6, 4), "f4"), None, None, None, None),
    "other dtype": (array((2, 6, 4, 5), "f8"), None, None, None, None),
    "bfloat16": (array((2, 6, 4, 5), ml_dtypes.bfloat16), None, None, None, None),
    "float16": (array((2, 6, 4, 5), "f2"), None, None, None, None),
    "other order": (array((2, 6, 5, 4), "f4", (0, 1, 3, 2)), None, None, None, None),
    "strided": (array((2, 6, 4, 5), "f4", step=2), None, None, None, None),
    "weight": (X, WEIGHT, None, None, None),
    "bias": (X, None, WEIGHT, None, None),
    "wide weight": (X, WEIGHT.astype("f8"), None, None, None),
    "strided weight": (X, np.repeat(WEIGHT, 2)[::2], None, None, None),
    "mask": (X, None, None, X > 0, None),
    "mask of channels": (X, None, None, X[:, :1] > 0, None),
    "out": (X, None, None, None, np.empty_like(X)),
    "out of another order": (X, None, None, None, array((2, 6, 5, 4), "f4", (0, 1, 3, 2))),
}
OPTIONS = {
    "plain": {},
    "groups": {"groups": 2},
    "eps": {"eps": 1e-6},
    "no eps": {"eps": 0.0},
    "minus no eps": {"eps": -0.0},
    "no batch": {"batch_axis": None},
    "batch axes": {"batch_axis": (0, 2)},
    "labels": {"groups": [0, 1, 2, 0, 1, 2]},
    "other labels": {"groups": (0, 1, 2, 0, 2, 1)},
    "an array of labels": {"groups": np.array([1, 1, 1, 0, 0, 2])},
    "activation": {"activation": "silu"},
}


def test_every_difference_is_seen(known: Any) -> None:
    """Each combination of arrays and options has the plan that the long way gives it, known or not."""
    cases = list(itertools.product(ARRAYS, OPTIONS))
    for _ in range(2):
        for arrays, options in cases:
            plan = twice(ARRAYS[arrays], **OPTIONS[options])
            operands = tuple(zip(("weight", "bias", "where", "out"), ARRAYS[arrays][1:], strict=True))
            call = {**PLAIN, **OPTIONS[options]}
            assert plan is engines.resolve("forward", ARRAYS[arrays][0], operands=operands, **call)[1], (
                arrays,
                options,
            )
    assert len(known._plans) > 100


def test_known_calls_take_the_short_way(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second time on nothing is described to Python; NumPy's scalars always are."""
    x, labels = X.copy(), [0, 1, 2, 0, 1, 2]
    for _ in range(2):
        cugn.group_norm(x, 3, WEIGHT)
        cugn.group_norm(x, labels)
        cugn.instance_norm(x)
        cugn.group_norm_backward(x, x, 3, WEIGHT)
    described: list[str] = []
    long_way = engines.resolve
    monkeypatch.setattr(engines, "resolve", lambda *call: (described.append(call[0]), long_way(*call))[1])
    cugn.group_norm(x, 3, WEIGHT)
    cugn.group_norm(X, 3, WEIGHT)
    cugn.group_norm_backward(X, x, 3, WEIGHT)
    cugn.group_norm(x, labels)
    cugn.group_norm(x, np.int64(3), WEIGHT)
    cugn.instance_norm(x)
    assert described == []
    cugn.group_norm(x, 3, WEIGHT, eps=np.float64(1e-5))
    labels[0] = 2
    cugn.group_norm(x, labels)
    assert described == ["forward"] * 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"groups": 4}, ValueError),
        ({"groups": 3.0}, TypeError),
        ({"groups": True}, TypeError),
        ({"groups": 0}, ValueError),
        ({"groups": -3}, ValueError),
        ({"groups": [0, 1]}, ValueError),
        ({"groups": [0, 1, 3, 0, 1, 3]}, ValueError),
        ({"groups": 10**30}, ValueError),
        ({"eps": "1e-5"}, TypeError),
        ({"eps": np.nan}, ValueError),
        ({"channel_axis": 4}, ValueError),
        ({"channel_axis": 1.0}, TypeError),
        ({"batch_axis": 1}, ValueError),
        ({"batch_axis": [1]}, ValueError),
        ({"activation": "swish"}, ValueError),
        ({"weight": WEIGHT[:5]}, ValueError),
        ({"weight": WEIGHT.tolist()}, TypeError),
        ({"weight": WEIGHT.astype(int)}, TypeError),
        ({"where": X}, TypeError),
        ({"out": X.astype("f8")}, TypeError),
        ({"out": X[:1]}, ValueError),
        ({"out": X[::-1]}, ValueError),
        ({"out": X.copy()[::-1][::-1].view(np.recarray)}, TypeError),
    ],
)
def test_errors_stay(known: Any, change: dict[str, Any], error: type[Exception]) -> None:
    """What is wrong is wrong beside a call that is known, every time."""
    call = {"groups": 3, "weight": WEIGHT, "out": np.empty_like(X)}
    for _ in range(4):
        cugn.group_norm(X, **call)
        with pytest.raises(error):
            cugn.group_norm(X, **{**call, **change})


def test_mutable_arguments_are_read_each_time(known: Any) -> None:
    """A list of axes, or an array of no dimensions, may hold something else the next time."""
    axes, axis = [0], np.array(1)
    for _ in range(3):
        before = cugn.group_norm_forward(X, 3, batch_axis=axes, channel_axis=axis).mean.shape
    axes.append(2)
    assert before == (2, 3)
    assert cugn.group_norm_forward(X, 3, batch_axis=axes, channel_axis=axis).mean.shape == (2, 4, 3)
    axis[()] = 3
    with pytest.raises(ValueError, match="must divide the 5 channels"):
        cugn.group_norm(X, 3, channel_axis=axis)


def test_an_int_is_no_address(known: Any) -> None:
    """Labels are known by the address of their key: the same number as `groups` is an error."""
    labels = [0, 1, 2, 0, 1, 2]
    for _ in range(3):
        cugn.group_norm(X, labels)
        for number in (-id(groups_key(labels)), id(groups_key(labels))):
            with pytest.raises(ValueError, match="groups is"):
                cugn.group_norm(X, number)


def overlaps() -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    """x, an out, and whether that may be written."""
    memory = np.zeros(4 * X.size + 64, np.float32)

    def at(start: int) -> np.ndarray:
        return memory[start : start + X.size].reshape(X.shape)

    read_only = np.zeros_like(X)
    read_only.flags.writeable = False
    x = X.copy()
    return {
        "itself": (x, x, True),
        "the same memory": (x, x[:], True),
        "behind": (at(0), at(X.size), True),
        "before": (at(X.size), at(0), True),
        "one element of it": (at(0), at(X.size - 1), False),
        "most of it": (at(16), at(0), False),
        "reversed": (x, x[::-1], False),
        "of what is read backwards": (at(X.size)[::-1], at(X.size // 4), False),
        "between": (memory[: 2 * X.size : 2].reshape(X.shape), memory[1 : 2 * X.size : 2].reshape(X.shape), True),
        "read-only": (x, read_only, False),
        "broadcast": (x, np.broadcast_to(np.zeros((1, 6, 4, 5), np.float32), X.shape), False),
        "woven": (x, np.lib.stride_tricks.as_strided(memory, X.shape, (8, 12, 80, 320)), True),
        "on itself": (x, np.lib.stride_tricks.as_strided(memory, X.shape, (4, 4, 4, 4)), False),
    }


@pytest.mark.parametrize("case", overlaps())
def test_overlaps_stay(known: Any, case: str) -> None:
    """An `out` is looked at in each call, known or not."""
    x, out, allowed = overlaps()[case]
    expected = cugn.group_norm(x.copy(), 3)
    kept = x.copy()
    for _ in range(4):
        cugn.group_norm(X, 3, out=np.empty_like(X))  # which most of the cases look like
        cugn.group_norm(X[::-1], 3, out=np.empty_like(X))
        x[...] = kept
        if allowed:
            assert np.array_equal(cugn.group_norm(x, 3, out=out), expected)
        else:
            with pytest.raises(ValueError, match="out "):
                cugn.group_norm(x, 3, out=out)
            assert np.array_equal(x, kept)


def test_out_over_a_weight(known: Any) -> None:
    """Vectors and masks count as read, too."""
    memory = np.ones(X.size + 6, np.float32)
    weight, out = memory[:6], memory[6:].reshape(X.shape)
    over = memory[: X.size].reshape(X.shape)
    for _ in range(4):
        assert np.array_equal(cugn.group_norm(X, 3, weight, out=out), cugn.group_norm(X, 3))
        with pytest.raises(ValueError, match="out overlaps weight"):
            cugn.group_norm(X, 3, weight, out=over)


def test_out_that_is_a_weight(known: Any) -> None:
    """Where x is a vector over the channels itself, `out` may be x and no other one."""
    x, weight = X[0, :, 0, 0].copy(), WEIGHT.copy()
    call = {"groups": 3, "weight": weight, "channel_axis": 0, "batch_axis": None}
    expected = cugn.group_norm(x, **call)
    for _ in range(4):
        again = x.copy()
        assert np.array_equal(cugn.group_norm(again, out=again, **call), expected)
        with pytest.raises(ValueError, match="out overlaps weight"):
            cugn.group_norm(x, out=weight, **call)


def test_calls_take_each_others_places(known: Any) -> None:
    """More calls than there are places: the table stays as large as it is, and every answer right."""
    for k in range(3 * module.SLOTS):
        x = np.zeros((1, 2, k + 1), np.float32)
        for _ in range(2):
            assert forward((x, None, None, None, None), groups=2).shape[2] == k + 1
    assert 0 < len(known._plans) <= module.SLOTS


def test_many_axes_are_not_described(known: Any) -> None:
    """What is too long to be kept goes the long way each time."""
    x = np.zeros((1, 2) + (1,) * 5 + (3, 2), np.float32)
    for _ in range(4):
        assert engines.dispatch("backward", (x, x, None, None, None, None, None, x), 2, 1e-5, 1, 0, None)[1].S == 6
    assert len(known._plans) == 0


def test_threads_find_their_own_plans(known: Any) -> None:
    """While other threads enter calls, each gets the plan of its own arrays."""
    wrong: list[Any] = []

    def work(first: int) -> None:
        for k in range(1500):
            size = 1 + (first + 7 * k) % 600
            x = np.zeros((1, 2, size), np.float32)
            found = forward((x, None, None, None, None), groups=2).shape[2]
            if found != size:
                wrong.append((found, size))

    threads = [threading.Thread(target=work, args=(100 * k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
