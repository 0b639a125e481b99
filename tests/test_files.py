"""Files are normalized to what arrays would be; the output is complete and right, or absent, or the old one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cugn
from cugn import command, files, formats, threads
from cugn.__main__ import main

SHAPE = (3, 8, 30, 40)
LABELS = [0, 1, 2, 0, 1, 2, 0, 0]
AXES = {
    "default": {},
    "no batch": {"channel_axis": 1, "batch_axis": None},
    "channels last": {"channel_axis": -1, "batch_axis": 0},
    "batch last": {"channel_axis": 1, "batch_axis": -1},
    "batch around": {"channel_axis": 1, "batch_axis": (0, 2)},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)  # 115 kB of float32 are some 30 blocks
    monkeypatch.setattr(files, "AHEAD", 4)
    monkeypatch.setattr(command, "_resident", lambda: 0)  # pytest itself may be larger than the command's budget


@pytest.fixture
def x() -> np.ndarray[Any, Any]:
    return (1e4 + np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def check(y: Any, wanted: Any) -> None:
    """Equal up to the promise of each side (16 bits: half a unit in the last place of y)."""
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    eps = np.finfo(y.dtype).eps * {"float64": 2 * 4, "float32": 2 * 3}.get(y.dtype.name, 1)
    assert np.abs(y - wanted).max() <= eps * max(1, np.abs(wanted).max())


@pytest.mark.rare(
    when=lambda dtype, order, axes: (
        dtype in ("<f8", "<f2", "|u1")
        and (order != "C" or axes != {})
        and (dtype, order, axes) != ("<f8", "C", AXES["batch last"])  # row by row, as channels-last is
    )
)
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", "<f2", "|u1"])
def test_npy(tmp_path: Path, x: Any, dtype: str, order: str, axes: Any) -> None:
    x = (x - 1e4 + 50 if dtype in ("<f2", "|u1") else x).astype(dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    native = x.astype(x.dtype.newbyteorder("="))
    groups = 4 if axes.get("channel_axis", 1) == -1 else LABELS
    weight = np.linspace(-1, 2, x.shape[axes.get("channel_axis", 1)])
    options = {"weight": weight, "activation": "silu", **axes}
    wanted = cugn.group_norm(native, groups, **options)

    assert files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", groups, **options) == 1
    once = np.load(tmp_path / "y.npy")
    check(once, wanted)
    assert once.flags.f_contiguous == (order == "F")

    source, target, stats = tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "s.npz"
    assert files.normalize_file(source, target, groups, save_stats=stats, **options) == 2
    twice = np.load(target)
    check(twice, wanted)
    assert files.normalize_file(source, target, groups, stats=stats, **options) == 1
    np.testing.assert_array_equal(np.load(target), twice)
    if files.normalize_file(source, target, groups, memory=50_000, **options) == 2:  # sample by sample where it can be
        np.testing.assert_array_equal(np.load(target), twice)
    else:
        np.testing.assert_array_equal(np.load(target), once)
    saved, m = np.load(stats), cugn.moments(native, groups, **axes)
    np.testing.assert_array_equal(saved["count"], m.count)
    np.testing.assert_allclose(saved["mean"], m.mean, rtol=1e-14)
    np.testing.assert_allclose(saved["m2"], m.m2, rtol=1e-11)
    assert listing(tmp_path) == ["s.npz", "x.npy", "y.npy"]


def test_a_sample_larger_than_memory_takes_two_passes(tmp_path: Path, x: Any) -> None:
    np.save(tmp_path / "x.npy", x)
    memory = 100_000
    assert files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, memory=memory) == 2
    check(np.load(tmp_path / "y.npy"), cugn.group_norm(x, 4))
    assert files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, memory=10 * memory) == 1
    with pytest.raises(
        files.FileError, match=r"x.npy: [0-9.]* kB more memory are needed: a block of it takes 1[0-9.]* kB"
    ):
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, memory=10_000)


def test_moments_are_one_sample_ahead(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is read for the second time beside the next one's first, so that the system still has it in memory."""
    np.save(tmp_path / "x.npy", x)
    order: list[int] = []
    real = formats.NpySource.read

    def read(self: Any, index: Any, memory: Any) -> Any:
        order.append(index[0].start)
        assert threads.setting() != 0  # one thread alone has helpers
        return real(self, index, memory)

    monkeypatch.setattr(formats.NpySource, "read", read)
    assert files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, memory=50_000, threads=1) == 2
    count = len(order) // 6
    assert order == [0] * count + [0, 1] * count + [1, 2] * count + [2] * count
    order.clear()
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, threads=1, save_stats=tmp_path / "s.npz")
    assert order == 2 * [n for n in range(3) for _ in range(count)]


