"""Times by events beside a device-to-device copy, and torch's group_norm where it is installed with CUDA."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import timing

REPORT = Path(os.environ.get("CUGN_GPU_REPORT", "gpu-report.json"))


@pytest.fixture(scope="module")
def flush() -> Callable[[], Any]:
    """Empties the second-level cache."""
    return timing.flush()


@pytest.mark.parametrize("dtype", timing.DTYPES)
@pytest.mark.parametrize("case", timing.CASES, ids=lambda case: f"{case.name} {case.shape}")
def test_time(case: timing.Case, dtype: str, flush: Callable[[], Any]) -> None:
    """Written to the report; no group norm may take longer than 10 copies of x and 0.1 ms."""
    times = timing.measure(case, dtype, flush)
    record = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    record.setdefault("times, ms", {})[f"{case.name} {case.shape} G={case.groups} {dtype}"] = times
    REPORT.write_text(json.dumps(record, indent=1))
    assert times["forward"] is not None
    assert times["copy"] is not None
    assert times["forward"] < 10 * times["copy"] + 0.1
