"""Dask arrays on a cluster of processes, one of which dies while it works."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

import cugn

distributed = pytest.importorskip("distributed", reason="distributed is not installed")
da = pytest.importorskip("dask.array")
pytestmark = [
    # the scheduler and the nannies report a worker that was killed, and connections that were closed by it
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def data() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1, (2, 8, 12, 10)).astype(np.float32)
    return x, rng.normal(size=x.shape).astype(np.float32), rng.normal(size=8)


def check(got: Any, wanted: Any, units: int) -> None:
    for value, reference in zip(got, wanted, strict=True):
        eps = np.finfo(np.float32).eps
        assert np.abs(value - reference).max() <= units * eps * np.abs(reference).max()


@pytest.mark.parametrize("chunks", [(1, 8, 12, 10), (1, 3, 5, 5)])
def test_on_processes(client: Any, chunks: Any) -> None:
    x, dy, weight = data()
    lazy_x, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
    y, mean, rstd = cugn.group_norm_forward(lazy_x, 4, weight)
    grads = cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight, mean=mean, rstd=rstd)
    y, mean, rstd, *grads = client.gather(client.compute([y, mean, rstd, *grads]))
    check([y], [cugn.group_norm(x, 4, weight)], 3)
    check(grads, cugn.group_norm_backward(dy, x, 4, weight), 4)


def test_masks_labels_and_moments_on_processes(client: Any) -> None:
    x, dy, weight = data()
    labels = [0, 1, 2, 0, 1, 2, 0, 0]
    mask = np.random.default_rng(1).random((2, 1, 12, 10)) < 0.6
    options = {"activation": "silu"}
    lazy_x, lazy_dy, lazy_mask = (da.from_array(a, (1, 3, 5, 5)) for a in (x, dy, mask))
    y = cugn.group_norm(lazy_x, labels, weight, where=lazy_mask, **options)
    grads = cugn.group_norm_backward(lazy_dy, lazy_x, labels, weight, where=lazy_mask, **options)
    m = cugn.moments(lazy_x, labels, where=lazy_mask)
    normalized = cugn.normalize(lazy_x, m.mean, m.rstd(1e-5), labels, weight, **options)
    futures = client.compute([y, *grads, normalized, m.count, m.mean, m.m2])
    y, *grads, normalized, count, mean, m2 = client.gather(futures)
    wanted = cugn.group_norm(x, labels, weight, where=mask, **options)
    check([y, normalized], [wanted, wanted], 3)
    check(grads, cugn.group_norm_backward(dy, x, labels, weight, where=mask, **options), 4)
    whole = cugn.moments(x, labels, where=mask)
    np.testing.assert_array_equal(count, whole.count)
    np.testing.assert_allclose(mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(m2, whole.m2, rtol=1e-11)


def _slow(block: Any) -> Any:
    time.sleep(0.05)
    return block


def test_a_worker_is_killed_in_the_middle(client: Any) -> None:
    x, dy, weight = data()
    chunks = (1, 3, 6, 5)
    lazy_x, lazy_dy = (da.from_array(a, chunks).map_blocks(_slow, dtype=a.dtype, meta=a[:0]) for a in (x, dy))
    pids = client.run(os.getpid)
    y = cugn.group_norm(lazy_x, 4, weight)
    grads = cugn.group_norm_backward(lazy_dy, lazy_x, 4, weight)
    futures = client.compute([y, *grads])
    while sum(client.processing().values(), ()) == () or not any(client.has_what().values()):
        time.sleep(0.01)
    time.sleep(0.3)
    assert not all(future.done() for future in futures)  # it is in the middle
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    y, *grads = client.gather(futures)
    assert set(client.run(os.getpid).values()) != set(pids.values())  # one was killed indeed, and replaced
    check([y], [cugn.group_norm(x, 4, weight)], 3)
    check(grads, cugn.group_norm_backward(dy, x, 4, weight), 4)
