"""Promise: jvp and double backward keep the bounds of the backward, in every dtype, memory order and activation.

The bounds are those of dx: FACTOR roundings of the largest sum of terms in the group, since the terms may cancel. For
float64 that is far within 1e-10.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from libraries import FLOATS, dtype_of, threads

import cugn

FACTOR = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 8}
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")
LAYOUTS = ("first", "last", "first, strided", "last, strided")
# every pair of dtype and activation, of dtype and layout, of activation and layout: 3 s to compile each the first time
CELLS = [
    *(
        (dtype, activation, LAYOUTS[(i + j) % len(LAYOUTS)])
        for i, dtype in enumerate(FLOATS)
        for j, activation in enumerate(ACTIVATIONS)
    ),
    ("uint8", None, "last"),
    ("uint8", "silu", "first"),
]
USUAL = (("float32", None), ("float16", "silu"), ("bfloat16", None))
LARGE_CELLS = [
    *(("float32", None, layout) for layout in ("first", "last", "first, strided")),
    *(("float64", activation, layout) for activation, layout in (("relu", "first"), (None, "last, strided"))),
]
SMALL_CELLS = [("float32", None, "first"), ("float16", "silu", "last"), ("float64", "gelu", "last")]
# channels, groups, positions: tails of vectors; runs of several vectors; several chunks of both kinds of layout
SHAPES = {"small": (6, 3, (5, 7)), "short": (8, 2, (3,)), "blocks": (4, 2, (50, 41)), "long": (2, 1, (9000,))}
# what is beside plain groups, in the cells that between them have every loop of it
FORM_CELLS = [
    ("batch norm", "float32", "silu", "last"),
    ("labels", "float32", "silu", "first"),
    ("labels", "float64", None, "last"),
    ("where", "float32", "silu", "last"),
    ("where", "float64", "gelu", "first"),
    ("labels, where", "float32", None, "last, strided"),
    ("labels, where", "float16", "silu", "first"),
]


class Call:
    """Arrays of a call, in the memory order of a layout."""

    def __init__(
        self, dtype: str, activation: str | None, layout: str, shape: str, form: str, samples: int = 2
    ) -> None:
        rng = np.random.default_rng(5)
        channels, groups, positions = SHAPES[shape]
        self.y_dtype = "float32" if dtype == "uint8" else dtype
        self.axis = -1 if "last" in layout else 1
        sizes = (samples, *positions, channels) if "last" in layout else (samples, channels, *positions)
        x = rng.integers(0, 256, sizes) if dtype == "uint8" else rng.normal(3, 2, sizes)
        self.x = self.laid_out(x, dtype, layout)
        self.u, self.dy = (self.laid_out(a, self.y_dtype, layout) for a in rng.normal(0.5, 1, size=(2, *sizes)))
        self.vectors = [v.astype(dtype_of(self.y_dtype)) for v in rng.normal(size=(4, channels))]
        self.groups: Any = channels if form == "batch norm" else groups
        self.options = {"channel_axis": self.axis, "activation": activation}
        if form == "batch norm":
            self.options["batch_axis"] = None
        if "labels" in form:
            self.groups = [0, *(1 + c % (groups - 1) for c in range(channels - 2)), 0]
        if form == "where":
            self.options["where"] = rng.random(sizes) < 0.6
        elif "where" in form:  # one for all channels
            sizes = tuple(1 if axis == self.axis % len(sizes) else n for axis, n in enumerate(sizes))
            self.options["where"] = rng.random(sizes) < 0.6

    @staticmethod
    def laid_out(a: np.ndarray, dtype: str, layout: str) -> np.ndarray:
        """The values in an array of this memory order."""
        a = a.astype(dtype_of(dtype))
        if "strided" not in layout:
            return a
        wide = np.zeros(tuple(n + 2 for n in a.shape), a.dtype)
        inside = wide[tuple(slice(-2, 0, -1) for _ in a.shape)]
        inside[...] = a
        return inside

    def jvp(self, part: Any = slice(None), **options: Any) -> np.ndarray:
        """The tangent of some samples."""
        weight, bias, tweight, tbias = self.vectors
        arguments = (self.u[part], self.x[part], self.groups, weight, bias)
        return cugn.group_norm_jvp(*arguments, tweight=tweight, tbias=tbias, **self.of(part), **options)

    def double(self, part: Any = slice(None)) -> list[np.ndarray]:
        """gdy, gx, gweight and gbias of some samples."""
        weight, bias, tweight, tbias = self.vectors
        arguments = (self.u[part], self.dy[part], self.x[part], self.groups, weight, bias)
        result = cugn.group_norm_double_backward(*arguments, ddweight=tweight, ddbias=tbias, **self.of(part))
        return [*result, result.gbias]

    def of(self, part: Any) -> dict[str, Any]:
        """The keywords for some samples."""
        return {**self.options, "where": self.options["where"][part]} if "where" in self.options else self.options

    def expected(self) -> oracle.Second:
        """What it has to be."""
        return oracle.second(self.u, self.dy, self.x, self.groups, *self.vectors, **self.options)


def within(value: np.ndarray, expected: Any, terms: Any, dtype: str) -> None:
    """FACTOR roundings of the terms; the 16-bit types round once more when they are stored."""
    assert value.dtype == dtype_of(dtype)
    error = np.abs(value.astype(np.float64).astype(oracle.LONG) - expected)
    bound = FACTOR[dtype] * oracle.epsilon(dtype_of(dtype)) * terms
    bound = bound + oracle.half_ulp(expected, dtype_of(dtype))
    assert (error <= bound).all(), f"{float((error / bound).max()):.3g} times the bound"


def check(call: Call) -> None:
    """All results of a call against the oracle."""
    expected = call.expected()
    within(call.jvp(), expected.gdy, expected.gdy_terms, call.y_dtype)
    for value, wanted, terms in zip(call.double(), expected[:4], expected[4:], strict=True):
        within(value, wanted, terms, call.y_dtype)


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal to the bit."""
    assert a.tobytes() == b.tobytes()