def test_blocks_beside_others_get_no_helpers(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", x)
    settings = []
    for name in ("group_norm", "normalized"):
        real = getattr(files, name)
        monkeypatch.setattr(
            files, name, lambda *a, real=real, **k: (settings.append(threads.setting()), real(*a, **k))[1]
        )
    for memory in (50_000, 1 << 20):
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, memory=memory, threads=2)
    assert set(settings) == {0}


def test_float64_far_from_zero(tmp_path: Path) -> None:
    x = 1e12 + np.random.default_rng(1).normal(size=(1, 4, 900))
    np.save(tmp_path / "x.npy", x)
    wanted = cugn.group_norm(x, 2)
    stats = tmp_path / "s.npz"
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 2, save_stats=stats)
    check(np.load(tmp_path / "y.npy"), wanted)
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 2, stats=stats)
    check(np.load(tmp_path / "y.npy"), wanted)


@pytest.mark.parametrize(("dtype", "result"), [(np.float32, "float64"), (np.float64, "float32"), (np.uint8, "float16")])
def test_dtype(tmp_path: Path, x: Any, dtype: Any, result: str) -> None:
    x = (x - 9900).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, dtype=result)
    y = np.load(tmp_path / "y.npy")
    wanted = cugn.group_norm(x.astype(np.float64), 4)
    assert y.dtype == result
    # rounded once to float32 at most, then to the result
    eps = float(np.finfo(result).eps) + (np.finfo(np.float32).eps if dtype == np.uint8 else 0)
    assert np.abs(y - wanted).max() <= 4 * eps * np.abs(wanted).max()


def test_in_place_and_replaced(tmp_path: Path, x: Any) -> None:
    path = tmp_path / "x.npy"
    np.save(path, x)
    files.normalize_file(path, path, 4)
    check(np.load(path), cugn.group_norm(x, 4))
    assert listing(tmp_path) == ["x.npy"]


def test_empty(tmp_path: Path) -> None:
    for shape in ((0, 4, 3), (2, 4, 0)):
        np.save(tmp_path / "x.npy", np.ones(shape, np.float32))
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 2)
        assert np.load(tmp_path / "y.npy").shape == shape


@pytest.mark.parametrize("axes", [AXES["default"], AXES["batch last"]])
def test_zarr(tmp_path: Path, x: Any, axes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr = pytest.importorskip("zarr")
    source = zarr.create_array(
        tmp_path / "x.zarr",
        shape=x.shape,
        dtype=x.dtype,
        chunks=(1, 3, 7, 20),
        attributes={"units": "K"},
        dimension_names=("t", "channel", "y", "x"),
    )
    source[...] = x
    wanted = cugn.group_norm(x, 4, **axes)
    assert files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4, **axes) == 1
    target = zarr.open_array(tmp_path / "y.zarr", mode="r")
    check(target[...], wanted)
    assert target.chunks == source.chunks
    assert target.compressors == source.compressors
    assert dict(target.attrs) == {"units": "K"}
    assert target.metadata.dimension_names == ("t", "channel", "y", "x")
    stats = tmp_path / "s.npz"
    assert files.normalize_file(tmp_path / "x.zarr", tmp_path / "z.zarr", 4, save_stats=stats, **axes) == 2
    check(zarr.open_array(tmp_path / "z.zarr", mode="r")[...], wanted)
    assert listing(tmp_path) == ["s.npz", "x.zarr", "y.zarr", "z.zarr"]
    with pytest.raises(files.FileError, match=r"y\.zarr: exists already"):
        files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4, **axes)


def test_zarr_shards(tmp_path: Path, x: Any) -> None:
    zarr = pytest.importorskip("zarr")
    source = zarr.create_array(
        tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(1, 2, 5, 5), shards=(1, 4, 10, 20), compressors=None
    )
    source[...] = x
    files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4)
    target = zarr.open_array(tmp_path / "y.zarr", mode="r")
    assert (target.shards, target.compressors) == (source.shards, source.compressors)
    check(target[...], cugn.group_norm(x, 4))


