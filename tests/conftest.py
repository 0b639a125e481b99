"""Fixtures: the array libraries and engines in which a promise is held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
