"""Promise: wrong input raises the stated exception with the argument, the given and the wanted, and changes nothing."""

from __future__ import annotations

import array
import inspect
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import array_api_compat
import calls
import ml_dtypes
import numpy as np
import pytest
from libraries import LIBRARIES

import cugn

FUNCTIONS = calls.FUNCTIONS
STATISTICS = calls.STATISTICS
ARRAYS = (*calls.LIKE_X, *calls.PER_CHANNEL, *STATISTICS, "where")


class Quantity(np.ndarray):
    """An array whose class carries a meaning, as units do."""


def character_array() -> Any:
    """One, although NumPy 2.5 warns of its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.char.array(["a"])


class ArrayLike:
    """Converts to an array, but is none."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.zeros(calls.SHAPE, dtype=np.float32)


class DuckArray:
    """Has an array's attributes and no array namespace."""

    shape, dtype, strides, ndim = calls.SHAPE, np.dtype("float32"), (480, 80, 20, 4), 4


class Wrong(NamedTuple):
    """One wrong argument."""

    name: str
    arguments: tuple[str, ...]
    """The arguments that can be wrong in this way."""
    make: Callable[[Any, dict[str, Any]], Any]
    """The wrong value, from the right one and the whole call."""
    error: type[Exception]
    says: tuple[str, ...]
    """Patterns of the message beside the argument's name: what was given, what is wanted."""
    optional: bool = True
    """Whether the other arguments that have a default are given as well."""


def types(name: str, make: Callable[[Any, dict[str, Any]], Any], *says: str) -> Wrong:
    """A wrong type of any array argument."""
    return Wrong(name, ARRAYS, make, TypeError, says)


def dtypes(name: str, dtype: Any, arguments: tuple[str, ...], *says: str) -> Wrong:
    """A wrong dtype."""
    return Wrong(name, arguments, lambda a, _: np.zeros(a.shape, dtype=dtype), TypeError, says)


FLOAT_ARRAYS = tuple(a for a in ARRAYS if a != "where")
NOT_X = tuple(a for a in calls.LIKE_X if a != "x")
WANTED_ARRAY, WANTED_FLOAT = "NumPy, CuPy or Dask array", "float16, bfloat16, float32, float64"