def _rare(cell: tuple[str, str | None, str]) -> bool:
    """In all but float64 each dtype once: the loops of an activation are the same but for conversions."""
    return cell[0] != "float64" and cell[:2] not in USUAL


@pytest.mark.rare(when=_rare)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}, {cell[2]}")
def test_values(cell: tuple[str, str | None, str]) -> None:
    """ty, gdy, gx, gweight and gbias are the oracle's."""
    check(Call(*cell, "small", "plain"))


@pytest.mark.rare(when=lambda activation: activation is not None)
@pytest.mark.parametrize(("form", "dtype", "activation", "layout"), FORM_CELLS)
def test_values_of_other_groups(form: str, dtype: str, activation: str | None, layout: str) -> None:
    """The same in batch norm, label groups and under masks, with the same bits for any number of threads."""
    call = Call(dtype, activation, layout, "small", form)
    check(call)
    ty, double = call.jvp(), call.double()
    for count in (1, 3):
        with threads(count):
            same(call.jvp(), ty)
            for value, wanted in zip(call.double(), double, strict=True):
                same(value, wanted)
    if form != "batch norm":
        gdy, gx, _, _ = call.double(slice(1, 2))
        same(gdy, double[0][1:2])
        same(gx, double[1][1:2])


@pytest.mark.rare(when=lambda dtype: dtype == "float32")
@pytest.mark.parametrize(("dtype", "activation"), [("float64", None), ("float32", "silu")])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_permuted_labels(layout: str, dtype: str, activation: str | None) -> None:
    """Channels and labels permuted together: every result is permuted to the bit."""
    call = Call(dtype, activation, layout, "small", "labels")
    wanted = [call.jvp(), *call.double()]
    order = np.random.default_rng(3).permutation(len(call.groups))
    call.x, call.u, call.dy = (np.take(a, order, axis=call.axis) for a in (call.x, call.u, call.dy))
    call.vectors = [v[order] for v in call.vectors]
    call.groups = [call.groups[c] for c in order]
    for value, before in zip([call.jvp(), *call.double()], wanted, strict=True):
        same(value, np.take(before, order, axis=call.axis if value.ndim > 1 else 0))


@pytest.mark.rare(when=lambda cell: cell[0] != "float32")
@pytest.mark.parametrize("cell", SMALL_CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}, {cell[2]}")
def test_values_of_small_groups(cell: tuple[str, str | None, str]) -> None:
    """The same where a group has twelve elements, which are computed in float64."""
    check(Call(*cell, "short", "plain"))


