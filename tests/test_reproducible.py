"""Promise: the same bits for a sample in any batch, any run, with out or not, and for any number of threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from libraries import FLOATS, dtype_of, is_rare, subprocess_environment, threads

import cugn

# (C, spatial shape, G): a group in registers, an odd one, one of some blocks, one that is split, S = 1
SHAPES = {
    "small": (8, (5, 7), 4),
    "odd": (12, (3, 5, 7), 3),
    "blocks": (32, (31, 33), 4),
    "long": (4, (151, 149), 2),
    "table": (96, (), 8),
    "one channel": (1, (77,), 1),
    "wide": (520, (3,), 5),
}
BATCH = 100
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "where": {"where": True},
    "labels": {"labels": True},
    "labels, where": {"labels": True, "where": True},
}


def _data(shape: str, dtype: str, last: bool, options: str, batch: int) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments of the forward for a whole batch, and dy."""
    C, spatial, groups = SHAPES[shape]
    rng = np.random.default_rng(3)
    full = (batch, *spatial, C) if last else (batch, C, *spatial)
    x, dy = (rng.normal(0, 2, size=full) for _ in range(2))
    # means of many standard deviations, of none, and both in one sample: they are computed in different ways
    channels = np.moveaxis(x, -1 if last else 1, 1)
    channels[::3] += 30
    channels[2::3, : C // 2] += 30
    x, dy = x.astype(dtype_of(dtype)), dy.astype(dtype_of(dtype))
    given = OPTIONS[options]
    labels = rng.permutation(np.arange(C) * groups // C).tolist()
    arguments: dict[str, Any] = {
        "x": x,
        "groups": labels if given.get("labels") else groups,
        "weight": rng.normal(size=C).astype(dtype_of(dtype)),
        "bias": rng.normal(size=C).astype(dtype_of(dtype)),
        "channel_axis": -1 if last else 1,
        "activation": given.get("activation"),
    }
    if given.get("where"):
        arguments["where"] = rng.random(full) < 0.7
    return arguments, dy


def _part(arguments: dict[str, Any], part: slice, copy: bool) -> dict[str, Any]:
    cut = {k: v[part] for k, v in arguments.items() if k in ("x", "where", "dy")}
    return {**arguments, **{k: v.copy() if copy else v for k, v in cut.items()}}


def _same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bit for bit."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(_bits(a), _bits(b))


def _bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


CROSSED = [(s, o) for s in SHAPES for o in OPTIONS if o in ("plain", "labels") or s in ("small", "blocks", "table")]


def _rare(shape: str, dtype: str, last: bool, options: str) -> bool:
    """An activation's loops are those of the compute dtype, of a layout and of tables: each is met, not each pair."""
    if is_rare(dtype, labels="labels" in options, masks="where" in options):
        return True
    if options == "gelu":
        return dtype != "float64" or last or shape == "table"
    return options == "silu" and (dtype == "bfloat16" or (shape == "table" and dtype != "float32"))


@pytest.mark.rare(when=_rare)
@pytest.mark.parametrize(("shape", "options"), CROSSED)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sample_in_any_batch(shape: str, dtype: str, last: bool, options: str) -> None:
    """Y, dx and the statistics of a sample: in a batch of 100, alone, as a view and as a copy, into out, in place."""
    arguments, dy = _data(shape, dtype, last, options, 16 if shape in ("long", "blocks") else BATCH)
    whole = cugn.group_norm_forward(**arguments)
    gradients = cugn.group_norm_backward(dy=dy, **arguments)
    batch = len(dy)
    for part, copy in (
        (slice(0, 1), True),
        (slice(batch - 1, batch), False),
        (slice(7, 8), True),
        (slice(3, 6), False),
        (slice(None, None, 5), False),
        (slice(None, None, -1), False),
    ):
        pieces = _part({**arguments, "dy": dy}, part, copy)
        piece_dy = pieces.pop("dy")
        y, mean, rstd = cugn.group_norm_forward(**pieces)
        for value, wanted in ((y, whole.y), (mean, whole.mean), (rstd, whole.rstd)):
            _same(value, wanted[part])
        out = np.empty_like(pieces["x"])
        assert cugn.group_norm(**pieces, out=out) is out
        _same(out, whole.y[part])
        dx = cugn.group_norm_backward(dy=piece_dy, **pieces).dx
        _same(dx, gradients.dx[part])
        dx = cugn.group_norm_backward(dy=piece_dy, **pieces, out=out).dx
        _same(dx, gradients.dx[part])
    in_place = {**arguments, "x": arguments["x"].copy()}
    _same(cugn.group_norm(**in_place, out=in_place["x"]), whole.y)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sample_in_any_batch_of_every_function(dtype: str, last: bool) -> None:
    """The same for jvp, double backward, normalize and moments."""
    arguments, dy = _data("small", dtype, last, "plain", 20)
    x, groups, options = arguments["x"], arguments["groups"], {"channel_axis": arguments["channel_axis"]}
    ddx = dy[::-1].copy()
    m = cugn.moments(x, groups, **options)
    rstd = m.rstd()
    jvp = cugn.group_norm_jvp(dy, x, groups, **options)
    double = cugn.group_norm_double_backward(ddx, dy, x, groups, **options)
    y = cugn.normalize(x, m.mean, rstd, groups, **options)
    for n in range(len(x)):
        one = slice(n, n + 1)
        for value, whole in zip(cugn.moments(x[one], groups, **options), m, strict=True):
            _same(value, whole[one])
        _same(cugn.group_norm_jvp(dy[one], x[one], groups, **options), jvp[one])
        gdy, gx, _ = cugn.group_norm_double_backward(ddx[one], dy[one], x[one], groups, **options)
        _same(gdy, double.gdy[one])
        _same(gx, double.gx[one])
        _same(cugn.normalize(x[one], m.mean[one], rstd[one], groups, **options), y[one])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", ["odd", "blocks", "table", "large"])
def test_sample_in_a_slice_of_two_batch_axes(shape: str, dtype: str, last: bool) -> None:
    """Every other sample, in another order, in memory of another order: samples are not moved, and keep their bits."""
    C, spatial, groups = (4, (400_001,), 2) if shape == "large" else SHAPES[shape]
    rng = np.random.default_rng(2)
    x, dy = rng.normal(3, 1, (2, 2, 3, *((*spatial, C) if last else (C, *spatial)))).astype(dtype)
    options: dict[str, Any] = {"batch_axis": (0, 1), "channel_axis": -1 if last else 2}
    y = cugn.group_norm(x, groups, **options)
    dx = cugn.group_norm_backward(dy, x, groups, **options).dx
    for at in (np.s_[::-1], np.s_[:, ::2], np.s_[:, ::-1], np.s_[1:, 1:]):
        np.testing.assert_array_equal(cugn.group_norm(x[at], groups, **options), y[at])
        for v in (dy[at], dy[at].copy()):
            np.testing.assert_array_equal(cugn.group_norm_backward(v, x[at], groups, **options).dx, dx[at])
    turned = x.swapaxes(0, 1).copy().swapaxes(0, 1)
    np.testing.assert_array_equal(cugn.group_norm(turned, groups, **options), y)
    np.testing.assert_array_equal(cugn.group_norm_backward(dy, turned, groups, **options).dx, dx)


@pytest.mark.rare(when=lambda dtype, options: is_rare(dtype, labels="labels" in options, masks="where" in options))
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", ["plain", "labels", "where", "labels, where"])
@pytest.mark.parametrize("shape", ["blocks", "long", "table"])
def test_threads_and_runs(shape: str, options: str, dtype: str, last: bool) -> None:
    """All results, dweight and dbias of group and batch norm too, from run to run and for each number of threads."""
    arguments, dy = _data(shape, dtype, last, options, 100 if shape == "table" else 12)
    groups = arguments.pop("groups")

    def results() -> list[np.ndarray]:
        return [
            *cugn.group_norm_forward(groups=groups, **arguments),
            *cugn.group_norm_backward(dy=dy, groups=groups, **arguments),
            *cugn.batch_norm_forward(**arguments),
            *cugn.batch_norm_backward(dy=dy, **arguments),
        ]

    wanted = results()
    for count in (1, 2, 3):
        with threads(count):
            for _ in range(2):
                for value, expected in zip(results(), wanted, strict=True):
                    _same(value, expected)


def test_another_process() -> None:
    """A fresh process gives the same bits."""
    program = (
        "import numpy as np, cugn, hashlib; r = np.random.default_rng(0)\n"
        "x, dy = r.normal(9, 2, (2, 4, 32, 40, 40)).astype('f4')\n"
        "h = hashlib.sha256()\n"
        "for a in (*cugn.group_norm_forward(x, 8), *cugn.group_norm_backward(dy, x, 8)): h.update(a.tobytes())\n"
        "print(h.hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=subprocess_environment(NUMBA_NUM_THREADS=str(count)),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for count in (1, 2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 65


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_and_instance_norm_are_group_norm(shape: str, dtype: str, last: bool) -> None:
    """The difference from group norm with one group, and with a group a channel, is exactly zero."""
    arguments, dy = _data(shape, dtype, last, "plain", 3)
    del arguments["groups"]
    for name, groups in (("layer_norm", 1), ("instance_norm", SHAPES[shape][0])):
        for suffix, given in (("", {}), ("_forward", {}), ("_backward", {"dy": dy})):
            ours = getattr(cugn, name + suffix)(**given, **arguments)
            wanted = getattr(cugn, "group_norm" + suffix)(groups=groups, **given, **arguments)
            for a, b in zip(*((r,) if isinstance(r, np.ndarray) else r for r in (ours, wanted)), strict=True):
                assert np.abs(a.astype(np.float64) - b.astype(np.float64)).max() == 0


@pytest.mark.rare(when=lambda dtype, where: is_rare(dtype, labels=True, masks=where))
@pytest.mark.parametrize("where", [False, True], ids=["all", "where"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "one channel"])
def test_permuted_labels(shape: str, dtype: str, last: bool, where: bool) -> None:
    """Channels and labels permuted together: y, dx, dweight and dbias are permuted to the bit."""
    arguments, dy = _data(shape, dtype, last, "labels, where" if where else "labels", 2)
    if dtype != "float16":  # channels of very different size, so that the order of a sum would show
        arguments["x"] *= np.geomspace(1e-3, 1e3, arguments["x"].size).reshape(dy.shape).astype(dy.dtype)
    axis, C = arguments["channel_axis"], SHAPES[shape][0]
    y, mean, rstd = cugn.group_norm_forward(**arguments)
    gradients = cugn.group_norm_backward(dy=dy, **arguments)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(C)
        permuted = {
            **arguments,
            **{k: np.take(arguments[k], order, axis=axis) for k in ("x", "where") if k in arguments},
            **{k: arguments[k][order] for k in ("weight", "bias")},
            "groups": [arguments["groups"][c] for c in order],
        }
        other = cugn.group_norm_forward(**permuted)
        _same(other.y, np.take(y, order, axis=axis))
        _same(other.mean, mean)
        _same(other.rstd, rstd)
        result = cugn.group_norm_backward(dy=np.take(dy, order, axis=axis), **permuted)
        _same(result.dx, np.take(gradients.dx, order, axis=axis))
        _same(result.dweight, gradients.dweight[order])
        _same(result.dbias, gradients.dbias[order])


def test_relabelled_groups() -> None:
    """Names of the groups do not matter: y keeps its bits, the statistics are permuted."""
    arguments, _ = _data("blocks", "float32", False, "labels", 2)
    y, mean, _ = cugn.group_norm_forward(**arguments)
    names = np.array([2, 0, 3, 1])
    other = cugn.group_norm_forward(**{**arguments, "groups": names[arguments["groups"]]})
    _same(other.y, y)
    _same(other.mean[:, names], mean)


@pytest.mark.rare(when=lambda dtype, options: is_rare(dtype, labels=options == "labels"))
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", ["plain", "labels"])
def test_one_bad_value_spoils_its_group_only(special: float, dtype: str, options: str) -> None:
    """A NaN or Inf makes its own group NaN; every other group keeps its bits, forward and backward."""
    for last in (False, True):
        for shape in ("small", "blocks", "long"):
            arguments, dy = _data(shape, dtype, last, options, 3)
            y = cugn.group_norm(**arguments)
            dx, dweight, _ = cugn.group_norm_backward(dy=dy, **arguments)
            channels = SHAPES[shape][0]
            labels = np.asarray(arguments["groups"])
            if labels.ndim == 0:
                labels = np.arange(channels) * int(labels) // channels
            bad = {**arguments, "x": arguments["x"].copy()}
            channel = channels // 2
            np.moveaxis(bad["x"], arguments["channel_axis"], 1)[1, channel].flat[3] = special
            spoiled = np.zeros(y.shape, bool)
            np.moveaxis(spoiled, arguments["channel_axis"], 1)[1, labels == labels[channel]] = True
            with np.errstate(all="raise"):  # nor a warning
                other = cugn.group_norm(**bad)
                result = cugn.group_norm_backward(dy=dy, **bad)
            for value, wanted in ((other, y), (result.dx, dx)):
                assert np.isnan(value[spoiled].astype(np.float64)).all()
                _same(value[~spoiled], wanted[~spoiled])
            mine = labels == labels[channel]
            assert np.isnan(result.dweight[mine].astype(np.float64)).all()
            _same(result.dweight[~mine], dweight[~mine])


@pytest.mark.rare(when=lambda dtype, options: options != "plain" and dtype == "bfloat16")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", ["plain", "labels", "silu"])
def test_a_group_far_from_zero_leaves_the_others_alone(dtype: str, options: str) -> None:
    """Groups whose mean is many standard deviations are computed another way; that is seen in no other group's bits."""
    for last in (False, True):
        for shape in ("small", "blocks", "long"):
            arguments, dy = _data(shape, dtype, last, options, 2)
            channels = SHAPES[shape][0]
            labels = np.asarray(arguments["groups"])
            if labels.ndim == 0:
                labels = np.arange(channels) * int(labels) // channels
            mine = labels == labels[channels // 2]
            far = {**arguments, "x": arguments["x"].copy()}
            np.moveaxis(far["x"], arguments["channel_axis"], 1)[1, mine] += 30
            others = np.ones(dy.shape, bool)
            np.moveaxis(others, arguments["channel_axis"], 1)[1, mine] = False
            _same(cugn.group_norm(**far)[others], cugn.group_norm(**arguments)[others])
            dx, wanted = (cugn.group_norm_backward(dy=dy, **which).dx for which in (far, arguments))
            _same(dx[others], wanted[others])


@pytest.mark.parametrize("scale", [1e-200, 1e200, 0.0])
@pytest.mark.parametrize(("activation", "positions"), [("silu", 9), ("gelu", 1), (None, 2)])
def test_statistics_that_are_given_back(activation: str | None, positions: int, scale: float) -> None:
    """float64: a backward given the forward's statistics is the one without, also beside squares out of range."""
    rng = np.random.default_rng(5)
    x, dy = rng.normal(1e3, 1, size=(2, 3, 4, positions))
    x[1] *= scale
    groups = 4 if positions > 1 else 2
    eps = 0.0 if activation is None else 1e-5
    _, mean, rstd = cugn.group_norm_forward(x, groups, eps=eps)
    options: dict[str, Any] = {"activation": activation, "eps": eps}
    given = cugn.group_norm_backward(dy, x, groups, mean=mean, rstd=rstd, **options)
    without = cugn.group_norm_backward(dy, x, groups, **options)
    alone = cugn.group_norm_backward(dy[:1], x[:1], groups, mean=mean[:1], rstd=rstd[:1], **options)
    assert given.dx.tobytes() == without.dx.tobytes()
    assert given.dx[:1].tobytes() == alone.dx.tobytes()