TYPES = [
    types("list", lambda a, _: a.tolist(), "type list", WANTED_ARRAY),
    types("tuple", lambda a, _: tuple(a.tolist()), "type tuple", WANTED_ARRAY),
    types("Python float", lambda a, _: 1.0, "type float", WANTED_ARRAY),
    types("Python int", lambda a, _: 1, "type int", WANTED_ARRAY),
    types("Python bool", lambda a, _: True, "type bool", WANTED_ARRAY),
    types("NumPy scalar", lambda a, _: np.float32(1), "type float32", WANTED_ARRAY),
    types("string", lambda a, _: "x", "type str", WANTED_ARRAY),
    types("bytes", lambda a, _: a.tobytes(), "type bytes", WANTED_ARRAY),
    types("dict", lambda a, _: {0: a}, "type dict", WANTED_ARRAY),
    types("generator", lambda a, _: (v for v in [1.0]), "type generator", WANTED_ARRAY),
    types("memoryview", lambda a, _: memoryview(a), "type memoryview", WANTED_ARRAY),
    types("array.array", lambda a, _: array.array("f", [1.0]), "type array", WANTED_ARRAY),
    types("array class", lambda a, _: np.ndarray, "type type", WANTED_ARRAY),
    types("dtype", lambda a, _: np.dtype("float32"), "it must be a NumPy"),
    types("array-like", lambda a, _: ArrayLike(), "type ArrayLike", WANTED_ARRAY),
    types("duck array", lambda a, _: DuckArray(), "type DuckArray", WANTED_ARRAY),
    types("Ellipsis", lambda a, _: ..., "type ellipsis", WANTED_ARRAY),
    types("masked array", lambda a, _: np.ma.masked_array(a), "masked array", r"\.data", "where=~mask"),
    types("masked array without a mask", lambda a, _: np.ma.array(a, mask=np.ma.nomask), "masked array"),
    types("matrix", lambda a, _: np.ones((2, 6)).view(np.matrix), "matrix", "np.asarray"),
    types("array with units", lambda a, _: a.view(Quantity), "Quantity", "np.asarray"),
    types("record array", lambda a, _: np.zeros(a.shape, [("v", "f4")]).view(np.recarray), "recarray", "np.asarray"),
    types("character array", lambda a, _: character_array(), "chararray", "np.asarray"),
]
DTYPES = [
    dtypes("object", object, FLOAT_ARRAYS, "dtype object", "float32"),
    dtypes("structured", [("a", "f4")], FLOAT_ARRAYS, "dtype", "float32"),
    dtypes("complex64", np.complex64, FLOAT_ARRAYS, "dtype complex64", "float32"),
    dtypes("complex128", np.complex128, FLOAT_ARRAYS, "dtype complex128", "float32"),
    dtypes("bool", bool, FLOAT_ARRAYS, "dtype bool", "float32"),
    dtypes("int32", np.int32, FLOAT_ARRAYS, "dtype int32", "float32"),
    dtypes("int64", np.int64, FLOAT_ARRAYS, "dtype int64", "float32"),
    dtypes("uint32", np.uint32, FLOAT_ARRAYS, "dtype uint32", "float32"),
    dtypes("uint64", np.uint64, FLOAT_ARRAYS, "dtype uint64", "float32"),
    dtypes("longdouble", np.longdouble, FLOAT_ARRAYS, "dtype float128|dtype longdouble", "float32"),
    dtypes("datetime", "M8[s]", FLOAT_ARRAYS, "dtype datetime64", "float32"),
    dtypes("timedelta", "m8[s]", FLOAT_ARRAYS, "dtype timedelta64", "float32"),
    dtypes("text", "U4", FLOAT_ARRAYS, "dtype <U4", "float32"),
    dtypes("variable text", np.dtypes.StringDType(), FLOAT_ARRAYS, "dtype StringDType", "float32"),
    dtypes("float8", ml_dtypes.float8_e4m3fn, FLOAT_ARRAYS, "dtype float8_e4m3fn", "float32"),
    dtypes("int4", ml_dtypes.int4, FLOAT_ARRAYS, "dtype int4", "float32"),
    dtypes("int8", np.int8, (*NOT_X, *calls.PER_CHANNEL, *STATISTICS), "dtype int8", "float32"),
    dtypes("uint16", np.uint16, (*NOT_X, *calls.PER_CHANNEL, *STATISTICS), "dtype uint16", "float32"),
    dtypes("float64 for x of float32", np.float64, NOT_X, "dtype float64", "float32 for x of float32"),
    dtypes("float16 for x of float32", np.float16, NOT_X, "dtype float16", "float32 for x of float32"),
    dtypes("bfloat16 for x of float32", ml_dtypes.bfloat16, NOT_X, "dtype bfloat16", "float32 for x of float32"),
    dtypes("float mask", np.float32, ("where",), "dtype float32", "boolean"),
    dtypes("int mask", np.int64, ("where",), "dtype int64", "boolean"),
    dtypes("uint8 mask", np.uint8, ("where",), "dtype uint8", "boolean"),
    dtypes("object mask", object, ("where",), "dtype object", "boolean"),
]
SHAPES = [
    Wrong("0-d", ("x",), lambda a, _: np.zeros((), "f4"), ValueError, ("0 axes", "shape"), False),
    Wrong("1-d", ("x",), lambda a, _: np.zeros(6, "f4"), ValueError, ("1 axes", r"\(6,\)"), False),
    Wrong("an axis more", NOT_X, lambda a, _: a[None], ValueError, (r"\(1, 2, 6, 4, 5\)", r"\(2, 6, 4, 5\)")),
    Wrong("an axis less", NOT_X, lambda a, _: a[0], ValueError, (r"\(6, 4, 5\)", r"\(2, 6, 4, 5\)")),
    Wrong("flat", NOT_X, lambda a, _: a.ravel(), ValueError, (r"\(240,\)", r"\(2, 6, 4, 5\)")),
    Wrong("an element less", NOT_X, lambda a, _: a[..., :-1], ValueError, (r"\(2, 6, 4, 4\)", r"\(2, 6, 4, 5\)")),
    Wrong("transposed", NOT_X, lambda a, _: a.transpose(0, 2, 3, 1), ValueError, (r"\(2, 4, 5, 6\)",)),
    Wrong("one that would broadcast", NOT_X, lambda a, _: a[:1], ValueError, (r"\(1, 6, 4, 5\)", "x's")),
    Wrong("empty", NOT_X, lambda a, _: a[:0], ValueError, (r"\(0, 6, 4, 5\)", "x's")),
    Wrong("channel too few", calls.PER_CHANNEL, lambda a, _: a[:5], ValueError, (r"\(5,\)", r"\(6,\)")),
    Wrong("channel too many", calls.PER_CHANNEL, lambda a, _: np.ones(7, "f4"), ValueError, (r"\(7,\)", r"\(6,\)")),
    Wrong("column", calls.PER_CHANNEL, lambda a, _: a[:, None], ValueError, (r"\(6, 1\)", r"\(6,\)")),
    Wrong("row", calls.PER_CHANNEL, lambda a, _: a[None], ValueError, (r"\(1, 6\)", r"\(6,\)")),
    Wrong("one for all", calls.PER_CHANNEL, lambda a, _: a[:1], ValueError, (r"\(1,\)", r"\(6,\)")),
    Wrong("0-d", calls.PER_CHANNEL, lambda a, _: np.ones((), "f4"), ValueError, (r"\(\)", r"\(6,\)")),
    Wrong("for each group", calls.PER_CHANNEL, lambda a, _: a[:3], ValueError, (r"\(3,\)", "channel")),
    Wrong("x's own", calls.PER_CHANNEL, lambda a, c: c["x"] + 0, ValueError, (r"\(2, 6, 4, 5\)", r"\(6,\)")),
    Wrong("statistics of 7", STATISTICS, lambda a, _: np.ones(7), ValueError, (r"\(7,\)", "batch shape then G")),
    Wrong("statistics of 3 samples", STATISTICS, lambda a, _: np.ones((3, 1)), ValueError, (r"\(3, 1\)", "broadcast")),
    Wrong("statistics with an axis more", STATISTICS, lambda a, _: np.ones((1, 1, 1)), ValueError, (r"\(1, 1, 1\)",)),
    Wrong("empty statistics", STATISTICS, lambda a, _: np.ones((0,)), ValueError, (r"\(0,\)", "broadcast")),
    Wrong("mask of 3", ("where",), lambda a, _: np.ones(3, bool), ValueError, (r"\(3,\)", r"\(2, 6, 4, 5\)")),
    Wrong("mask larger than x", ("where",), lambda a, _: a[None], ValueError, (r"\(1, 2, 6, 4, 5\)", "broadcast")),
    Wrong(
        "mask of other samples", ("where",), lambda a, _: np.ones((3, 1, 1, 1), bool), ValueError, (r"\(3, 1, 1, 1\)",)
    ),
    Wrong("empty mask", ("where",), lambda a, _: np.ones((0,), bool), ValueError, (r"\(0,\)", "broadcast")),
]
AXES = [
    Wrong("too large", ("channel_axis",), lambda a, _: 4, ValueError, ("is 4", "4 axes")),
    Wrong("too small", ("channel_axis",), lambda a, _: -5, ValueError, ("is -5", "4 axes")),
    Wrong("enormous", ("channel_axis", "batch_axis"), lambda a, _: 10**30, ValueError, ("1" + "0" * 30, "4 axes")),
    Wrong("float", ("channel_axis", "batch_axis"), lambda a, _: 1.0, TypeError, ("is 1.0", "an int")),
    Wrong("NumPy float", ("channel_axis", "batch_axis"), lambda a, _: np.float64(1), TypeError, ("1.0", "an int")),
    Wrong("None", ("channel_axis",), lambda a, _: None, TypeError, ("is None", "an int")),
    Wrong("tuple", ("channel_axis",), lambda a, _: (1,), TypeError, (r"is \(1,\)", "an int")),
    Wrong("string", ("channel_axis", "batch_axis"), lambda a, _: "C", TypeError, ("is 'C'", "an int")),
    Wrong("bool", ("channel_axis", "batch_axis"), lambda a, _: True, TypeError, ("is True", "an int")),
    Wrong("complex", ("channel_axis", "batch_axis"), lambda a, _: 1j, TypeError, ("is 1j", "an int")),
    Wrong("too large", ("batch_axis",), lambda a, _: 4, ValueError, ("is 4", "4 axes")),
    Wrong("too small", ("batch_axis",), lambda a, _: -5, ValueError, ("is -5", "4 axes")),
    Wrong("one of a tuple too large", ("batch_axis",), lambda a, _: (0, 7), ValueError, ("is 7", "4 axes")),
    Wrong("twice", ("batch_axis",), lambda a, _: (0, 0), ValueError, (r"\(0, 0\)", "twice")),
    Wrong("twice, once negative", ("batch_axis",), lambda a, _: (0, -4), ValueError, (r"\(0, -4\)", "twice")),
    Wrong("the channels'", ("batch_axis",), lambda a, _: 1, ValueError, ("channel_axis and batch_axis", "axis 1")),
    Wrong("the channels' among others", ("batch_axis",), lambda a, _: [0, -3], ValueError, ("both name axis 1",)),
    Wrong("float in a tuple", ("batch_axis",), lambda a, _: (0, 2.0), TypeError, ("2.0", "an int")),
    Wrong("nested", ("batch_axis",), lambda a, _: ((0,),), TypeError, (r"\(0,\)", "an int")),
    Wrong("bool in a tuple", ("batch_axis",), lambda a, _: (False,), TypeError, ("False", "an int")),
    Wrong("set", ("batch_axis",), lambda a, _: {0}, TypeError, (r"\{0\}", "an int")),
]
GROUPS = [
    Wrong("zero", ("groups",), lambda a, _: 0, ValueError, ("is 0", "at least 1")),
    Wrong("negative", ("groups",), lambda a, _: -3, ValueError, ("is -3", "at least 1")),
    Wrong("no divisor", ("groups",), lambda a, _: 4, ValueError, ("is 4", "divide the 6 channels")),
    Wrong("more than channels", ("groups",), lambda a, _: 12, ValueError, ("is 12", "divide the 6 channels")),
    Wrong("float", ("groups",), lambda a, _: 3.0, TypeError, ("is 3.0", "an int")),
    Wrong("fraction", ("groups",), lambda a, _: Fraction(3), TypeError, ("Fraction", "an int")),
    Wrong("None", ("groups",), lambda a, _: None, TypeError, ("is None", "an int")),
    Wrong("string", ("groups",), lambda a, _: "3", TypeError, ("is '3'", "an int")),
    Wrong("bool", ("groups",), lambda a, _: True, TypeError, ("is True", "an int")),
    Wrong("NumPy bool", ("groups",), lambda a, _: np.True_, TypeError, ("True", "an int")),
    Wrong("too few labels", ("groups",), lambda a, _: [0, 0, 1], ValueError, ("3 labels", "6 channels")),
    Wrong("too many labels", ("groups",), lambda a, _: [0] * 7, ValueError, ("7 labels", "6 channels")),
    Wrong("no labels", ("groups",), lambda a, _: [], ValueError, ("0 labels", "6 channels")),
    Wrong("label missing", ("groups",), lambda a, _: [0, 0, 2, 2, 3, 3], ValueError, ("0, 2, 3", r"0\.\.G-1")),
    Wrong("labels from 1", ("groups",), lambda a, _: (1, 1, 2, 2, 3, 3), ValueError, ("1, 2, 3", r"0\.\.G-1")),
    Wrong("negative label", ("groups",), lambda a, _: [0, 0, -1, -1, 1, 1], ValueError, ("-1, 0, 1", r"0\.\.G-1")),
    Wrong("huge label", ("groups",), lambda a, _: [0, 0, 0, 1, 1, 2**70], ValueError, (str(2**70), r"0\.\.G-1")),
    Wrong("float label", ("groups",), lambda a, _: [0, 0, 0, 1, 1, 1.0], TypeError, ("is 1.0", "integer label")),
    Wrong("float labels", ("groups",), lambda a, _: np.zeros(6), TypeError, ("is 0.0", "integer label")),
    Wrong("bool labels", ("groups",), lambda a, _: np.array([True] * 3 + [False] * 3), TypeError, ("True", "integer")),
    Wrong("text labels", ("groups",), lambda a, _: list("aabbcc"), TypeError, ("'a'", "integer label")),
    Wrong("2-d labels", ("groups",), lambda a, _: [[0, 0, 0], [1, 1, 1]], TypeError, (r"\[0, 0, 0\]", "integer label")),
    Wrong("2-d array", ("groups",), lambda a, _: np.zeros((6, 1), int), ValueError, (r"\(6, 1\)", "one-dimensional")),
    Wrong("ragged labels", ("groups",), lambda a, _: [[0, 0], [1], 2, 2, 2, 2], TypeError, ("an int", "integer label")),
    Wrong("masked labels", ("groups",), lambda a, _: np.ma.array([0, 0, 1, 1, 2, 2]), TypeError, ("masked", "integer")),
    Wrong("set of labels", ("groups",), lambda a, _: {0, 1, 2}, TypeError, (r"\{0, 1, 2\}", "integer labels")),
    Wrong("dict", ("groups",), lambda a, _: {0: 3}, TypeError, (r"\{0: 3\}", "an int")),
    Wrong("array of x", ("groups",), lambda a, c: c["x"], ValueError, (r"\(2, 6, 4, 5\)", "one-dimensional")),
]
NUMBERS = [
    Wrong("NaN", ("eps",), lambda a, _: float("nan"), ValueError, ("is nan", "finite and >= 0")),
    Wrong("infinite", ("eps",), lambda a, _: float("inf"), ValueError, ("is inf", "finite and >= 0")),
    Wrong("minus infinite", ("eps",), lambda a, _: -np.inf, ValueError, ("is -inf", "finite and >= 0")),
    Wrong("negative", ("eps",), lambda a, _: -1e-5, ValueError, ("is -1e-05", "finite and >= 0")),
    Wrong("barely negative", ("eps",), lambda a, _: -5e-324, ValueError, ("is -5e-324", "finite and >= 0")),
    Wrong("None", ("eps",), lambda a, _: None, TypeError, ("is None", "real number")),
    Wrong("text", ("eps",), lambda a, _: "small", TypeError, ("is 'small'", "real number")),
    Wrong("number as text", ("eps",), lambda a, _: "1e-5", TypeError, ("is '1e-5'", "real number")),
    Wrong("number as bytes", ("eps",), lambda a, _: b"1e-5", TypeError, ("is b'1e-5'", "real number")),
    Wrong("bool", ("eps",), lambda a, _: True, TypeError, ("is True", "real number")),
    Wrong("complex", ("eps",), lambda a, _: 1e-5 + 0j, TypeError, ("1e-05", "real number")),
    Wrong("array", ("eps",), lambda a, _: np.array([1e-5]), TypeError, ("1.e-05", "real number")),
    Wrong("list", ("eps",), lambda a, _: [1e-5], TypeError, ("1e-05", "real number")),
    Wrong("too large for a float", ("eps",), lambda a, _: 10**400, ValueError, ("eps", "finite and >= 0")),
    Wrong("unknown", ("activation",), lambda a, _: "swish", ValueError, ("'swish'", "'silu'")),
    Wrong("capitals", ("activation",), lambda a, _: "ReLU", ValueError, ("'ReLU'", "'relu'")),
    Wrong("empty", ("activation",), lambda a, _: "", ValueError, ("''", "None, 'relu'")),
    Wrong("bool", ("activation",), lambda a, _: True, ValueError, ("True", "None, 'relu'")),
    Wrong("function", ("activation",), lambda a, _: np.tanh, ValueError, ("tanh", "None, 'relu'")),
]
OUTS = [
    Wrong("read-only", ("out",), lambda a, _: _read_only(a), ValueError, ("read-only",)),
    Wrong("broadcast", ("out",), lambda a, _: _writable_broadcast(a), ValueError, ("broadcast", "share memory")),
]
WRONG = [*TYPES, *DTYPES, *SHAPES, *AXES, *GROUPS, *NUMBERS, *OUTS]


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def _writable_broadcast(a: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(a, a.shape, (0, *a.strides[1:]))


def _cases() -> list[Any]:
    return [
        pytest.param(wrong, argument, id=f"{argument}: {wrong.name}")
        for wrong in WRONG
        for argument in wrong.arguments
        if any(argument in calls.parameters(function) for function in FUNCTIONS)
    ]


def check(function: str, kwargs: dict[str, Any], argument: str, error: type[Exception], says: tuple[str, ...]) -> None:
    """The call raises exactly `error`, whose message has it all, and leaves every argument as it was."""
    arrays = {name: a for name, a in kwargs.items() if isinstance(a, np.ndarray)}
    before = {name: (a.tobytes(), a.flags.writeable, a.shape, a.strides) for name, a in arrays.items()}
    groups = repr(kwargs.get("groups"))
    with pytest.raises(error) as raised:
        calls.call(function, kwargs)
    assert raised.type is error
    message = str(raised.value)
    assert re.search(rf"\b{argument}\b", message), f"{function} does not name {argument}: {message}"
    for pattern in says:
        assert re.search(pattern, message), f"{function}({argument}=): no {pattern!r} in: {message}"
    assert {name: (a.tobytes(), a.flags.writeable, a.shape, a.strides) for name, a in arrays.items()} == before
    assert repr(kwargs.get("groups")) == groups


@pytest.mark.parametrize(("wrong", "argument"), _cases())
def test_wrong_argument(wrong: Wrong, argument: str) -> None:
    """Every function that has the argument refuses it."""
    for function in FUNCTIONS:
        if argument not in calls.parameters(function):
            continue
        kwargs = calls.arguments(function, optional=wrong.optional)
        kwargs[argument] = wrong.make(kwargs.get(argument), kwargs)
        check(function, kwargs, argument, wrong.error, wrong.says)


def test_the_calls_are_right_without_the_wrong_argument() -> None:
    """Each call that the cases above break succeeds as it is, with and without its optional arguments."""
    for function in FUNCTIONS:
        for optional in (False, True):
            calls.call(function, calls.arguments(function, optional=optional))


def test_cases_are_many() -> None:
    """At least a hundred kinds of wrong input."""
    assert len({(w.name, a) for w in WRONG for a in w.arguments}) >= 100


@pytest.mark.parametrize("function", FUNCTIONS)
def test_required_arguments(function: str) -> None:
    """A required array that is None or missing is a TypeError that names it."""
    for parameter in inspect.signature(getattr(cugn, function)).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            continue
        kwargs = calls.arguments(function)
        check(function, {**kwargs, parameter.name: None}, parameter.name, TypeError, ())
        del kwargs[parameter.name]
        check(function, kwargs, parameter.name, TypeError, ("missing",))


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.endswith("norm_backward")])
@pytest.mark.parametrize("missing", ["mean", "rstd"])
def test_one_statistic_alone(function: str, missing: str) -> None:
    """Mean without rstd and rstd without mean are refused."""
    kwargs = calls.arguments(function)
    del kwargs[missing]
    check(function, kwargs, missing, ValueError, ("both or neither",))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_keywords(function: str) -> None:
    """An unknown keyword, and an option given by position, are TypeErrors."""
    check(function, {**calls.arguments(function), "axis": 1}, "axis", TypeError, ("unexpected keyword",))
    kinds = [p.kind for p in inspect.signature(getattr(cugn, function)).parameters.values()]
    count = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    with pytest.raises(TypeError, match="positional"):
        getattr(cugn, function)(*[None] * (count + 1))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("other", ["array_api_strict", "torch"])
