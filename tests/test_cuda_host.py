"""Promise: a second call of a kind only allocates, fills in addresses and launches; what is kept for it stays small."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import NEEDED, emulated
from libraries import Library

import cugn
from cugn.cuda import launches

pytestmark = NEEDED
PACKAGE = os.path.dirname(cugn.__file__)
SMALL, SPLIT = ((4, 8, 6), 4), ((1, 2, 40_000), 1)


def operations(library: Library, shape: tuple[int, ...], groups: int) -> dict[str, Callable[[], Any]]:
    """Each operation on arrays of its own."""
    rng = np.random.default_rng(0)
    x, dy, ddx, out = (library.array(rng.normal(size=shape).astype(np.float32)) for _ in range(4))
    w, b, tw, tb = (library.array(rng.normal(size=shape[1]).astype(np.float32)) for _ in range(4))
    mean, rstd = (library.array(np.ones((shape[0], groups))) for _ in range(2))
    mask = library.array(rng.random(shape) < 0.9)
    return {
        "forward": lambda: cugn.group_norm(x, groups, w, b, out=out),
        "forward, labels": lambda: cugn.group_norm(x, [c % groups for c in range(shape[1])], w, b),
        "forward, mask": lambda: cugn.group_norm_forward(x, groups, where=mask),
        "backward": lambda: cugn.group_norm_backward(dy, x, groups, w, b, mean=mean, rstd=rstd, out=out),
        "jvp": lambda: cugn.group_norm_jvp(dy, x, groups, w, b, tweight=tw, tbias=tb),
        "double backward": lambda: cugn.group_norm_double_backward(ddx, dy, x, groups, w, b),
        "moments": lambda: cugn.moments(x, groups),
        "normalize": lambda: cugn.normalize(x, mean, rstd, groups, w, b, out=out),
    }


def calls(call: Callable[[], Any]) -> int:
    """Calls of functions that the package makes or defines; those of CuPy and of the emulator do not count."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("shape", "groups"), [SMALL, SPLIT], ids=["resident", "split"])
def test_few_python_calls(shape: tuple[int, ...], groups: int) -> None:
    """Counted, for a busy machine stretches times. A call that works out its launches anew makes hundreds."""
    with emulated(mode="fast") as library:
        for name, call in operations(library, shape, groups).items():
            call()
            assert calls(call) <= 60, name


def test_what_is_kept_does_not_grow() -> None:
    """Arrays of other addresses, and of other values, are calls of the same kind."""
    with emulated(mode="fast") as library:
        for call in operations(library, *SMALL).values():
            call()
        before = launches.program.cache_info()
        for _ in range(3):
            for call in operations(library, *SMALL).values():
                call()
        after = launches.program.cache_info()
    assert after.misses == before.misses
    assert after.currsize == before.currsize
    assert after.maxsize is not None


def test_no_array_is_kept() -> None:
    with emulated(mode="fast") as library:
        x, weight, out = (library.array(np.ones(shape, np.float32)) for shape in ((4, 8, 6), 8, (4, 8, 6)))
        result = cugn.group_norm_forward(x, 2, weight, out=out)
        gradients = cugn.group_norm_backward(out, x, 2, weight)
        kept = [weakref.ref(a) for a in (x, weight, out, *result, *gradients)]
        del x, weight, out, result, gradients
        assert all(ref() is None for ref in kept)


def test_an_address_of_other_alignment_is_another_kind() -> None:
    """The same shape, strides and dtype, 4 bytes further on: the same bits, though vectors begin in other channels."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
    weight = np.arange(1, 9, dtype=np.float32)
    with emulated() as library:
        results = []
        for at in (0, 1):
            out = library.array(np.zeros(at + x.size, np.float32))[at:].reshape(x.shape)
            cugn.group_norm(library.array(x), 4, library.array(weight), out=out)
            results.append(library.numpy(out).copy())
    np.testing.assert_array_equal(*results)


def test_threads_begin_at_once() -> None:
    """The first call of a kind in several threads: each gets the result."""
    with emulated(mode="fast") as library:
        x = library.array(np.random.default_rng(0).normal(size=(3, 10, 7)).astype(np.float32))
        wanted = library.numpy(cugn.group_norm(x, 5)).copy()
        launches.program.cache_clear()
        barrier, results = threading.Barrier(4), []

        def work() -> None:
            barrier.wait()
            results.append(cugn.group_norm(x, 5))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 4
        for result in results:
            np.testing.assert_array_equal(library.numpy(result), wanted)