def status(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Exit status and the line on standard error."""
    code = main(["normalize", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.err


def test_command(tmp_path: Path, x: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(source, x)
    np.save(tmp_path / "w.npy", np.arange(8.0))
    code, _ = status(
        capsys, source, target, "--groups", "0,1,2,0,1,2,0,0", "--weight", tmp_path / "w.npy", "--eps", 1e-3
    )
    assert code == 0
    check(np.load(target), cugn.group_norm(x, LABELS, np.arange(8.0), eps=1e-3))
    arguments = ("--groups", 5, "--channel-axis", -1, "--batch-axis", "none", "--memory", "2GiB", "--quiet")
    assert status(capsys, source, target, *arguments) == (0, "")
    check(np.load(target), cugn.group_norm(x, 5, channel_axis=-1, batch_axis=None))


def test_progress_without_tqdm(
    tmp_path: Path, x: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, error = status(capsys, tmp_path / "x.npy", tmp_path / "y.npy", "--groups", 4)
    assert code == 0
    assert error.splitlines()[-1] == "100 % of 115 kB"


def test_errors_are_one_line(tmp_path: Path, x: Any, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "complex.npy", x.astype(complex))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(data[:-1000])
    (tmp_path / "text.npy").write_text("no array here\n")
    (tmp_path / "broken.npy").write_bytes(data[:12] + b"{" * 50 + data[62:])
    (tmp_path / "version.npy").write_bytes(data[:6] + b"\x09" + data[7:])
    np.save(tmp_path / "matrix.npy", np.ones((2, 4)))
    np.savez(tmp_path / "other.npz", a=1)
    np.savez(tmp_path / "shape.npz", count=np.ones((5, 4)), mean=np.ones((5, 4)), m2=np.ones((5, 4)))
    (tmp_path / "folder").mkdir()
    y = tmp_path / "y.npy"
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("missing.npy", (), "missing.npy: cannot be read: No such file or directory"),
        ("text.npy", (), "text.npy: not a .npy file"),
        ("broken.npy", (), "broken.npy: not a .npy file"),
        ("version.npy", (), "version.npy: "),
        ("short.npy", (), "short.npy: cut short: 1000 bytes are missing"),
        ("complex.npy", (), "complex.npy: x has dtype complex128"),
        ("objects.npy", (), "objects.npy: holds Python objects"),
        ("x.npy", ("--groups", 3), "x.npy: groups is 3: it must divide the 8 channels"),
        ("x.npy", ("--channel-axis", 7), "x.npy: channel_axis is 7"),
        ("x.npy", ("--eps", -1), "x.npy: eps is -1.0"),
        ("x.npy", ("--weight", tmp_path / "missing.npy"), "missing.npy: cannot be read"),
        ("x.npy", ("--weight", tmp_path / "matrix.npy"), "matrix.npy: holds an array of shape (2, 4)"),
        ("x.npy", ("--stats", tmp_path / "missing.npz"), "missing.npz: cannot be read"),
        ("x.npy", ("--stats", tmp_path / "other.npz"), "other.npz: not a file of statistics"),
        ("x.npy", ("--stats", tmp_path / "text.npy"), "text.npy: not a file of statistics"),
        ("x.npy", ("--stats", tmp_path / "shape.npz"), "shape.npz: holds statistics of shape (5, 4)"),
        ("x.npy", ("--memory", "1kB"), "kB more memory are needed"),
    ]
    for name, options, message in cases:
        code, error = status(capsys, tmp_path / name, y, "--quiet", "--groups", 4, *options)
        assert code == 1, name
        assert error.startswith("cugn normalize: "), error
        assert message in error, error
        assert error.count("\n") == 1, error
        assert not y.exists()
    code, error = status(capsys, tmp_path / "x.npy", tmp_path / "no" / "y.npy", "--quiet", "--groups", 4)
    assert (code, "y.npy: cannot be written: No such file or directory" in error) == (1, True)
    code, error = status(capsys, tmp_path / "x.npy", tmp_path / "folder", "--quiet", "--groups", 4)
    assert (code, "folder: cannot be written: Is a directory" in error) == (1, True)
    assert not [name for name in listing(tmp_path) if name.endswith(".part")]
    for option, value in (("--memory", "much"), ("--groups", "a"), ("--memory", "-1")):
        with pytest.raises(SystemExit) as exit_info:
            main(["normalize", str(tmp_path / "x.npy"), str(y), "--groups", "4", option, value])
        assert exit_info.value.code == 2
    assert "is no" in capsys.readouterr().err


def test_errors_of_zarr_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zarr")
    (tmp_path / "folder").mkdir()
    code, error = status(capsys, tmp_path / "folder", tmp_path / "y.zarr", "--quiet", "--groups", 4)
    assert code == 1
    assert error.count("\n") == 1
    assert str(tmp_path / "folder") in error
    assert listing(tmp_path) == ["folder"]


def test_interrupted(
    tmp_path: Path, x: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C leaves nothing behind and ends with the status that shells expect."""
    np.save(tmp_path / "x.npy", x)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(formats.NpyTarget, "write", interrupted)
    code, error = status(capsys, tmp_path / "x.npy", tmp_path / "y.npy", "--quiet", "--groups", 4)
    assert code == 130
    assert "y.npy: interrupted, nothing was left" in error
    assert listing(tmp_path) == ["x.npy"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, x: Any) -> None:
    """It is told, and no half of an array appears."""
    np.save(tmp_path / "x.npy", x)
    source = formats.NpySource(tmp_path / "x.npy")
    os.truncate(tmp_path / "x.npy", 60_000)
    block = tuple(slice(0, n) for n in SHAPE)
    with pytest.raises(files.FileError, match=r"x\.npy: cut short while it was read"):
        source.read(block, formats.Memory())


def test_zarr_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the extra that has it."""
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "x.zarr").mkdir()
    code, error = status(capsys, tmp_path / "x.zarr", tmp_path / "y.zarr", "--quiet", "--groups", 4)
    assert (code, "pip install cugn[zarr]" in error) == (1, True)


def test_zarr_in_the_other_byte_order_and_two_runs(tmp_path: Path, x: Any) -> None:
    """Values are those of the array; a second run to the same target is refused while the first one writes."""
    zarr = pytest.importorskip("zarr")
    pytest.importorskip("fcntl")
    source = zarr.create_array(tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype.newbyteorder(), chunks=(1, 8, 30, 40))
    source[...] = x
    first = formats.ZarrSource(tmp_path / "x.zarr").like(tmp_path / "y.zarr", np.dtype("float32"))
    with pytest.raises(files.FileError, match="another run is writing it"):
        files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4)
    first.abandon()
    files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4)
    check(zarr.open_array(tmp_path / "y.zarr", mode="r")[...], cugn.group_norm(x, 4))


def test_zarr_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was being written is gone."""
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(1, 8, 30, 40))[...] = x

    def failing(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.ZarrTarget, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        files.normalize_file(tmp_path / "x.zarr", tmp_path / "y.zarr", 4)
    assert listing(tmp_path) == ["x.zarr"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by setrlimit, as Linux does")
def test_full_disk(tmp_path: Path, x: Any) -> None:
    import resource

    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-m", "cugn", "normalize", "x.npy", "y.npy", "--groups", "4", "--quiet"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(cugn.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert result.returncode == 1
    assert "y.npy: no room for 115 kB" in result.stderr
    assert result.stderr.count("\n") == 1
    assert listing(tmp_path) == ["x.npy"]


def test_a_disk_that_is_too_full_shows_before_the_work(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", x)
    usage = shutil.disk_usage(tmp_path)._replace(free=x.nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(formats.NpySource, "read", None)  # nothing may be read
    with pytest.raises(files.FileError, match=r"y\.npy: no room for 115 kB: 115 kB are free"):
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4)
    assert listing(tmp_path) == ["x.npy"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_of_a_file_that_is_larger(tmp_path: Path) -> None:
    """One sample of 400 MB, two passes: the process stays below the 200 MB that it was given."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1, 8, 100, 125_000))  # holes: quick to read
    program = (
        "import sys; from cugn.__main__ import main; code = main(['normalize', *sys.argv[1:]]); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "x.npy", "y.npy", "--groups", "4", "--memory", "200MB"]
    environment = os.environ | {"PYTHONPATH": str(Path(cugn.__file__).parents[1])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "y.npy: 2 passes" in result.stdout
    assert 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1]) < 200e6
    assert (tmp_path / "y.npy").stat().st_size == (tmp_path / "x.npy").stat().st_size


def test_failure_in_the_middle_leaves_nothing(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "y.npy").write_text("old")
    real = formats.NpyTarget.write
    written = []

    def failing(self: Any, index: Any, values: Any) -> None:
        written.append(index)
        if len(written) > 10:
            raise OSError(28, "No space left on device")
        real(self, index, values)

    monkeypatch.setattr(formats.NpyTarget, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, save_stats=tmp_path / "s.npz")
    assert listing(tmp_path) == ["s.npz", "x.npy", "y.npy"]
    assert (tmp_path / "y.npy").read_text() == "old"


def test_on_the_disk_before_it_has_its_name(tmp_path: Path, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", x)
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
@pytest.mark.parametrize("order", ["C", "F"])
def test_on_the_way_to_the_disk_while_it_is_computed(
    tmp_path: Path, x: Any, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranges that the system is asked to write follow on each other, and cover all but the last of them."""
    monkeypatch.setattr(formats, "WRITE_BEHIND", 20_000)
    monkeypatch.setattr(formats, "WRITE_BYTES", 1_000)
    np.save(tmp_path / "x.npy", np.asarray(x, order=order))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: asked.append((start, start + size)))
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, save_stats=tmp_path / "s.npz", threads=2)
    check(np.load(tmp_path / "y.npy"), cugn.group_norm(x, 4))
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])]
    size = (tmp_path / "y.npy").stat().st_size
    assert size - 20_000 <= asked[-1][1] <= size


