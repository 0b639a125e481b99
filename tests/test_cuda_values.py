"""The CUDA kernels compute what is promised, without a fault, for every dtype, layout, shape and order of execution.

No GPU is needed: CuPy's arrays lie in host memory and the kernels run on the emulator (simt/README.md). In check mode
each access is looked at, and a race, an access out of bounds or a value that was never written is an error; the
accuracy table and the bit-for-bit comparisons run in fast mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import simt
import test_accuracy as table
from covering import pairwise
from cuda_on_cpu import EMULATOR_NEEDED, NEEDED, ON_DEVICE, emulated
from gpu import bits as record
from libraries import FLOATS, Library, dtype_of
from simt import host_cupy
from test_accuracy import check_gradients, check_y

import cugn

pytestmark = NEEDED


def random(shape: tuple[int, ...], dtype: str, *parameters: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """x, dy, weight, bias; parameters may have a dtype of their own."""
    rng = np.random.default_rng(seed)
    own = dtype_of(parameters[0] if parameters else dtype)
    x, dy = rng.normal(3, 2, shape).astype(dtype_of(dtype)), rng.normal(size=shape).astype(dtype_of(dtype))
    return x, dy, rng.normal(size=shape[1]).astype(own), rng.normal(size=shape[1]).astype(own)


def channels_last(a: np.ndarray) -> np.ndarray:
    """The same values, channels fastest in memory and last in the shape."""
    return np.ascontiguousarray(np.moveaxis(a, 1, -1))


def check_statistics(mean: np.ndarray, rstd: np.ndarray, expected: oracle.Forward, dtype: str) -> None:
    """mean and rstd, as accurate as y needs them.

    float64 arrays: as the CPU engine's. Others are summed in float32 over 16 elements, then in float64: half a unit in
    the last place for each addition and the difference before it, of numbers no larger than 16 deviations.
    """
    assert mean.dtype == rstd.dtype == np.float64
    relative = 1e-14 if dtype == "float64" else 8 * 2.0**-24
    with np.errstate(all="ignore"):
        std = np.sqrt(expected.m2 / expected.count)
        # a mean is corrected by the mean of the deviations from it: relative to them, not to it
        bound = 4 * 2.0**-52 * (np.abs(expected.mean) + std) + (0 if dtype == "float64" else relative * std)
        assert (np.abs(mean - expected.mean) <= bound + 2.0**-1074).all()
        np.testing.assert_allclose(rstd, expected.rstd.astype(np.float64), rtol=relative)  # 1e-320 has an infinite one


def check_call(library: Library, arrays: tuple[np.ndarray, ...], groups: Any, last: bool, **options: Any) -> None:
    """Forward and backward of one call against the oracle."""
    x, dy, weight, bias = arrays
    dtype = x.dtype.name
    turn = channels_last if last else np.asarray
    back = (lambda a: np.moveaxis(a, -1, 1)) if last else np.asarray
    device = {"channel_axis": -1 if last else 1, **options}
    if "where" in options:
        device["where"] = library.array(turn(options["where"]))
    X, DY, W, B = (library.array(v) for v in (turn(x), turn(dy), weight, bias))
    expected = oracle.forward(x, groups, weight, bias, **options)
    result = cugn.group_norm_forward(X, groups, W, B, **device)
    check_y(back(library.numpy(result.y)), expected, dtype, f"{x.shape}, {groups}, {last=}")
    check_statistics(library.numpy(result.mean), library.numpy(result.rstd), expected, dtype)
    gradients = oracle.backward(dy, x, groups, weight, bias, **options)
    if x.size // max(1, len(x)) // np.size(np.unique(oracle.labels_of(groups, x.shape[1]))) < 32:
        # dx of a group of a few elements is a difference of numbers far larger than itself: relative to those
        gradients = gradients._replace(group_max=gradients.terms)
    for statistics in ({}, {"mean": result.mean, "rstd": result.rstd}):
        found = cugn.group_norm_backward(DY, X, groups, W, B, **statistics, **device)
        found = cugn.GroupNormGrads(
            back(library.numpy(found.dx)), library.numpy(found.dweight), library.numpy(found.dbias)
        )
        check_gradients(found, gradients, dtype, f"{x.shape}, {groups}, {last=}")


# ---------------------------------------------------------------- the accuracy table


@pytest.fixture
def subnormals(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulator flushes float64's subnormals together with float32's; the device leaves them."""
    flush = False if request.getfixturevalue("dtype") == "float64" else None
    with simt.using(flush_subnormals=flush):
        yield


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("row", "dtype"), table.CASES)
@pytest.mark.usefixtures("subnormals")
def test_accuracy(row: str, dtype: str, last: bool, fast: Library) -> None:
    """The table that the CPU engine is held to: every input, member of the family and layout, both directions."""
    x, weight, bias, dy = table._input(row, dtype, table.SHAPE)
    X, DY = (fast.array(channels_last(a) if last else a) for a in (x, dy))
    W, B = fast.array(weight), fast.array(bias)
    back = (lambda a: np.moveaxis(fast.numpy(a), -1, 1)) if last else fast.numpy
    options: dict[str, Any] = {"eps": table.ROWS[row].eps, "channel_axis": -1 if last else 1}
    for kind in table.KINDS:
        forward = table._expected_forward(row, dtype, table.SHAPE, kind)
        backward = table._expected_backward(row, dtype, table.SHAPE, kind)
        y, mean, rstd = table._function(kind, "_forward")(X, W, B, **options)
        check_y(back(y), forward, dtype, f"{kind} norm")
        check_statistics(fast.numpy(mean), fast.numpy(rstd), forward, dtype)
        if table.ROWS[row].backward is not None and dtype not in table.ROWS[row].backward:
            continue
        for statistics in ({}, {"mean": mean, "rstd": rstd}):
            found = table._function(kind, "_backward")(DY, X, W, **statistics, **options)
            found = cugn.GroupNormGrads(back(found.dx), fast.numpy(found.dweight), fast.numpy(found.dbias))
            check_gradients(found, backward, dtype, f"{kind} norm, statistics {sorted(statistics)}")


