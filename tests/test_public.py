"""Promise: the public names are complete, documented in numpydoc's form with examples, and agree in signature."""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import inspect
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest

import cugn

PACKAGE = Path(cugn.__file__).parent
# numpydoc's checks that are no promise of ours: the summary starts on the line of the quotes; no extended summary or
# See Also where nothing is to be said; parameters that are "as in group_norm" stand together, without types, so that
# they are described once; descriptions start with the name of the array ("dx, of x's shape"); "Gradients" is no verb.
IGNORED = {"GL01", "ES01", "SA01", "PR03", "PR04", "RT02", "RT03", "RT04", "SS05", "SS06"}
OF_CLASSES = {"PR01", "EX01"}  # the fields of a named tuple are its Attributes
PUBLIC = [name for name in cugn.__all__ if not name.startswith("__")]
DOCUMENTED = [name for name in PUBLIC if not inspect.ismodule(getattr(cugn, name))]


def modules() -> list[str]:
    """Names of the package's modules that can be imported everywhere."""
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "cugn.") if not m.name.endswith("__main__")]
    return [n for n in names if not n.startswith("cugn.cuda")]


def test_all_is_complete() -> None:
    """`__all__` is sorted, without repetition, and holds every public thing of the package's own."""
    assert cugn.__all__ == sorted(set(cugn.__all__))
    own = {
        name
        for name, value in vars(cugn).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("cugn")
    }
    assert own == set(PUBLIC) - {name for name in PUBLIC if inspect.ismodule(getattr(cugn, name))}
    for module in ("functional", "family", "results"):
        source = __import__(f"cugn.{module}", fromlist=["x"])
        assert set(source.__all__) <= set(cugn.__all__), module


def test_all_of_every_module_exists() -> None:
    """What a module's `__all__` names is there."""
    for name in modules():
        module = __import__(name, fromlist=["x"])
        for entry in getattr(module, "__all__", ()):
            assert hasattr(module, entry), f"{name}.{entry}"


def test_version() -> None:
    """From one place; the installed distribution, if there is one of this tree, says the same."""
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", cugn.__version__)
    try:
        distribution = importlib.metadata.distribution("cugn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cugn is not installed here, but on the path")
    if PACKAGE.is_relative_to(Path(str(distribution.locate_file("")))):
        assert distribution.version == cugn.__version__


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring(name: str) -> None:
    """Every public name, and every public method, has a docstring that numpydoc accepts."""
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is not installed")
    thing = getattr(cugn, name)
    names = [f"cugn.{name}"]
    if inspect.isclass(thing):
        names += [f"cugn.{name}.{k}" for k, v in vars(thing).items() if inspect.isfunction(v) and not k.startswith("_")]
    for full in names:
        result = validate.validate(full)
        ignored = IGNORED if full.count(".") == 1 and inspect.isfunction(thing) else IGNORED | OF_CLASSES
        errors = [f"{full}: {code} {text}" for code, text in result["errors"] if code not in ignored]
        assert not errors, "\n".join(errors)


@pytest.mark.parametrize("name", [n for n in DOCUMENTED if inspect.isfunction(getattr(cugn, n))])
def test_docstring_has_an_example_and_a_first_line(name: str) -> None:
    """Functions show an example, describe what they return, and say what they do in one line."""
    doc = inspect.getdoc(getattr(cugn, name)) or ""
    assert ">>> " in doc
    assert "Returns\n-------" in doc or "set_" in name
    assert doc.splitlines()[0].endswith(".")
    assert len(doc.splitlines()[0]) < 110


@pytest.mark.parametrize("module", modules())
def test_doctests(module: str) -> None:
    """The examples give what they show."""
    pytest.importorskip("dask.array", reason="dask is not installed") if module == "cugn.dask" else None
    result = doctest.testmod(
        __import__(module, fromlist=["x"]), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_examples_are_many() -> None:
    """The test above has something to run."""
    finder = doctest.DocTestFinder()
    assert sum(len(t.examples) for t in finder.find(cugn.functional) + finder.find(cugn.family)) > 30


SAME = ("weight", "bias", "mean", "rstd", "eps", "channel_axis", "batch_axis", "where", "activation", "out", "x", "dy")


def test_signatures_agree() -> None:
    """An argument has the same default and kind wherever it occurs, and options are keyword-only."""
    seen: dict[str, Any] = {}
    for name in calls.FUNCTIONS:
        for p in inspect.signature(getattr(cugn, name)).parameters.values():
            if p.default is inspect.Parameter.empty:
                assert p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            elif p.name not in ("weight", "bias"):
                assert p.kind is inspect.Parameter.KEYWORD_ONLY, (name, p.name)
            if p.default is not inspect.Parameter.empty and p.name in SAME:
                assert seen.setdefault(p.name, p.default) == p.default, (name, p.name)
    numbers = {"eps": 1e-5, "channel_axis": 1, "batch_axis": 0}
    assert seen == dict.fromkeys(("weight", "bias", "mean", "rstd", "where", "activation", "out")) | numbers


@pytest.mark.parametrize("suffix", ["", "_forward", "_backward"])
def test_family_has_group_norms_signature(suffix: str) -> None:
    """Layer, instance and batch norm take what group norm takes, without `groups`, in the same order."""
    group = [p for p in inspect.signature(getattr(cugn, "group_norm" + suffix)).parameters if p != "groups"]
    for member in ("layer", "instance", "batch"):
        assert list(inspect.signature(getattr(cugn, f"{member}_norm{suffix}")).parameters) == group


def test_results_are_named() -> None:
    """Fields by name and by position."""
    x = np.ones((2, 4, 3))
    y, mean, rstd = forward = cugn.group_norm_forward(x, 2)
    assert (forward.y is y, forward.mean is mean, forward.rstd is rstd) == (True,) * 3
    assert forward._fields == ("y", "mean", "rstd")
    assert cugn.group_norm_backward(x, x, 2)._fields == ("dx", "dweight", "dbias")
    double = cugn.group_norm_double_backward(x, x, x, 2)
    assert (double.gdy is double[0], double.gx is double[1], double.gweight is double[2]) == (True,) * 3
    assert len(double) == 3
    assert double.gbias.shape == (4,)
    assert repr(double).startswith("GroupNormDoubleGrads(gdy=array(")


def test_double_gradients_survive_copies() -> None:
    """Copying and pickling keep gbias."""
    import copy
    import pickle

    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    double = cugn.group_norm_double_backward(x, x, x, 2, activation="silu")
    assert double.gbias.any()
    for other in (copy.copy(double), copy.deepcopy(double), pickle.loads(pickle.dumps(double))):
        np.testing.assert_array_equal(other.gbias, double.gbias)
        np.testing.assert_array_equal(other.gx, double.gx)


def test_typed() -> None:
    """The package says that it is typed, and every public function is, in full."""
    assert (PACKAGE / "py.typed").is_file()
    for name in calls.FUNCTIONS:
        signature = inspect.signature(getattr(cugn, name))
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


def test_every_module_says_what_it_does() -> None:
    """First line of each file of the package and of the tests."""
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert doc.strip(), path
        if path.name.startswith("test_") and path.parent == Path(__file__).parent:
            assert len(doc.splitlines()[0]) > 20, path


def test_no_function_is_public_by_accident() -> None:
    """dir(cugn) shows the public names, the modules and nothing else."""
    for name in dir(cugn):
        if not name.startswith("_") and name not in cugn.__all__:
            assert isinstance(getattr(cugn, name), types.ModuleType), name