def test_two_runs_to_one_target(tmp_path: Path, x: Any) -> None:
    pytest.importorskip("fcntl")
    np.save(tmp_path / "x.npy", x)
    first = formats.NpySource(tmp_path / "x.npy").like(tmp_path / "y.npy", x.dtype)
    with pytest.raises(files.FileError, match="another run is writing it"):
        files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4)
    assert (tmp_path / ".y.npy.part").exists()
    first.abandon()
    files.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", 4)
    assert listing(tmp_path) == ["x.npy", "y.npy"]


def _again_and_again(source: Path, target: Path, begun: Any) -> None:
    """Normalize to one .npy file that is replaced each time, or to one Zarr array after the other."""
    files.BLOCK_BYTES = 1 << 15
    shutil.rmtree(source.with_stem("first"), ignore_errors=True)
    files.normalize_file(source, source.with_stem("first"), 4, save_stats=source.with_name("s.npz"))
    begun.set()  # everything is loaded: the next ones take equally long
    for k in itertools.count():
        path = target if target.suffix == ".npy" else target.with_stem(f"y{k}")
        files.normalize_file(source, path, 4, save_stats=source.with_name("s.npz"))


def _write(path: Path, x: Any) -> None:
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        chunks = (1, 4, 16, 128)
        pytest.importorskip("zarr").create_array(path, shape=x.shape, dtype=x.dtype, chunks=chunks)[...] = x


