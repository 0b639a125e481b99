"""Promise: any strides, axes and memory order are taken as they are, give the right values, and are left unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calls
import numpy as np
import oracle
import pytest
from libraries import FLOATS, dtype_of, is_rare
from test_accuracy import check_gradients, check_y

import cugn
from cugn import engines
from cugn.layout import Layout

SHAPE, GROUPS = (3, 8, 5, 6), 4


def _dense(order: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Contiguous with the axes in this order of memory."""
    return lambda a: np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def _strided(steps: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """A view with these steps of a larger (or flipped) array."""

    def make(a: np.ndarray) -> np.ndarray:
        base = np.full([n * abs(s) + 1 for n, s in zip(a.shape, steps, strict=True)], 7, dtype=a.dtype)
        view = base[tuple(slice(1, None, abs(s)) for s in steps)]
        view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
        view[...] = a
        return view

    return make


def _field(a: np.ndarray) -> np.ndarray:
    """A field of a structured array whose strides are no multiple of the element's size."""
    record = np.zeros(a.shape, dtype=[("tag", "u1"), ("value", a.dtype), ("rest", "u2")])
    record["value"] = a
    return record["value"]


def _misaligned(a: np.ndarray) -> np.ndarray:
    """Contiguous, at an odd address."""
    base = np.zeros(a.nbytes + 1, dtype=np.uint8)
    view = base[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned or a.itemsize == 1
    return view


def _byte_swapped(a: np.ndarray) -> np.ndarray:
    """The other byte order, as FITS files have it."""
    return a.astype(a.dtype.newbyteorder())


def _memmap(a: np.ndarray) -> np.ndarray:
    """A file mapped into memory."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        view = np.memmap(file.name, dtype=a.dtype, mode="w+", shape=a.shape)
    view[...] = a
    return view


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "channels last": _dense((0, 2, 3, 1)),
    "channels last, axes swapped": _dense((0, 3, 2, 1)),
    "channels in the middle": _dense((0, 2, 1, 3)),
    "channels outermost": _dense((1, 0, 2, 3)),
    "samples innermost": _dense((2, 3, 1, 0)),
    "spatial axes swapped": _dense((0, 1, 3, 2)),
    "cropped": lambda a: _strided((1, 1, 1, 1))(a),
    "every second sample": _strided((2, 1, 1, 1)),
    "every second channel": _strided((1, 2, 1, 1)),
    "every third column": _strided((1, 1, 1, 3)),
    "samples flipped": _strided((-1, 1, 1, 1)),
    "channels flipped": _strided((1, -1, 1, 1)),
    "rows flipped": _strided((1, 1, -1, 1)),
    "all flipped": lambda a: a[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "channels last, rows flipped": lambda a: _dense((0, 2, 3, 1))(a[:, :, ::-1])[:, :, ::-1],
    "channels last, cropped": lambda a: _strided((1, 1, 1, 1))(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "misaligned": _misaligned,
    "field of a structured array": _field,
    "memory map": _memmap,
    "read-only": _read_only,
    "byte-swapped": _byte_swapped,
}
BROADCAST = {"samples": (1, 8, 5, 6), "channels": (3, 1, 5, 6), "rows": (3, 8, 1, 6), "all": (1, 1, 1, 1)}


def _arrays(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    names = (("x", SHAPE), ("dy", SHAPE), ("weight", (8,)), ("bias", (8,)))
    return {name: rng.normal(3, 2, size=shape).astype(dtype_of(dtype)) for name, shape in names}


def _bytes(*arrays: np.ndarray) -> list[bytes]:
    return [a.tobytes() for a in arrays]


@pytest.mark.rare(when=lambda layout, dtype: is_rare(dtype, strides=layout not in ("C", "channels last")))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, dtype: str) -> None:
    """Forward and backward of x, dy, weight, bias and out in any layout keep the bounds and the inputs."""
    if layout == "byte-swapped" and dtype == "bfloat16":
        pytest.skip("ml_dtypes has no byte order")
    a = _arrays(dtype)
    x, dy = LAYOUTS[layout](a["x"]), LAYOUTS[layout](a["dy"])
    vectors = [np.repeat(a[k], 2)[::2] for k in ("weight", "bias")]
    forward, backward = (
        oracle.forward(a["x"], GROUPS, a["weight"], a["bias"]),
        oracle.backward(a["dy"], a["x"], GROUPS, a["weight"], a["bias"]),
    )
    before = _bytes(x, dy)
    y, mean, rstd = cugn.group_norm_forward(x, GROUPS, *vectors)
    assert y.dtype == x.dtype
    check_y(y.astype(dtype_of(dtype)), forward, dtype, layout)
    for others in ((dy, x), (a["dy"], x), (dy, a["x"])):
        result = cugn.group_norm_backward(*others, GROUPS, *vectors, mean=mean, rstd=rstd)
        check_gradients(_native(result, dtype), backward, dtype, layout)
    assert _bytes(x, dy) == before
    for out in (LAYOUTS["C"](np.zeros_like(a["x"])), LAYOUTS[layout](np.zeros(SHAPE, dtype_of(dtype)))):
        if out.flags.writeable:
            assert cugn.group_norm(x, GROUPS, *vectors, out=out) is out
            check_y(out.astype(dtype_of(dtype)), forward, dtype, f"{layout}, out")
            cugn.group_norm_backward(dy, x, GROUPS, *vectors, out=out)
            check_gradients(_native(result._replace(dx=out), dtype), backward, dtype, f"{layout}, out")
    assert _bytes(x, dy) == before
    if x.flags.writeable:
        assert cugn.group_norm(x, GROUPS, *vectors, out=x) is x
        check_y(x.astype(dtype_of(dtype)), forward, dtype, f"{layout}, in place")


def _native(gradients: Any, dtype: str) -> Any:
    return gradients._replace(**{k: v.astype(dtype_of(dtype)) for k, v in gradients._asdict().items()})


def test_surroundings_of_a_view_stay() -> None:
    """Writing to a view leaves the elements between and around its own untouched."""
    for make in (_strided((2, 3, 2, 2)), _strided((1, -2, 1, -1)), _strided((1, 1, 1, 1))):
        out = make(np.zeros(SHAPE, np.float32))
        base = out.base if out.base.base is None else out.base.base
        cugn.group_norm(_arrays("float32")["x"], GROUPS, out=out)
        inside = np.zeros(base.shape, bool)
        start = (out.ctypes.data - base.ctypes.data) // 4
        offsets = sum(np.ix_(*[np.arange(n) * (s // 4) for n, s in zip(out.shape, out.strides, strict=True)]))
        inside.reshape(-1)[start + offsets] = True
        assert (base[~inside] == 7).all()
        assert inside.sum() == out.size


@pytest.mark.parametrize("shape", BROADCAST)
def test_broadcast(shape: str) -> None:
    """Broadcast x and dy (strides of 0) are taken as they are."""
    rng = np.random.default_rng(0)
    x, dy = (np.broadcast_to(rng.normal(size=BROADCAST[shape]), SHAPE) for _ in range(2))
    x_full = x.copy()
    for a, b in ((x, dy), (x, dy.copy()), (x_full, dy)):
        y = cugn.group_norm(a, GROUPS)
        assert y.strides == np.zeros(SHAPE).strides or y.flags.c_contiguous or y.size == np.prod(SHAPE)
        assert y.flags.writeable
        check_y(y, oracle.forward(x_full, GROUPS), "float64", shape)
        result, wanted = cugn.group_norm_backward(b, a, GROUPS), oracle.backward(dy, x_full, GROUPS)
        error = np.abs(result.dx - wanted.dx)
        assert (error <= 8 * 2.0**-52 * wanted.terms).all()  # constant groups: dx is a difference of equal terms


@pytest.mark.parametrize("function", calls.FUNCTIONS)
@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k not in ("C", "read-only")])
def test_every_function(layout: str, function: str) -> None:
    """Every function: arrays of one layout, or of different ones, give what contiguous ones give."""
    for optional in (True, False):
        kwargs = calls.arguments(function, optional=optional, dtype=np.float64)
        kwargs.pop("out", None)
        wanted = calls.call(function, kwargs)
        for names in (("x",), ("x", "dy", "ddx", "tx"), ("dy", "ddx", "tx", "where")):
            changed = {
                k: LAYOUTS[layout](v)
                if k in names and v.dtype != bool
                else _strided((2, 1, 1, -1))(v)
                if k in names
                else v
                for k, v in kwargs.items()
                if isinstance(v, np.ndarray)
            }
            result = calls.call(function, {**kwargs, **changed})
            results = (r if isinstance(r, tuple) else (r,) for r in (result, wanted))
            for a, b in zip(*results, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


MASK_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "channels last": _dense((0, 2, 3, 1)),
    "every other, backwards": _strided((2, -1, 1, -2)),
}


@pytest.mark.parametrize("labels", [False, True], ids=["equal", "labels"])
@pytest.mark.parametrize("layout", ["C", "channels last", "every other, backwards"])
def test_masks_of_any_strides(layout: str, labels: bool) -> None:
    """A mask that broadcasts, of zero strides, or of another memory order than x: the bits of a contiguous one."""
    rng = np.random.default_rng(6)
    shape = (2, 8, 11, 19)
    x, dy = (MASK_LAYOUTS[layout](rng.normal(size=shape).astype(np.float32)) for _ in range(2))
    groups: Any = [0, 1, 1, 2, 0, 2, 0, 1] if labels else GROUPS

    def results(where: np.ndarray) -> list[np.ndarray]:
        forward = cugn.group_norm_forward(x, groups, where=where)
        given = {"mean": forward.mean, "rstd": forward.rstd, "where": where}
        return [*forward, *cugn.group_norm_backward(dy, x, groups, where=where),
                *cugn.group_norm_backward(dy, x, groups, **given), *cugn.moments(x, groups, where=where)]  # fmt: skip

    for kept in itertools.product((False, True), repeat=4):
        small = rng.random([n if k else 1 for n, k in zip(shape, kept, strict=True)]) < 0.7
        small[0] = True
        wanted = results(np.ascontiguousarray(np.broadcast_to(small, shape)))
        forms = {name: place(small) for name, place in MASK_LAYOUTS.items()}
        forms["zero strides"] = np.broadcast_to(small, shape)
        forms["fewer axes"] = np.asarray(small[tuple(0 for _ in itertools.takewhile(lambda k: not k, kept))])
        for name, where in forms.items():
            for got, value in zip(results(where), wanted, strict=True):
                np.testing.assert_array_equal(got, value, err_msg=f"{kept}, {name}")


@pytest.mark.parametrize("layout", ["C", "Fortran", "channels last", "channels in the middle", "spatial axes swapped"])
def test_result_has_the_memory_order_of_x(layout: str) -> None:
    """y and dx lie in memory as x (dy) does, so that what follows meets the same layout."""
    a = _arrays("float32")
    x, dy = LAYOUTS[layout](a["x"]), LAYOUTS[layout](a["dy"])
    call = (x, GROUPS, (), 1e-5, 1, 0, None)
    if engines.resolve("forward", *call)[0].__name__ != "cugn.cpu":
        pytest.skip("no compiled engine here: the reference's results are in the order in which it computes")
    assert cugn.group_norm(x, GROUPS).strides == x.strides
    assert cugn.group_norm_backward(dy, x, GROUPS).dx.strides == x.strides


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (6, 7), (4,), (2, 3, 4, 1, 5), (2, 2, 3, 2, 2, 3)])
def test_every_choice_of_axes(shape: tuple[int, ...]) -> None:
    """Each channel axis with each set of batch axes, negative ones too."""
    x = np.random.default_rng(0).normal(size=shape)
    dy = x[::-1].copy()
    axes = range(len(shape))
    for channel in axes:
        rest = [a for a in axes if a != channel]
        for count in range(len(rest) + 1):
            for batch in itertools.islice(itertools.permutations(rest, count), 8):
                given: dict[str, Any] = {"channel_axis": channel, "batch_axis": batch}
                expected = oracle.forward(x, 1, **given)
                negative = {"channel_axis": channel - len(shape), "batch_axis": tuple(b - len(shape) for b in batch)}
                for options in (given, negative):
                    y, mean, _ = cugn.group_norm_forward(x, 1, **options)
                    assert mean.shape == (*[shape[b] for b in batch], 1)
                    check_y(y, expected, "float64", str(given))
                    np.testing.assert_allclose(mean, expected.mean.astype(float), atol=1e-15)
                result, wanted = cugn.group_norm_backward(dy, x, 1, **given), oracle.backward(dy, x, 1, **given)
                assert (np.abs(result.dx - wanted.dx) <= 8 * 2.0**-52 * wanted.terms).all()


LAYOUT_CASES = {
    # name: (array, batch axes, channel axis) -> kind, (N, outer, C, inner), (sn, so)
    "channels first": (np.zeros((2, 3, 4, 5)), (0,), 1, "dense", (2, 1, 3, 20), (60, 60)),
    "channels last": (np.zeros((2, 4, 5, 3)), (0,), 3, "dense", (2, 20, 3, 1), (60, 3)),
    "channels last view": (np.zeros((2, 4, 5, 3)).transpose(0, 3, 1, 2), (0,), 1, "dense", (2, 20, 3, 1), (60, 3)),
    "Fortran": (np.zeros((2, 3, 4, 5), order="F"), (0,), 1, "strided", (2, 20, 3, 1), None),
    "batch norm": (np.zeros((2, 3, 4, 5)), (), 1, "dense", (1, 2, 3, 20), (120, 60)),
    "two batch axes": (np.zeros((2, 3, 4, 5)), (0, 1), 2, "dense", (6, 1, 4, 5), (20, 20)),
    "batch axes reversed": (np.zeros((2, 3, 4, 5)), (1, 0), 2, "samples", (6, 1, 4, 5), (0, 20)),
    "channels in the middle": (np.zeros((2, 4, 3, 5)), (0,), 2, "dense", (2, 4, 3, 5), (60, 15)),
    "table": (np.zeros((7, 3)), (0,), 1, "dense", (7, 1, 3, 1), (3, 3)),
    "one sample": (np.zeros((3, 5)), (), 0, "dense", (1, 1, 3, 5), (15, 15)),
    "sample sliced": (np.zeros((4, 3, 5))[::2], (0,), 1, "dense", (2, 1, 3, 5), (30, 15)),
    "samples flipped": (np.zeros((4, 3, 5))[::-1], (0,), 1, "dense", (4, 1, 3, 5), (-15, 15)),
    "sample broadcast": (np.broadcast_to(np.zeros((3, 5)), (4, 3, 5)), (0,), 1, "dense", (4, 1, 3, 5), (0, 15)),
    "rows flipped": (np.zeros((2, 3, 5))[:, :, ::-1], (0,), 1, "strided", (2, 1, 3, 5), None),
    "channels sliced": (np.zeros((2, 6, 5))[:, ::2], (0,), 1, "strided", (2, 1, 3, 5), None),
    "cropped": (np.zeros((2, 3, 4, 6))[..., 1:], (0,), 1, "strided", (2, 1, 3, 20), None),
    "one channel": (np.zeros((2, 1, 4, 5)), (0,), 1, "dense", (2, 1, 1, 20), (20, 20)),
    "one channel, last": (np.zeros((2, 4, 5, 1)), (0,), 3, "dense", (2, 1, 1, 20), (20, 20)),
    "one channel, every other element": (np.zeros((2, 1, 8))[:, :, ::2], (0,), 1, "dense", (2, 4, 1, 1), (8, 2)),
    "axes of one element": (np.zeros((2, 1, 3, 1, 5, 1)), (0,), 2, "dense", (2, 1, 3, 5), (15, 15)),
}


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layout_of(name: str) -> None:
    """The description of each layout, and that it addresses each element."""
    a, batch, channel, kind, sizes, strides = LAYOUT_CASES[name]
    elements = [s // a.itemsize for s in a.strides]
    layout = Layout.of(a.shape, batch, channel, [elements, elements])
    assert (layout.kind, (layout.N, layout.outer, layout.C, layout.inner)) == (kind, sizes)
    assert sorted(layout.axes) == list(range(a.ndim))
    assert layout.strides == (() if strides is None else (strides, strides))


def test_dense_layouts_address_every_element() -> None:
    """For all orders and steps of four axes: what is called dense is, element by element."""
    values = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    dense = 0
    for order in itertools.permutations(range(4)):
        for steps in itertools.product((1, -1, 2), repeat=4):
            a = _strided(steps)(_dense(order)(values)) if steps != (1, 1, 1, 1) else _dense(order)(values)
            for batch, channel in (((0,), 1), ((), 1), ((0,), 3), ((0, 2), 1), ((2, 0), 3)):
                elements = [s // a.itemsize for s in a.strides]
                layout = Layout.of(a.shape, batch, channel, [elements])
                if layout.kind != "dense":
                    continue
                dense += 1
                (sn, so) = layout.strides[0]
                view = np.lib.stride_tricks.as_strided(
                    a[tuple(slice(0, 1) for _ in range(4))],
                    (layout.N, layout.outer, layout.C, layout.inner),
                    [s * a.itemsize for s in (sn, so, layout.inner, 1)],
                )
                np.testing.assert_array_equal(view, values.transpose(layout.axes).reshape(view.shape))
    assert dense > 24


def test_layouts_of_two_arrays_that_differ() -> None:
    """Arrays whose orders differ have no common layout; those that differ in the batch stride alone have."""
    first, last = [60, 20, 5, 1], [60, 1, 15, 3]
    assert Layout.of((2, 3, 4, 5), (0,), 1, [first, last]).kind == "strided"
    assert Layout.of((2, 3, 4, 5), (0,), 1, [first, [120, 20, 5, 1]]).strides == ((60, 60), (120, 60))


def test_memory_map_of_a_file(tmp_path: Path) -> None:
    """A file is read and written in place."""
    path = tmp_path / "x.npy"
    x = np.random.default_rng(0).normal(size=(2, 4, 100)).astype(np.float32)
    np.save(path, x)
    mapped = np.load(path, mmap_mode="r+")
    assert cugn.group_norm(mapped, 2, out=mapped) is mapped
    mapped.flush()
    check_y(np.load(path), oracle.forward(x, 2), "float32", "file")
    read_only = np.load(path, mmap_mode="r")
    with pytest.raises(ValueError, match="out is read-only"):
        cugn.group_norm(read_only, 2, out=read_only)