def test_mixed_libraries(function: str, other: str) -> None:
    """An array of another library than x's is refused, whichever argument it is."""
    module = pytest.importorskip(other, reason=f"{other} is not installed")
    kwargs = calls.arguments(function)
    for argument, value in kwargs.items():
        if isinstance(value, np.ndarray):
            mixed = {**kwargs, argument: module.asarray(value.copy())}
            named = next(a for a in mixed if isinstance(mixed[a], np.ndarray)) if argument == "x" else argument
            says = ("numpy", other, "one library") if argument != "x" else (other, "one library")
            check(function, mixed, "x" if argument == "x" else named, TypeError, says)


def test_array_of_pandas() -> None:
    """A data frame is no array."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    check("group_norm", {"x": pandas.DataFrame(np.ones((4, 6))), "groups": 2}, "x", TypeError, ("DataFrame",))


def test_array_of_xarray() -> None:
    """A labelled array goes through apply_ufunc, not in directly."""
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    check("group_norm", {"x": xarray.DataArray(np.ones((4, 6))), "groups": 2}, "x", TypeError, ("DataArray",))


def test_sparse_array() -> None:
    """A sparse matrix is no array here."""
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    check("group_norm", {"x": sparse.eye_array(6), "groups": 2}, "x", TypeError, (WANTED_ARRAY,))


WITH_OUT = tuple(f for f in FUNCTIONS if "out" in calls.parameters(f))
OVERLAPS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "shifted along the channels": lambda: (b := _base(2, 7, 4, 5), (b[:, :6], b[:, 1:]))[1],
    "shifted by a sample": lambda: (b := _base(3, 6, 4, 5), (b[:2], b[1:]))[1],
    "shifted by an element": lambda: (b := _base(241), (b[:-1].reshape(2, 6, 4, 5), b[1:].reshape(2, 6, 4, 5)))[1],
    "flipped": lambda: (b := _base(2, 6, 4, 5), (b, b[:, ::-1]))[1],
    "samples flipped": lambda: (b := _base(2, 6, 4, 5), (b, b[::-1]))[1],
    "transposed": lambda: (b := _base(6, 6, 4, 5), (b, b.transpose(1, 0, 2, 3)))[1],
    "one element shared": lambda: (b := _base(479), (b[:240].reshape(2, 6, 4, 5), b[239:].reshape(2, 6, 4, 5)))[1],
    "crossing strides": lambda: (b := _base(2, 18, 4, 5), (b[:, :12:2], b[:, ::3]))[1],
}


def _base(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("function", WITH_OUT)
def test_overlapping_out(function: str, overlap: str) -> None:
    """An out that shares part of its memory with x, dy or tx is refused before anything is written."""
    for argument in (a for a in ("x", "dy", "tx") if a in calls.parameters(function)):
        source, target = OVERLAPS[overlap]()
        kwargs = calls.arguments(function, optional=False)
        kwargs = {k: np.ones(source.shape, "f4") if k in calls.LIKE_X else v for k, v in kwargs.items()}
        if "mean" in kwargs:
            kwargs.update({name: np.ones(3) for name in STATISTICS if name in kwargs})
        check(
            function, {**kwargs, argument: source, "out": target}, "out", ValueError, (f"overlaps {argument}", "itself")
        )


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_overlapping_out_of_other_libraries(library: str) -> None:
    """Memory of other libraries is compared too: x, the weight and a broadcast out keep their values."""
    base = LIBRARIES[library]().array(np.random.default_rng(1).normal(size=(7, 6, 4)).astype(np.float32))

    def refused(pattern: str, out: Any, x: Any, weight: Any = None) -> None:
        before = np.asarray(base).copy()
        with pytest.raises(ValueError, match=pattern):
            cugn.group_norm(x, 2, weight, out=out)
        np.testing.assert_array_equal(np.asarray(base), before)

    refused("out overlaps x: it may be x itself", base[1:, :, :], base[:-1, :, :])
    refused("out overlaps x: it may be x itself", base[:, :, ::2], base[:, :, 1:3])
    x = LIBRARIES[library]().array(np.ones((6, 6, 4), np.float32))
    refused("out overlaps weight", base[:-1, :, :], x, base[0, :, 0])
    namespace = array_api_compat.array_namespace(base)
    refused("out is a broadcast array", namespace.broadcast_to(base[:1, :, :], (6, 6, 4)), x)
    # beside x, and x itself
    wanted = np.asarray(cugn.group_norm(base, 2))
    half = cugn.group_norm(base[:, :, ::2], 2)
    np.testing.assert_array_equal(np.asarray(cugn.group_norm(base[:, :, ::2], 2, out=base[:, :, 1::2])), half)
    base[:, :, :] = LIBRARIES[library]().array(np.random.default_rng(1).normal(size=(7, 6, 4)).astype(np.float32))
    cugn.group_norm(base, 2, out=base)
    np.testing.assert_array_equal(np.asarray(base), wanted)


@pytest.mark.parametrize("function", WITH_OUT)
def test_out_holding_a_small_argument(function: str) -> None:
    """An out whose memory holds the weight, the mask or the statistics is refused."""
    for argument in (*calls.PER_CHANNEL, *STATISTICS, "where"):
        kwargs = calls.arguments(function, dtype=np.float64)
        if argument not in kwargs:
            continue
        view = kwargs["out"].view(bool)[..., :5] if argument == "where" else kwargs["out"].reshape(-1)
        small = kwargs[argument]
        kwargs[argument] = view if argument == "where" else view[7 : 7 + small.size].reshape(small.shape)
        if argument == "where":
            kwargs["out"][...] = 0
        check(function, kwargs, "out", ValueError, (f"overlaps {argument}",))


def test_out_of_integer_input() -> None:
    """With integer x, out may be of any float dtype and no other; x's own bytes under another dtype are an overlap."""
    x = np.arange(24, dtype=np.int16).reshape(1, 4, 6)
    for dtype in (np.int16, np.int32, np.complex64, bool):
        call = {"x": x, "groups": 2, "out": np.zeros(x.shape, dtype)}
        check("group_norm", call, "out", TypeError, ("dtype", WANTED_FLOAT))
    check("group_norm", {"x": x, "groups": 2, "out": x.view(np.float16)}, "out", ValueError, ("overlaps x",))