@pytest.mark.parametrize("cell", LARGE_CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}, {cell[2]}")
@pytest.mark.parametrize("shape", ["blocks", "long"])
def test_values_of_large_groups(shape: str, cell: tuple[str, str | None, str]) -> None:
    """The same where a group is several blocks and chunks."""
    check(Call(*cell, shape, "plain"))


@pytest.mark.rare(when=_rare)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}, {cell[2]}")
def test_bits(cell: tuple[str, str | None, str]) -> None:
    """The same bits for any number of threads, in any batch, into out, and into tx itself."""
    for shape in ("small", "blocks"):
        call = Call(*cell, shape, "plain", samples=5)
        ty, double = call.jvp(), call.double()
        for count in (1, 2, 3):
            with threads(count):
                same(call.jvp(), ty)
                for value, wanted in zip(call.double(), double, strict=True):
                    same(value, wanted)
        part = slice(2, 3)
        same(call.jvp(part), ty[part])
        gdy, gx, _, _ = call.double(part)
        same(gdy, double[0][part])
        same(gx, double[1][part])
        same(double[0], ty)
        out = np.empty_like(ty)
        assert call.jvp(out=out) is out
        same(out, ty)
        call.u = call.u.copy()
        assert call.jvp(out=call.u) is call.u
        same(call.u, ty)


@pytest.mark.rare(when=lambda activation: activation is not None)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_split_tasks(activation: str | None) -> None:
    """Samples larger than a thread's cache, taken by several threads: values against small parts, bits by threads."""
    rng = np.random.default_rng(1)
    u, dy, x = rng.normal(1, 2, size=(3, 1, 2, 600, 700)).astype(np.float32)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            double = cugn.group_norm_double_backward(u, dy, x, 1, activation=activation)
            results.append([cugn.group_norm_jvp(u, x, 1, activation=activation), *double])
    for result in results[1:]:
        for value, wanted in zip(result, results[0], strict=True):
            same(value, wanted)
    expected = oracle.second(u, dy, x, 1, activation=activation)
    within(results[0][0], expected.gdy, expected.gdy_terms, "float32")
    for value, wanted, terms in zip(results[0][1:], expected[:3], expected[4:7], strict=True):
        within(value, wanted, terms, "float32")


@pytest.mark.rare(when=lambda dtype: dtype in ("float16", "bfloat16"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_groups_of_one_element(dtype: str) -> None:
    """y is the bias there, so nothing depends on x: gx and the tangent along x are exactly 0."""
    rng = np.random.default_rng(2)
    u, dy, x = rng.normal(size=(3, 3, 8)).astype(dtype_of(dtype))
    weight = rng.normal(size=8).astype(dtype_of(dtype))
    for activation in (None, "silu"):
        assert not cugn.group_norm_jvp(u, x, 8, weight, activation=activation).any()
        result = cugn.group_norm_double_backward(u, dy, x, 8, weight, ddweight=weight, activation=activation)
        assert not result.gx.any()


@pytest.mark.rare(when=lambda dtype, layout: dtype != "float64" and (dtype, layout) != ("float16", "first"))
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_bad_value_spoils_its_group_only(dtype: str, layout: str) -> None:
    """A NaN makes its own group NaN; every other one keeps its bits."""
    call = Call(dtype, "silu", layout, "small", "plain", samples=3)
    ty, double = call.jvp(), call.double()
    spoiled = np.zeros(call.x.shape, bool)
    np.moveaxis(spoiled, call.axis, 1)[1, 2:4] = True
    for name in ("x", "u", "dy"):
        bad = Call(dtype, "silu", layout, "small", "plain", samples=3)
        np.moveaxis(getattr(bad, name), call.axis, 1)[1, 3, 2, 2] = np.nan
        gdy, gx, _, _ = bad.double()
        values = [(gx, double[1])]
        if name != "dy":
            values += [(gdy, double[0]), (bad.jvp(), ty)]
        for value, wanted in values:
            assert np.isnan(value[spoiled].astype(np.float64)).all()
            same(value[~spoiled], wanted[~spoiled])
