"""An array in parts, whoever holds them, is normalized and differentiated as the whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import subprocess_environment

import cugn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


class Threads:
    """As much of an MPI communicator as the example uses, between threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.board: list[Any] = [None] * size
        self.own = threading.local()

    def Allgather(self, send: Any, receive: Any) -> None:  # mpi4py's name
        self.board[self.own.rank] = send.copy()
        self.barrier.wait()
        receive[...] = self.board
        self.barrier.wait()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_slabs_between_threads(size: int) -> None:
    import shards_mpi

    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1, (2, 8, 11, 6)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    weight, bias = rng.normal(1, 0.5, (2, 8))
    comm, results = Threads(size), [None] * size

    def run(rank: int) -> None:
        comm.own.rank = rank
        slab, dy_slab = (np.array_split(array, size, axis=2)[rank] for array in (x, dy))
        y, saved = shards_mpi.forward(comm, slab, 4, weight, bias)
        results[rank] = y, *shards_mpi.backward(comm, dy_slab, slab, 4, weight, saved)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ys, dxs, dweights, dbiases = zip(*results, strict=True)
    wanted = cugn.group_norm_backward(dy, x, 4, weight)
    eps = np.finfo(np.float32).eps
    y = cugn.group_norm(x, 4, weight, bias)
    assert np.abs(np.concatenate(ys, axis=2) - y).max() <= 3 * eps * np.abs(y).max()
    assert np.abs(np.concatenate(dxs, axis=2) - wanted.dx).max() <= 4 * eps * np.abs(wanted.dx).max()
    for rank in range(size):
        # float64 sums in another order, of 132 terms of size |dy x_hat| < 20
        np.testing.assert_allclose(dweights[rank], wanted.dweight, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(dbiases[rank], wanted.dbias, rtol=1e-9, atol=1e-9)
        assert dweights[rank].tobytes() == dweights[0].tobytes()


def _mpirun() -> str | None:
    return shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def test_slabs_under_mpi() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpirun = _mpirun()
    if mpirun is None:
        pytest.skip("no mpirun: install mpich or openmpi")
    result = subprocess.run(
        [mpirun, "-n", "2", sys.executable, str(EXAMPLES / "shards_mpi.py")],
        env=subprocess_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("2 processes")]
    assert [line.split(",")[1].split(":")[0].strip() for line in lines] == ["y", "dx", "dweight", "dbias"]


def _rare(dtype: str, groups: Any, activation: str | None) -> bool:
    """Each activation, and labels with none."""
    if activation is None:
        return dtype == "float64" and groups != 4
    return dtype != ("float32" if activation in ("relu", "silu") else "float64") or groups != 4


@pytest.mark.rare(when=_rare)
@pytest.mark.rare(when=lambda views: views)
@pytest.mark.parametrize("views", [False, True], ids=["copies", "views"])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("groups", [4, [0, 2, 1, 0, 0, 1, 2, 0]], ids=["equal", "labels"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_parts_make_the_backward(dtype: str, groups: Any, activation: str | None, views: bool) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(3, 1, (3, 8, 9, 7)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    weight, bias, where = rng.normal(size=8), rng.normal(size=8), rng.random(x.shape) < 0.6
    options = {"activation": activation}
    wanted = cugn.group_norm_backward(dy, x, groups, weight, bias, where=where, **options)
    m = cugn.moments(x, groups, where=where)
    statistics = m.mean, m.rstd(1e-5)
    tiles = [np.s_[:, :, :4], np.s_[:, :, 4:, :5], np.s_[:, :, 4:, 5:]]
    x_of, dy_of, where_of = ([a[t] if views else a[t].copy() for t in tiles] for a in (x, dy, where))
    parts = [cugn.backward_sums(dy_of[i], x_of[i], *statistics, groups, weight, bias, **options) for i in range(3)]
    whole = parts[0].merge(parts[1]).merge(parts[2])
    means = whole.sum_wdy / m.count, whole.sum_wdy_xhat / m.count
    eps = np.finfo(dtype).eps
    for i, t in enumerate(tiles):
        for out in (None, np.full_like(x_of[i], 7)):
            dx = cugn.backward_apply(
                dy_of[i], x_of[i], *statistics, *means, groups, weight, bias, where=where_of[i], out=out, **options
            )
            assert out is None or dx is out
            assert dx.dtype == dtype
            # the promised bound of each side
            assert np.abs(dx - wanted.dx[t]).max() <= 2 * (8 if dtype == "float64" else 4) * eps * np.abs(dx).max()
    assert (whole.dweight.dtype, whole.dbias.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(whole.dweight, wanted.dweight, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.dbias, wanted.dbias, rtol=1e-9, atol=1e-9)


def test_sums_of_other_shapes_do_not_merge() -> None:
    x = np.ones((2, 4, 3))
    sums = cugn.backward_sums(x, x, np.zeros(2), np.ones(2), 2)
    with pytest.raises(ValueError, match="other has the shapes"):
        sums.merge(cugn.backward_sums(x[:1], x[:1], np.zeros(2), np.ones(2), 2))
    with pytest.raises(TypeError, match="other is a tuple"):
        sums.merge(tuple(sums))


def test_statistics_are_taken_as_they_are() -> None:
    """A part's own mean has no place in its gradient: it is that of a part."""
    x = np.random.default_rng(0).normal(5, 1, (1, 2, 50)).astype(np.float32)
    mean, rstd = np.array([[1.0, 2.0]]), np.array([[0.5, 2.0]])
    x_hat = (x - mean[:, :, None]) * rstd[:, :, None]
    sums = cugn.backward_sums(x, x, mean, rstd, 2)
    np.testing.assert_allclose(sums.sum_wdy_xhat, (x * x_hat).sum(-1), rtol=1e-12)
    dx = cugn.backward_apply(x, x, mean, rstd, np.zeros(2), np.ones(2), 2)
    np.testing.assert_allclose(dx, rstd[:, :, None] * (x - x_hat), rtol=1e-5, atol=1e-5)


def test_a_file_by_slices(tmp_path: Path) -> None:
    import out_of_core

    x = np.random.default_rng(0).normal(1e4, [[[1.0], [30.0]]], (70, 2, 40)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=x.dtype, shape=x.shape)
    out_of_core.normalize_into(y, mapped, out_of_core.streamed_moments(mapped, 16), 16)
    # statistics that agree to 1e-11, each y rounded once from them
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), cugn.batch_norm(x), rtol=0, atol=1e-6)
    y.flush()