@pytest.mark.parametrize("function", WITH_OUT)
def test_out_beside_x_is_accepted(function: str) -> None:
    """Views of one array that interleave without sharing an element are no overlap, and nothing else is written."""
    for axis in range(4):
        for step, first, second in ((2, 0, 1), (2, 1, 0), (3, 2, 0)):
            kwargs = calls.arguments(function)
            wanted = calls.call(function, {k: v for k, v in kwargs.items() if k != "out"})
            shape = list(calls.SHAPE)
            shape[axis] *= step
            base = np.full(shape, np.float32(7))
            places = [(slice(None),) * axis + (slice(start, None, step),) for start in (first, second)]
            kwargs["x"], kwargs["out"] = _put(base, places[0], kwargs["x"]), base[places[1]]
            result = calls.call(function, kwargs)
            y, expected = (r if isinstance(r, np.ndarray) else r[0] for r in (result, wanted))
            assert y is kwargs["out"]
            np.testing.assert_array_equal(y, expected)
            untouched = np.ones(shape, bool)
            untouched[places[0]] = untouched[places[1]] = False
            assert (base[untouched] == 7).all()
            np.testing.assert_array_equal(base[places[0]], calls.arguments(function)["x"])


def _put(base: np.ndarray, place: tuple[slice, ...], values: np.ndarray) -> np.ndarray:
    base[place] = values
    return base[place]


