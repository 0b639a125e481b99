"""Fixtures: the array libraries and engines in which a promise is held."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests/conformance imports what lies here by name

from libraries import EVERYTHING, LIBRARIES, Library, use_reference


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave rare(when=...) cases to CUGN_TESTS=all: `when` is asked with those parameters of a case that it names."""
    for item in items if not EVERYTHING else ():
        for mark in item.iter_markers("rare"):
            when = mark.kwargs["when"]
            assert isinstance(item, pytest.Function)
            if when(**{name: item.callspec.params[name] for name in inspect.signature(when).parameters}):
                item.add_marker(pytest.mark.skip(reason="compiles kernels of its own: set CUGN_TESTS=all"))


@pytest.fixture(params=LIBRARIES)
def xp(request: pytest.FixtureRequest) -> Library:
    """Each array library that is installed."""
    return LIBRARIES[request.param]()


@pytest.fixture(params=["engine", "reference", "array_api_strict"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Engine that serves NumPy, the reference in its place, and the reference under array-api-strict."""
    if request.param == "reference":
        use_reference(monkeypatch)
    return LIBRARIES["array_api_strict" if request.param == "array_api_strict" else "numpy"]()


# Examples are made of arrays, and the machine may be busy: no time limits. The ci profile draws the same examples each
# time, so that it fails on the change that broke something and not on a later one.
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **QUIET)
settings.register_profile("long", max_examples=20_000, **QUIET)
settings.load_profile(os.environ.get("CUGN_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def fast() -> Iterator[Library]:
    """The CUDA engine in the emulator's fast mode, or on the device."""
    from cuda_on_cpu import emulated

    with emulated(mode="fast") as library:
        yield library


@pytest.fixture
def checked() -> Iterator[Library]:
    """The CUDA engine in the emulator's check mode, or on the device."""
    from cuda_on_cpu import emulated

    with emulated() as library:
        yield library