@pytest.mark.parametrize(("row", "dtype"), table.CASES)
@pytest.mark.usefixtures("subnormals")
def test_accuracy_of_normalize(row: str, dtype: str, fast: Library) -> None:
    """Statistics from elsewhere."""
    table.test_normalize(row, dtype, fast)


USUAL = dict(zip(FLOATS, ["gelu", "silu", "relu", "gelu_tanh"], strict=True))


@pytest.mark.rare(when=lambda dtype, activation: USUAL[dtype] != activation)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_accuracy_of_activations(dtype: str, activation: str, checked: Library) -> None:
    """Fused into both directions, of values further apart than in `test_options_together`, which has every pair."""
    table.test_activations(dtype, activation, checked)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [1.0, 1e4, 1e8, 3e38, 1e-30])
def test_one_element_a_group(dtype: str, value: float, fast: Library) -> None:
    """y is the bias, dx zero, exactly."""
    table.test_one_element_a_group(dtype, value, fast)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_accuracy_under_a_mask(dtype: str, offset: float, checked: Library) -> None:
    """The backward under `where`, of equal groups and of labels."""
    table.test_masked_backward(dtype, offset, checked)


# ---------------------------------------------------------------- shapes

# (N, C, spatial...), G: odd sizes, one spatial element, tiny groups many to a block, one group, one channel a group,
# rows that end in the middle of a vector, more channels than a block has threads, groups over several blocks.
SHAPES = [
    ((3, 6, 5, 7), 3),
    ((2, 8, 1, 1), 4),
    ((5, 8), 2),
    ((130, 4), 2),
    ((2, 64), 32),
    ((2, 12, 33), 3),
    ((1, 4, 50, 41), 2),
    ((2, 6, 3, 3), 6),
    ((2, 6, 17), 1),
    ((1, 64, 7), 32),
    ((4, 96, 4), 32),
    ((1, 1, 1), 1),
    ((1, 1, 1000), 1),
    ((2, 2, 8, 8, 9), 2),
    ((1, 1500, 3), 5),
    ((1, 2, 101, 103), 2),
    ((2, 40, 30), 5),
    ((1, 3, 2, 257), 1),
]