@pytest.mark.parametrize("function", WITH_OUT)
def test_out_in_place_of_an_input(function: str) -> None:
    """Out may be x itself, or dy or tx itself."""
    for argument in (a for a in ("x", "dy", "tx") if a in calls.parameters(function)):
        kwargs = calls.arguments(function)
        wanted = calls.call(function, {k: v for k, v in kwargs.items() if k != "out"})
        kwargs["out"] = kwargs[argument]
        result = calls.call(function, kwargs)
        y, expected = (r if isinstance(r, np.ndarray) else r[0] for r in (result, wanted))
        assert y is kwargs[argument]
        np.testing.assert_array_equal(y, expected)


def test_out_of_a_library_that_never_writes() -> None:
    """jax arrays are not written in place."""
    pytest.importorskip("jax", reason="jax is not installed")
    import jax.numpy as jnp

    with pytest.raises(TypeError, match=r"\bout\b.*jax.*leave it out"):
        cugn.group_norm(jnp.ones((1, 4)), 2, out=jnp.ones((1, 4)))


def test_moments_methods() -> None:
    """Merge and rstd refuse what they cannot take."""
    m = cugn.moments(np.ones((2, 4, 3)), 2)
    with pytest.raises(TypeError, match=r"\bother\b.*tuple.*Moments"):
        m.merge(tuple(m))
    with pytest.raises(ValueError, match=r"\bother\b.*\(2, 1\).*\(2, 2\)"):
        m.merge(cugn.moments(np.ones((2, 4, 3)), 1))
    for eps in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"\beps\b.*finite and >= 0"):
            m.rstd(eps)
    for eps in ("1e-5", None, 1j, [1e-5]):
        with pytest.raises(TypeError, match=r"\beps\b.*real number"):
            m.rstd(eps)


def test_jax_without_float64() -> None:
    """A library that is set to have no float64 is a TypeError, not a silent loss."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    with (
        jax.enable_x64(False),
        pytest.warns(UserWarning, match="float64"),  # jax's own
        pytest.raises(TypeError, match=r"\bx\b.*float32.*jax_enable_x64"),
    ):
        cugn.group_norm(jax.numpy.ones((1, 4), dtype="float32"), 2)
