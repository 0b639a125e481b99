"""Fixtures: the array libraries and engines in which a promise is held."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests/conformance imports what lies here by name

from libraries import LIBRARIES, Library, use_reference


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
