"""README: short, its code runs, its files exist, and it says truly which engine serves what."""

import re
from pathlib import Path

import numpy as np
import pytest

import cugn
from cugn.engines import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) < 120
    job, tests = blocks("sh")[:2]
    assert README.index(job) < README.index(tests) < README.index("```python")
    assert job.splitlines()[-1].endswith("examples/train_digits.py")
    assert tests.splitlines()[-1].endswith("-m pytest")
    for command in (job, tests):  # each sets up everything by itself
        assert command.startswith("python3 -m venv .venv\n.venv/bin/pip install ")


def test_loop_learns():
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 14
    names: dict[str, object] = {}
    exec(code, names)
    y, target = names["y"], names["target"]
    first = cugn.group_norm(names["x"], 8)
    assert np.mean((y - target) ** 2) < 0.9 * np.mean((first - target) ** 2)


def test_files_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"\b((?:examples|asv_bench)/\w+\.py)", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def served_by(operation, **settings):
    """Name of the engine for NumPy arrays of every dtype and layout; it must be one for all."""
    engines = set()
    for dtype in (np.float16, np.float32, np.float64):
        for axis in (1, -1):
            x = np.zeros((2, 4, 4), dtype)
            operands = {"backward": ["dy"], "jvp": ["tx"], "double_backward": ["ddx", "dy"]}.get(operation, [])
            arrays = [(name, x) for name in operands]
            if settings.get("where"):
                arrays.append(("where", np.ones(x.shape, bool)))
            groups = settings.get("groups", 2)
            engines.add(resolve(operation, x, groups, arrays, 1e-5, axis, 0, settings.get("activation"))[0].__name__)
    assert len(engines) == 1
    return {"cugn.cpu": "Numba", "cugn.reference": "reference"}[engines.pop()]


FORMS = {
    "forward, backward": [("forward", {}), ("backward", {})],
    "the same with an activation, a mask or labels": [
        (operation, settings)
        for operation in ("forward", "backward")
        for settings in ({"activation": "silu"}, {"where": True}, {"groups": (0, 1, 1, 0)})
    ],
    "jvp": [("jvp", {})],
    "moments, normalize": [("moments", {}), ("normalize", {})],
    "double backward": [("double_backward", {})],
}


@pytest.mark.parametrize("form", FORMS)
def test_table_of_engines(form):
    row = re.search(rf"^\| {form} \| (\w+) \|", README, re.M)
    assert row is not None
    for operation, settings in FORMS[form]:
        assert served_by(operation, **settings) == row[1], (operation, settings)
