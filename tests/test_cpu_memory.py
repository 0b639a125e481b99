"""Promise: no temporary as large as x: forward with `out` and backward take less than 2 % of x beside their results."""

from __future__ import annotations

import subprocess
import sys

import pytest
from libraries import subprocess_environment

# Peak resident memory of the process, which all arrays have touched before, and after the calls.
PROGRAM = """
import resource, sys
import numpy as np, cugn
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
shape, groups, arrange, dtype = {case}
def array():
    x = np.empty(shape, dtype)
    x.reshape(-1)[...] = np.resize(np.arange(-500, 501).astype(dtype), x.size)
    return arrange(x)
small = [v[:1] for v in (array(), array())]
weight = np.ones(small[0].shape[1], dtype)
for w in (None, weight):  # kernels are compiled or loaded, threads started
    cugn.group_norm(small[0], groups, w, out=np.empty_like(small[0]))
    cugn.group_norm_backward(small[1], small[0], groups, w, out=np.empty_like(small[0]))
x, dy, out = array(), array(), array()
warm = [v[: max(1, len(v) // 8)] for v in (x, dy, out)]
cugn.group_norm(warm[0], groups, weight, out=warm[2])
cugn.group_norm_backward(warm[1], warm[0], groups, weight, out=warm[2])
before = peak()
cugn.group_norm(x, groups, weight, out=out)
forward = peak() - before
cugn.group_norm_backward(dy, x, groups, weight, out=out)
backward = peak() - before
print(forward / x.nbytes, backward / x.nbytes)
assert max(forward, backward) < 0.02 * x.nbytes, (forward, backward, x.nbytes)
"""

CASES = {
    "channels first": "(16, 64, 128, 128), 32, lambda x: x, np.float32",
    "channels last": "(16, 128, 128, 64), 32, lambda x: np.moveaxis(x, -1, 1), np.float32",
    "channels last, instances": "(16, 64, 64, 256), 256, lambda x: np.moveaxis(x, -1, 1), np.float32",
    "one group": "(2, 32, 64, 64, 64), 1, lambda x: x, np.float32",
    "table": "(65536, 256), 32, lambda x: x, np.float32",
    "cropped": "(16, 64, 130, 130), 32, lambda x: x[:, :, 1:-1, 1:-1], np.float32",
    "float16": "(32, 64, 128, 128), 32, lambda x: x, np.float16",
}


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on this system")
@pytest.mark.parametrize("case", CASES)
def test_peak_memory(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{case}", CASES[case])],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
