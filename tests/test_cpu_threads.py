"""Promise: the same bits for any number of threads, batch and `out`; callable from many threads, around forks."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from libraries import subprocess_environment, threads

import cugn

SHAPES = {
    "groups in cache": ((6, 32, 40, 41), 8),
    "one group over all threads": ((1, 8, 96, 90), 1),
    "rows": ((70, 96), 12),
    "odd": ((5, 30, 7, 7), 5),
}


def arrays(name: str, last: bool, dtype: type = np.float32) -> tuple[np.ndarray, ...]:
    """x, dy, weight and bias of a case."""
    rng = np.random.default_rng(0)
    shape, _ = SHAPES[name]
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    if last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(v, 1, -1)), -1, 1) for v in (x, dy))
    return x, dy, *(rng.normal(size=shape[1]).astype(dtype) for _ in range(2))


def results(x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int) -> list[bytes]:
    """Bytes of everything that a forward and a backward give."""
    forward = cugn.group_norm_forward(x, groups, weight, bias)
    backward = cugn.group_norm_backward(dy, x, groups, weight, bias)
    return [np.ascontiguousarray(a).tobytes() for a in (*forward, *backward)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, last: bool, dtype: type) -> None:
    case, groups = arrays(name, last, dtype), SHAPES[name][1]
    with threads(1):
        expected = results(*case, groups)
    for count in (2, 5):
        with threads(count):
            for _ in range(3):
                assert results(*case, groups) == expected


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", ["groups in cache", "odd", "rows"])
def test_bits_do_not_depend_on_the_batch_or_out(name: str, last: bool) -> None:
    (x, dy, weight, bias), groups = arrays(name, last), SHAPES[name][1]
    y = cugn.group_norm(x, groups, weight, bias)
    dx = cugn.group_norm_backward(dy, x, groups, weight).dx
    for n in range(len(x)):
        one = slice(n, n + 1)
        assert cugn.group_norm(x[one], groups, weight, bias).tobytes() == y[one].tobytes()
        assert cugn.group_norm_backward(dy[one], x[one], groups, weight).dx.tobytes() == dx[one].tobytes()
    assert cugn.group_norm(x, groups, weight, bias, out=np.empty_like(x)).tobytes() == y.tobytes()
    inplace = x.copy(order="K")
    assert cugn.group_norm(inplace, groups, weight, bias, out=inplace).tobytes() == y.tobytes()
    for target in (0, 1):
        pair = [dy.copy(order="K"), x.copy(order="K")]
        result = cugn.group_norm_backward(*pair, groups, weight, out=pair[target])
        assert result.dx is pair[target]
        assert result.dx.tobytes() == dx.tobytes()


def test_bits_do_not_depend_on_the_alignment() -> None:
    x = np.random.default_rng(0).normal(size=(3, 16, 33, 31)).astype(np.float32)
    y = cugn.group_norm(x, 4)
    memory = np.empty(x.nbytes + 256, np.uint8)
    for offset in (0, 1, 4, 20, 64):
        moved = memory[offset : offset + x.nbytes].view(np.float32).reshape(x.shape)
        moved[...] = x
        out = np.empty(x.nbytes + 256, np.uint8)[7 : 7 + x.nbytes].view(np.float32).reshape(x.shape)
        assert cugn.group_norm(moved, 4, out=out).tobytes() == y.tobytes()


def test_concurrent_callers() -> None:
    case, groups = arrays("groups in cache", False), 8
    expected = results(*case, groups)
    with threads(3), ThreadPoolExecutor(6) as pool:
        for result in pool.map(lambda _: results(*case, groups), range(40)):
            assert result == expected


def test_many_helpers_leave_no_reference_to_the_arrays() -> None:
    with threads(4):
        x = np.random.default_rng(0).normal(size=(8, 32, 64, 64)).astype(np.float32)
        before = sys.getrefcount(x)
        for _ in range(20):
            cugn.group_norm(x, 8)
        deadline = threading.Event()
        for _ in range(200):  # a helper that came late may still be on its way out
            if sys.getrefcount(x) == before:
                break
            deadline.wait(0.01)
        assert sys.getrefcount(x) == before


def test_the_number_of_threads_is_checked() -> None:
    before = cugn.get_num_threads()
    with pytest.raises(ValueError, match="threads"):
        cugn.set_num_threads(0)
    for wrong in (1.5, True, "2"):
        with pytest.raises(TypeError, match="threads"):
            cugn.set_num_threads(wrong)
    assert cugn.get_num_threads() == before


CHILD = """
import os, sys, threading
import numpy as np, cugn
x = np.random.default_rng(0).normal(size=(8, 32, 64, 64)).astype(np.float32)
def call(_=None):
    y, mean, rstd = cugn.group_norm_forward(x, 8)
    return y.tobytes() + cugn.group_norm_backward(x, x, 8).dweight.tobytes()
cugn.set_num_threads(4)
"""

PROGRAMS = {
    "fork after": CHILD
    + """
expected = call()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if call() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
assert call() == expected
""",
    "fork while others call": CHILD
    + """
expected = call()
stop = threading.Event()
def busy():
    while not stop.is_set():
        call()
others = [threading.Thread(target=busy) for _ in range(2)]
for t in others: t.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if call() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for t in others: t.join()
""",
    "pool of forks": CHILD
    + """
import multiprocessing
expected = call()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(r == expected for r in pool.map(call, range(4)))
""",
    "start method still free": CHILD
    + """
import multiprocessing
call()
multiprocessing.set_start_method("spawn")
""",
    "interrupt": CHILD
    + """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
expected = call()
main = threading.get_ident()
sent = interrupted = 0
armed = done = False  # no locks: one that is interrupted may stay locked
def interrupter():
    global sent
    while not done:
        time.sleep(0.003)
        if armed and sent == interrupted:  # the main thread is where it expects one
            sent += 1
            signal.pthread_kill(main, signal.SIGINT)
thread = threading.Thread(target=interrupter, daemon=True)
thread.start()
end = time.monotonic() + 2
def calls():
    global armed
    while time.monotonic() < end:
        armed = True
        call()
    armed = False
    time.sleep(0.1)  # the last one may be on its way
while not done:
    try:
        calls()  # in a function: a loop that jumps back within `try` may be interrupted outside of it (Python 3.13)
        done = True
    except KeyboardInterrupt:
        armed = False
        interrupted += 1
thread.join()
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert interrupted > 3, interrupted
assert call() == expected
""",
    "exit with helpers asleep": CHILD + "call()\n",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", PROGRAMS)
def test_processes(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _in_spawned(x: np.ndarray) -> bytes:
    return cugn.group_norm(x, 8).tobytes()


def test_spawned_processes() -> None:
    x = arrays("groups in cache", False)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(_in_spawned, (x,)).get(timeout=120) == cugn.group_norm(x, 8).tobytes()
