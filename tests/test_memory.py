"""Results of chunks start where a huge page does, and are ordinary arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cugn
from cugn.memory import HUGE_PAGE, LEAST, result_like


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("shape", [(1, 8, 64, 64, 32), (3, LEAST // 4 + 1)])
@pytest.mark.parametrize(("dtype", "wanted"), [("f4", "f4"), ("f8", "f8"), ("i2", "f4"), ("u1", "f4")])
def test_large_results(shape: Any, dtype: str, wanted: str) -> None:
    x = np.zeros(shape, dtype)
    results = [result_like(x) for _ in range(3)]
    for out in results:
        assert (out.shape, out.dtype, out.flags.c_contiguous, out.flags.writeable) == (shape, wanted, True, True)
        assert address(out) % HUGE_PAGE == 0
        out[...] = 1  # to both of its ends
    assert not np.shares_memory(results[0], results[1])


def test_the_engine_allocates_what_is_small() -> None:
    edge = LEAST // 4
    assert result_like(np.zeros(edge, np.float32)) is not None
    assert result_like(np.zeros(edge - 1, np.float32)) is None
    assert result_like(np.zeros(edge, np.dtype(np.float32).newbyteorder())) is None
    assert result_like(np.zeros((0, edge), np.float32)) is None
    assert result_like([0.0] * edge) is None


def test_in_the_memory_order_of_x() -> None:
    x = np.zeros((2, 16, 300, 260), np.float32)
    for view in (x, x.transpose(0, 2, 3, 1), x.T, x[:, ::-1], x[..., 10:250], x[:, :, 20:, ::-1].swapaxes(1, 2)):
        out = result_like(view)
        assert (out.shape, out.strides) == (view.shape, np.empty_like(view).strides)
        assert address(out) % HUGE_PAGE == 0


def test_dask_lays_its_results_so() -> None:
    da = pytest.importorskip("dask.array")
    x = np.random.default_rng(0).normal(1e4, 1, (2, 4, 2 * LEAST // 16)).astype(np.float32)
    dy = x[:, ::-1] - np.float32(1e4)
    wanted = cugn.group_norm(x, 2), cugn.group_norm_backward(dy, x, 2).dx
    for chunks in ((1, 4, x.shape[2]), (2, 4, x.shape[2] // 2)):  # whole groups in a chunk, and cut ones
        lazy, lazy_dy = da.from_array(x, chunks), da.from_array(dy, chunks)
        for result, reference in zip(
            (cugn.group_norm(lazy, 2), cugn.group_norm_backward(lazy_dy, lazy, 2).dx), wanted, strict=True
        ):
            blocks = [block.compute(scheduler="synchronous") for block in result.to_delayed().ravel()]
            assert [address(block) % HUGE_PAGE for block in blocks] == [0, 0]
            axis = 0 if chunks[0] == 1 else 2
            np.testing.assert_allclose(np.concatenate(blocks, axis), reference, rtol=1e-4, atol=1e-5)