def _read(path: Path) -> Any:
    return np.load(path) if path.suffix == ".npy" else pytest.importorskip("zarr").open_array(path, mode="r")[...]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a signal of POSIX systems")
@pytest.mark.parametrize(("suffix", "kills"), [(".npy", 20), (".zarr", 8)])
def test_killed_at_random(tmp_path: Path, suffix: str, kills: int) -> None:
    x = np.random.default_rng(0).normal(size=(4, 8, 64, 256)).astype(np.float32)
    source, target = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}"
    _write(source, x)
    wanted = cugn.group_norm(x, 4)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cugn.files", "cugn.engines", "zarr"][: 2 + (suffix == ".zarr")])
    moments = random.Random(1)
    partial = complete = 0
    start = time.perf_counter()
    files.normalize_file(source, target, 4, save_stats=tmp_path / "s.npz")
    duration = time.perf_counter() - start
    for _ in range(kills):
        for old in tmp_path.glob(f"y*{suffix}"):
            old.unlink() if old.is_file() else shutil.rmtree(old)
        begun = context.Event()
        process = context.Process(target=_again_and_again, args=(source, target, begun), daemon=True)
        process.start()
        assert begun.wait(60)
        time.sleep(moments.uniform(0, 2 * duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        partial += any(tmp_path.glob(f".y*{suffix}.part"))
        for path in tmp_path.glob(f"y*{suffix}"):
            complete += 1
            check(_read(path), wanted)
    # The kills have met both files that were being written and complete ones.
    assert partial > 0
    assert complete > 0
    # What is left half-written is taken over by the next run to that name.
    for path in {target, *(target.with_name(part.stem[1:]) for part in tmp_path.glob(".y*.part"))}:
        if path.is_dir():
            shutil.rmtree(path)
        files.normalize_file(source, path, 4, save_stats=tmp_path / "s.npz")
        check(_read(path), wanted)
    assert not list(tmp_path.glob(".*.part"))
