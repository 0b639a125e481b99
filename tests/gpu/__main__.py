"""``python -m tests.gpu [report.json]``: all GPU tests, and a report (device, results, times) to send back.

Beside the tests of this folder those of the CUDA engine that run on the emulator elsewhere: here on the device.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path


def main() -> int:
    """Run pytest here and write the report."""
    import pytest

    report = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-report.json").resolve()
    report.unlink(missing_ok=True)
    os.environ |= {"CUGN_GPU_REPORT": str(report), "CUGN_CUDA": "device"}
    results: dict[str, str] = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                text = "" if report.outcome == "passed" else f": {str(report.longrepr)[-2000:]}"
                results[report.nodeid] = report.outcome + text

    here = Path(__file__).parent
    engine = [str(here.parent / f"test_cuda_{what}.py") for what in ("values", "gradients", "errors", "host")]
    code = pytest.main([str(here), *engine, "-q"], plugins=[Recorder()])
    record = json.loads(report.read_text()) if report.exists() else {}
    record["machine"] = _machine()
    record["results"] = results
    report.write_text(json.dumps(record, indent=1))
    print(f"report: {report}")
    return int(code)


def _machine() -> dict[str, str]:
    import cugn

    found = {"python": platform.python_version(), "cugn": cugn.__version__}
    try:
        import cupy

        found["cupy"] = cupy.__version__
        found["driver"] = str(cupy.cuda.runtime.driverGetVersion())
        for i in range(cupy.cuda.runtime.getDeviceCount()):
            found[f"device {i}"] = cupy.cuda.runtime.getDeviceProperties(i)["name"].decode()
    except Exception as error:  # the report says what is missing
        found["no device"] = repr(error)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