@pytest.mark.parametrize(("problem", "dtype", "last"), pairwise(SHAPES, FLOATS, (False, True)), ids=str)
def test_shapes(problem: tuple[tuple[int, ...], int], dtype: str, last: bool) -> None:
    """Every access checked, in two orders of execution."""
    shape, groups = problem
    arrays = random(shape, dtype)
    for seed in (0, 1 + sum(shape)):
        with emulated(seed=seed) as library:
            check_call(library, arrays, groups, last)


@EMULATOR_NEEDED
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_both_sides_of_the_largest_resident_group(dtype: str, last: bool, fast: Library) -> None:
    """The group that just fits in shared memory, and the next one, which is split over blocks."""

    def kernels(size: int, backward: bool) -> set[str]:
        shape = (1, size, 2) if last else (1, 2, size)
        x = host_cupy.sparse(shape, dtype_of(dtype), tuple(np.empty(shape, dtype_of(dtype)).strides))
        axis = {"channel_axis": -1 if last else 1}
        with simt.recorded() as launches:
            if backward:
                cugn.group_norm_backward(x, x, 1, **axis)
            else:
                cugn.group_norm(x, 1, **axis)
        return {launch.kernel for launch in launches}

    for backward in (False, True):
        low, high = 1, 1 << 17  # fits, does not
        resident, split = kernels(low, backward), kernels(high, backward)
        assert resident != split
        while high - low > 1:
            middle = (low + high) // 2
            if kernels(middle, backward) == split:
                high = middle
            else:
                low = middle
        shared = 227 << 10
        assert shared / 1.2 < 2 * low * dtype_of(dtype).itemsize * (1 + backward) < shared
        for size in (low, high):
            check_call(fast, random((1, 2, size), dtype), 1, last)
    with emulated(seed=1) as library:
        check_call(library, random((1, 2, high), dtype), 1, last)


