"""Promise: kernels kept on disk never fail a call, whatever happened to them, and are never those of other code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import subprocess_environment

import cugn

PROGRAM = """
import numpy as np, cugn
from cugn.cpu import cache
saved, save = [], cache.save
cache.save = lambda *kernel: (saved.append(kernel), save(*kernel))
x = np.arange(64, dtype=np.float32).reshape(2, 4, 8)
y = cugn.group_norm(x, 2).reshape(2, 2, -1)
assert abs(y.mean(-1)).max() < 1e-6 and abs(y.std(-1) - 1).max() < 1e-3
print("compiled" if saved else "loaded")
"""


def run(folder: Path | str, package: Path | None = None, **variables: str) -> str:
    """Whether a new process compiled kernels or loaded them all; it must get the right result."""
    environment = subprocess_environment(CUGN_CACHE_DIR=str(folder), **variables)
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the kernels of one call."""
    folder = tmp_path_factory.mktemp("cache") / "cugn"
    assert run(folder) == "compiled"
    return folder


def copy(filled: Path, to: Path) -> Path:
    return Path(shutil.copytree(filled, to / "cache"))


def test_a_second_process_loads_what_the_first_compiled(filled: Path) -> None:
    assert run(filled) == "loaded"


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "one bit"])
def test_damaged_entries_are_compiled_again(filled: Path, tmp_path: Path, damage: str) -> None:
    folder = copy(filled, tmp_path)
    entry, *others = sorted(folder.glob("*.kernel"))
    assert others  # one of several is enough
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(
        {"truncated": bytes(data[:1000]), "empty": b"", "garbage": b"x" * 5000, "one bit": bytes(data)}[damage]
    )
    assert run(folder) == "compiled"
    assert run(folder) == "loaded"


def test_an_edited_helper_is_another_kernel(filled: Path, tmp_path: Path) -> None:
    package = tmp_path / "copy"
    shutil.copytree(Path(cugn.__file__).parent, package / "cugn", ignore=shutil.ignore_patterns("__pycache__"))
    helper = package / "cugn" / "cpu" / "block_moments.py"
    helper.write_text(helper.read_text() + "\n# edited\n")
    assert run(filled, package) == "compiled"


def test_another_conversion_is_another_kernel(filled: Path) -> None:
    assert run(filled, CUGN_F16C="0") == "compiled"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "cache") == "compiled"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no such permissions on this system")
def test_a_folder_that_others_may_write_is_not_trusted(filled: Path, tmp_path: Path) -> None:
    folder = copy(filled, tmp_path)
    folder.chmod(0o777)
    assert run(folder) == "compiled"
    folder.chmod(0o700)
    assert run(folder) == "loaded"
    assert not folder.stat().st_mode & 0o022


def test_operations_share_what_they_have_in_common(filled: Path, tmp_path: Path) -> None:
    folder = copy(filled, tmp_path)
    program = """
import numpy as np, cugn
from cugn.cpu import cache
x = np.arange(64, dtype=np.float32).reshape(2, 4, 8)
def new(call):
    before = len(list(cache.folder().glob("*.kernel")))
    call()
    return len(list(cache.folder().glob("*.kernel"))) - before
assert new(lambda: cugn.group_norm(x, 2)) == 0
assert new(lambda: cugn.moments(x, 2)) == 0
assert new(lambda: cugn.instance_norm(x)) == 0
assert new(lambda: cugn.group_norm(x, 2, activation="relu")) == 1  # y alone
"""
    environment = subprocess_environment(CUGN_CACHE_DIR=str(folder))
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, cwd="/", timeout=120, check=True)


def test_several_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    environment = subprocess_environment(CUGN_CACHE_DIR=str(tmp_path / "cugn"))
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    for child in children:
        child.communicate()
    assert not list((tmp_path / "cugn").glob("*.part"))
    assert run(tmp_path / "cugn") == "loaded"