@EMULATOR_NEEDED
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_both_sides_of_every_threshold(dtype: str, last: bool, fast: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one element to the largest resident group: where config.py chooses otherwise, the sizes before and after."""
    chosen: list[tuple[Any, ...]] = []

    def choice(self: Any, grid: Any, block: Any, args: Any, **_: Any) -> None:
        if self.name in ("forward", "backward"):
            _, _, _, _, _, samples, _, channels, *_, flat = args[:14]
            teams = args[14:17] if self.name == "backward" else args[14:15]
            chosen.append((self.name, block, int(samples), int(channels), int(flat), *map(int, teams)))

    def choices(size: int) -> tuple[Any, ...]:
        chosen.clear()
        shape = (5, size, 6) if last else (5, 6, size)
        x = host_cupy.sparse(shape, dtype_of(dtype), tuple(np.empty(shape, dtype_of(dtype)).strides))
        axis = {"channel_axis": -1 if last else 1}
        with monkeypatch.context() as patch:
            patch.setattr(simt.Kernel, "__call__", choice)
            cugn.group_norm(x, 3, **axis)
            cugn.group_norm_backward(x, x, 3, **axis)
        return tuple(chosen)

    sizes = [*range(1, 64), *(int(64 * 1.04**k) for k in range(1, 180))]
    found = [choices(size) for size in sizes]
    beside = set()
    for low, high, before, after in zip(sizes, sizes[1:], found, found[1:], strict=False):
        if before == after:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if choices(middle) == before else (low, middle)
        beside |= {low, high}
    assert len(beside) > 12
    for size in sorted(beside):
        check_call(fast, random((5, 6, size), dtype), 3, last)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("shape", "groups"), [((1, 4, 90_000), 1), ((1, 6, 70_001), 3), ((2, 64, 4_000), 2)], ids=str)
def test_large_groups(shape: tuple[int, ...], groups: int, dtype: str, last: bool, fast: Library) -> None:
    """Groups that no block holds: parts, merged in a fixed order."""
    check_call(fast, random(shape, dtype), groups, last)


@pytest.mark.parametrize(("shape", "groups"), [((0, 4, 3), 2), ((2, 4, 0), 2), ((0, 4), 4)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_arrays(shape: tuple[int, ...], groups: int, dtype: str, checked: Library) -> None:
    """Empty results, zero gradients, and no launch of a grid of nothing."""
    x, dy, weight, bias = (checked.array(v) for v in random(shape, dtype))
    result = cugn.group_norm_forward(x, groups, weight, bias)
    assert result.y.shape == shape
    assert result.mean.shape == (shape[0], groups)
    gradients = cugn.group_norm_backward(dy, x, groups, weight)
    assert gradients.dx.shape == shape
    for g in (gradients.dweight, gradients.dbias):
        assert g.dtype == dtype_of(dtype)
        assert not checked.numpy(g).astype(np.float64).any()


# ---------------------------------------------------------------- the family, dtypes, masks, labels

FAMILY_SHAPE = (3, 12, 5, 7)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_norm(dtype: str, last: bool, checked: Library) -> None:
    """Statistics of a channel over samples and positions."""
    x, dy, weight, bias = random(FAMILY_SHAPE, dtype)
    turn = channels_last if last else np.asarray
    axis = {"channel_axis": -1 if last else 1}
    X, DY, W, B = (checked.array(v) for v in (turn(x), turn(dy), weight, bias))
    back = (lambda a: np.moveaxis(a, -1, 1)) if last else np.asarray
    expected = oracle.forward(x, 12, weight, bias, batch_axis=None)
    check_y(back(checked.numpy(cugn.batch_norm(X, W, B, **axis))), expected, dtype, "batch norm")
    found = cugn.batch_norm_backward(DY, X, W, B, **axis)
    found = cugn.GroupNormGrads(back(checked.numpy(found.dx)), checked.numpy(found.dweight), checked.numpy(found.dbias))
    check_gradients(found, oracle.backward(dy, x, 12, weight, bias, batch_axis=None), dtype, "batch norm")


@pytest.mark.parametrize(
    ("dtype", "groups", "masked", "last"),
    pairwise(FLOATS, (3, [0, 1, 0, 2, 2, 2, 1, 0, 2, 2, 2, 2]), (False, True), (False, True)),
    ids=str,
)
def test_labels_and_masks(dtype: str, groups: Any, masked: bool, last: bool, checked: Library) -> None:
    """Groups of unequal size whose channels lie apart, elements that do not count, and both."""
    options: dict[str, Any] = {}
    if masked:
        options["where"] = np.random.default_rng(1).random(FAMILY_SHAPE) < 0.7
    check_call(checked, random(FAMILY_SHAPE, dtype), groups, last, **options)


@pytest.mark.parametrize("parameters", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_of_another_dtype(dtype: str, parameters: str, checked: Library) -> None:
    """Read at its own precision; dweight and dbias have its dtype."""
    x, dy, weight, bias = random(FAMILY_SHAPE, dtype, parameters)
    X, DY, W, B = (checked.array(v) for v in (x, dy, weight, bias))
    check_y(checked.numpy(cugn.group_norm(X, 3, W, B)), oracle.forward(x, 3, weight, bias), dtype, parameters)
    found, expected = cugn.group_norm_backward(DY, X, 3, W, B), oracle.backward(dy, x, 3, weight, bias)
    for name in ("dweight", "dbias"):
        value = checked.numpy(getattr(found, name))
        assert value.dtype == dtype_of(parameters)
        # the sums are of terms rounded to float32 at best, unless x is float64
        e = max(oracle.epsilon(value.dtype), oracle.epsilon(np.dtype("float64" if dtype == "float64" else "float32")))
        error = np.abs(value.astype(np.float64) - getattr(expected, name))
        assert (error <= table.BACKWARD_FACTOR[parameters] * e * getattr(expected, f"{name}_terms")).all(), name


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_images(dtype: str, out: str, checked: Library) -> None:
    """Integers are read as they are; y is float32, or the dtype of out."""
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max, FAMILY_SHAPE, endpoint=True).astype(dtype)
    _, _, weight, bias = random(FAMILY_SHAPE, "float32")
    expected = oracle.forward(x, 3, weight, bias)
    X, W, B = (checked.array(v) for v in (x, weight, bias))
    if out == "float32":
        check_y(checked.numpy(cugn.group_norm(X, 3, W, B)), expected, "float32", dtype)
    y = checked.array(np.zeros(FAMILY_SHAPE, dtype_of(out)))
    assert cugn.group_norm(X, 3, W, B, out=y) is y
    check_y(checked.numpy(y), expected, out, dtype)


def test_one_nan_spoils_its_own_group(checked: Library) -> None:
    """And nothing else, in y and in dx."""
    x, dy, weight, bias = random((2, 8, 40), "float32")
    clean = oracle.forward(x, 4, weight, bias)
    for bad, spoiled in ((np.nan, (1, 2)), (np.inf, (0, 3))):
        dirty = x.copy()
        dirty[spoiled[0], 2 * spoiled[1] + 1, 17] = bad
        X, DY, W, B = (checked.array(v) for v in (dirty, dy, weight, bias))
        y = checked.numpy(cugn.group_norm(X, 4, W, B)).reshape(2, 4, -1)
        dx = checked.numpy(cugn.group_norm_backward(DY, X, 4, W, B).dx).reshape(2, 4, -1)
        mask = np.ones((2, 4), bool)
        mask[spoiled] = False
        assert np.isfinite(y[mask]).all()
        assert np.isfinite(dx[mask]).all()
        assert np.isnan(y[spoiled]).any()
        np.testing.assert_allclose(y[mask], clean.y.reshape(2, 4, -1)[mask].astype(float), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_a_group_that_is_not_finite(dtype: str, value: float, fast: Library) -> None:
    """As for NumPy arrays."""
    table.test_statistics_of_a_group_that_is_not_finite(dtype, value, fast)


# ---------------------------------------------------------------- memory: strides, bases, out


VIEWS = {
    "cropped": lambda a: a[:, :, 1:-1, 2:],
    "flipped": lambda a: a[:, :, ::-1, ::-1],
    "samples apart": lambda a: a[::2],
    "channels apart": lambda a: a[:, ::2],
    "channels reversed": lambda a: a[:, ::-1],
    "Fortran order": np.asfortranarray,
    "spatial axes swapped": lambda a: a.transpose(0, 1, 3, 2),
    "channels in the middle": lambda a: np.ascontiguousarray(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "samples last": lambda a: np.ascontiguousarray(a.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2),
    "broadcast samples": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast columns": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "one element in": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: str, checked: Library) -> None:
    """Any strides are taken as they are, of x and dy alike or apart."""
    base, other, _, _ = random((4, 12, 6, 10), dtype)
    x, dy = VIEWS[view](base), VIEWS[view](other)
    _, _, weight, bias = random(x.shape, dtype)
    for second in (dy, np.ascontiguousarray(dy)):
        check_call(checked, (x, second, weight, bias), 3, False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_base_address_changes_no_bit(dtype: str, last: bool, checked: Library) -> None:
    """Bases at every multiple of the element size: tails and heads in the kernel, the same bits as aligned."""
    x, dy, weight, bias = random((2, 6, 37), dtype)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    W, B = checked.array(weight), checked.array(bias)
    axis = {"channel_axis": -1 if last else 1}
    results = []
    for shift in range(16 // x.itemsize + 1):
        shifted = []
        for a in (x, dy, x):
            whole = checked.array(np.concatenate([np.zeros(shift, a.dtype), a.ravel()]))
            shifted.append(whole[shift:].reshape(a.shape))
        X, DY, out = shifted
        y = checked.numpy(cugn.group_norm(X, 3, W, B, **axis))
        cugn.group_norm(X, 3, W, B, out=out, **axis)
        assert y.tobytes() == checked.numpy(out).tobytes()
        gradients = cugn.group_norm_backward(DY, X, 3, W, B, **axis)
        results.append((y.tobytes(), *(checked.numpy(g).tobytes() for g in gradients)))
    assert len(set(results)) == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("size", [50, 70_000], ids=["resident", "split"])
def test_in_place(dtype: str, last: bool, size: int, checked: Library) -> None:
    """out may be x in the forward, x or dy in the backward: the same bits."""
    if size > 50 and dtype == "bfloat16":
        pytest.skip("as float16, in all but the conversions")
    shape = (2, 4, size // 10)
    if size > 50:
        shape = (1, 2, size)
    x, dy, weight, bias = random(shape, dtype)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    axis = {"channel_axis": -1 if last else 1}
    W, B = checked.array(weight), checked.array(bias)

    def fresh() -> tuple[Any, Any]:
        return checked.array(x), checked.array(dy)

    with simt.using(mode="check" if size < 100 or dtype == "float16" else "fast"):
        X, DY = fresh()
        y, dx = cugn.group_norm(X, 1, W, B, **axis), cugn.group_norm_backward(DY, X, 1, W, B, **axis).dx
        X, _ = fresh()
        assert cugn.group_norm(X, 1, W, B, out=X, **axis) is X
        assert checked.numpy(X).tobytes() == checked.numpy(y).tobytes()
        for place in (0, 1):
            both = fresh()
            cugn.group_norm_backward(both[1], both[0], 1, W, B, out=both[place], **axis)
            assert checked.numpy(both[place]).tobytes() == checked.numpy(dx).tobytes()


@EMULATOR_NEEDED
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("size", [4, 70_000], ids=["resident", "split"])
def test_offsets_beyond_2_to_the_31(size: int, last: bool, fast: Library) -> None:
    """Samples more than 2^31 elements apart, of x, dy, the mask and every output, and rows of channels."""
    apart = (1 << 31) + 64
    turn = channels_last if last else np.asarray
    back = (lambda a: np.moveaxis(fast.numpy(a), -1, 1)) if last else fast.numpy
    x, dy, weight, bias = random((2, 8, size), "float16")
    where = np.random.default_rng(1).random(x.shape) < 0.7

    def far(a: np.ndarray) -> Any:
        a = turn(a)
        array = host_cupy.sparse(a.shape, a.dtype, (apart * a.itemsize, *a.strides[1:]))
        fast.numpy(array)[...] = a
        return array

    X, DY, OUT, WHERE = far(x), far(dy), far(0 * x), far(where)
    W, B = fast.array(weight), fast.array(bias)
    options: dict[str, Any] = {"channel_axis": -1 if last else 1}
    for masks in ({}, {"where": where}):
        device = {**options, **({"where": WHERE} if masks else {})}
        expected = oracle.forward(x, 2, weight, bias, **masks)
        for out in (None, OUT):
            y = cugn.group_norm(X, 2, W, B, out=out, **device)
            check_y(back(y), expected, "float16", f"{out is None}, {bool(masks)}")
        found = cugn.group_norm_backward(DY, X, 2, W, B, out=OUT, **device)
        found = cugn.GroupNormGrads(back(found.dx), fast.numpy(found.dweight), fast.numpy(found.dbias))
        check_gradients(found, oracle.backward(dy, x, 2, weight, bias, **masks), "float16", f"{bool(masks)}")
    moments = cugn.moments(X, 2, **options)
    np.testing.assert_allclose(fast.numpy(moments.mean), x.reshape(2, 2, -1).mean(-1, dtype=np.float64), rtol=1e-12)
    if last and size == 4:  # the second row far away
        rows = host_cupy.sparse((1, 2, 8), np.float16, (4 * apart, 2 * apart, 2))
        fast.numpy(rows)[...] = channels_last(x[:1, :, :2])
        y = fast.numpy(cugn.group_norm(rows, 2, W, B, **options))
        check_y(np.moveaxis(y, -1, 1), oracle.forward(x[:1, :, :2], 2, weight, bias), "float16", "rows apart")


# ---------------------------------------------------------------- the same bits

# So many samples that more of them share a block than of a part of the batch: small groups of rows, and a table.
MANY = [((600, 8, 150), 4), ((600, 1200, 1), 4)]
LAYOUTS = {"first": {"channel_axis": 1}, "last": {"channel_axis": -1}}


def bits(
    library: Library, x: np.ndarray, dy: np.ndarray, weight: Any, bias: Any, groups: int, **axis: Any
) -> list[bytes]:
    """y, mean, rstd, dx, dweight and dbias of a call."""
    X, DY, W, B = (library.array(v) for v in (x, dy, weight, bias))
    y, mean, rstd = cugn.group_norm_forward(X, groups, W, B, **axis)
    dx, dweight, dbias = cugn.group_norm_backward(DY, X, groups, W, B, mean=mean, rstd=rstd, **axis)
    return [library.numpy(v).tobytes() for v in (y, mean, rstd, dx, dweight, dbias)]


@EMULATOR_NEEDED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "groups"), [((5, 8, 33), 4), ((3, 32, 3), 32), ((2, 2, 60_000), 1)], ids=str)
def test_order_of_execution_changes_no_bit(shape: tuple[int, ...], groups: int, dtype: str, layout: str) -> None:
    """Blocks, warps and threads in six orders: everything is the same, dweight and dbias too."""
    x, dy, weight, bias = random(shape, dtype)
    if layout == "last":
        x, dy = channels_last(x), channels_last(dy)
    found = set()
    for seed in range(6 if shape[-1] < 1000 else 3):
        with emulated(mode="fast", seed=seed) as library:
            found.add(tuple(bits(library, x, dy, weight, bias, groups, **LAYOUTS[layout])))
    assert len(found) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "groups"), [((7, 8, 33), 4), ((40, 32, 2), 32), ((3, 2, 60_000), 1), *MANY], ids=str)
def test_the_batch_around_a_sample_changes_no_bit(
    shape: tuple[int, ...], groups: int, dtype: str, layout: str, fast: Library
) -> None:
    """y, statistics and dx of a sample alone, in a part of the batch, and in all of it."""
    x, dy, weight, bias = random(shape, dtype)
    if layout == "last":
        x, dy = channels_last(x), channels_last(dy)
    whole = bits(fast, x, dy, weight, bias, groups, **LAYOUTS[layout])[:4]
    for start, stop in ((0, 1), (2, 3), (1, shape[0])):
        part = bits(fast, x[start:stop], dy[start:stop], weight, bias, groups, **LAYOUTS[layout])[:4]
        for of_part, of_whole in zip(part, whole, strict=True):
            size = len(of_whole) // shape[0]
            assert of_part == of_whole[start * size : stop * size]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 8), 2), ((2, 3, 8, 49), 2), ((2, 3, 49, 8), 3)], ids=str)
def test_a_slice_of_two_batch_axes_changes_no_bit(shape: tuple[int, ...], axis: int, dtype: str, fast: Library) -> None:
    """Where the batch axes cannot be run through as one, samples keep the order of their elements."""
    rng = np.random.default_rng(4)
    x, dy = (fast.array(rng.normal(3, 1, shape).astype(dtype_of(dtype))) for _ in range(2))
    options: dict[str, Any] = {"channel_axis": axis, "batch_axis": (0, 1)}

    def results(x: Any, dy: Any) -> list[np.ndarray]:
        dx = cugn.group_norm_backward(dy, x, 2, **options).dx
        return [fast.numpy(a) for a in (*cugn.group_norm_forward(x, 2, **options), dx)]

    whole = results(x, dy)
    for at in (np.s_[::-1], np.s_[:, ::2], np.s_[1:, 1:]):
        for of_part, of_whole in zip(results(x[at], dy[at]), whole, strict=True):
            np.testing.assert_array_equal(of_part, of_whole[at])


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_devices_give_the_same_bits(dtype: str) -> None:
    """The number of multiprocessors plays no part."""
    x, dy, weight, bias = random((3, 8, 500), dtype)
    found = set()
    for count in (1, 20, 132):
        with emulated(host_cupy.Properties(multiprocessors=count), mode="fast") as library:
            found.add(tuple(bits(library, x, dy, weight, bias, 2)))
    assert len(found) == 1


@pytest.mark.rare(when=lambda name: name != "(3, 12, 49) 4 float32 first")
@pytest.mark.parametrize("name", record.names())
def test_the_bits_on_record(name: str, fast: Library) -> None:
    """The checksums for devices are what the kernels give now; `python -m tests.gpu.bits` makes them."""
    if ON_DEVICE:
        pytest.skip("test_gpu_bits does this on a GPU")
    assert record.digests(fast, *record.names()[name]) == record.recorded()[name]


# ---------------------------------------------------------------- devices and memory


def test_it_runs_where_x_lives() -> None:
    """On the second device, with its shared memory; arrays on two devices are an error."""
    turing = host_cupy.Properties("Turing", 20, 7, 5, shared_opt_in=64 << 10, shared_per_multiprocessor=64 << 10)
    with emulated(host_cupy.H100, turing) as library:
        x, dy, weight, bias = random((2, 4, 5000), "float32")
        X, DY, W, B = (host_cupy.to_device(v, device=1) for v in (x, dy, weight, bias))
        with simt.recorded() as launches:
            y = cugn.group_norm(X, 2, W, B)
            gradients = cugn.group_norm_backward(DY, X, 2, W, B)
        assert {a.device.id for a in (y, *gradients)} == {1}
        assert max(launch.shared_mem for launch in launches) <= 64 << 10
        check_y(library.numpy(y), oracle.forward(x, 2, weight, bias), "float32", "second device")
        with pytest.raises(ValueError, match="device"):
            cugn.group_norm(library.array(x), 2, W, B)


@EMULATOR_NEEDED
@pytest.mark.parametrize(
    ("shape", "groups", "options"),
    [
        ((4, 32, 64, 16), 8, {}),
        ((4, 64, 16, 32), 8, {"channel_axis": -1}),
        ((1, 8, 300_000), 2, {}),
        ((1, 40_000, 64), 8, {"channel_axis": -1}),
        ((64, 512), 32, {}),
    ],
)
def test_no_temporary_as_large_as_x(
    shape: tuple[int, ...], groups: int, options: dict[str, int], fast: Library
) -> None:
    """Beside the output: statistics, partial sums, nothing that grows as x does."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    X, W = fast.array(x), fast.array(np.ones(shape[options.get("channel_axis", 1)], np.float32))
    for call in (
        lambda: cugn.group_norm(X, groups, W, W, **options),
        lambda: cugn.group_norm_backward(X, X, groups, W, **options),
    ):
        with host_cupy.allocations() as sizes:
            call()
        sizes.remove(x.nbytes)
        assert max(sizes) <= max(x.nbytes // 4, min(1 << 20, x.nbytes // 2))


# Dtype, activation, mask and groups, such that each pair of choices occurs: activations rotate against dtypes, and mask
# and labels alternate against both.
COMBINATIONS = [
    (dtype, activation, (i + j) % 2 == 0, (3, [0, 1, 1, 0, 2, 1])[(i + j // 2) % 2])
    for i, dtype in enumerate(FLOATS)
    for j, activation in enumerate((None, "relu", "silu", "gelu", "gelu_tanh"))
]


@pytest.mark.parametrize(("dtype", "activation", "masked", "groups"), COMBINATIONS, ids=str)
def test_options_together(dtype: str, activation: str | None, masked: bool, groups: Any, checked: Library) -> None:
    """Activation, mask, labels and dtype in one call."""
    shape = (2, 6, 5, 4)
    x, dy, weight, bias = random(shape, dtype, seed=3)
    options: dict[str, Any] = {"activation": activation}
    device = dict(options)
    if masked:
        options["where"] = np.random.default_rng(0).random(shape) < 0.8
        device["where"] = checked.array(options["where"])
    X, DY, W, B = (checked.array(v) for v in (x, dy, weight, bias))
    expected = oracle.forward(x, groups, weight, bias, **options)
    # 1.13: the largest slope of an activation
    expected = expected._replace(scale=1.13 * expected.scale)
    check_y(checked.numpy(cugn.group_norm(X, groups, W, B, **device)), expected, dtype, str(options))
    found = cugn.GroupNormGrads(*map(checked.numpy, cugn.group_norm_backward(DY, X, groups, W, B, **device)))
    gradients = oracle.backward(dy, x, groups, weight, bias, **options)
    check_gradients(found, gradients._replace(group_max=gradients.terms), dtype, str(options))
