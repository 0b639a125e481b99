"""A private pool of threads that help with one native call at a time, and never have to.

The caller offers its call, then does the work itself; helpers that come in time take some of its tickets
(`cpu/helpers.py`, `cpu/schedule.py`). So there is nothing to wait for when a helper is late,
missing (a child after fork, interpreter shutdown), or busy with another caller: concurrent and nested callers, Dask's
threads and processes made by fork or spawn need no special case.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

__all__ = ["ALONE", "CALLER", "alone", "count", "get_num_threads", "run", "set_num_threads", "setting"]

ALONE, CALLER = -1, 0
"""What a thread is to a native call, its first argument: the caller, without helpers or with them; those are numbered
from 1.
"""


class _Pool:
    """Daemon threads that help. Made anew in a child process, which has none of its parent's threads."""

    def __init__(self) -> None:
        self.memory = np.zeros(64, np.int64)
        """What native calls and awake helpers share (`cpu/words.py`), and whole cache lines within it."""
        self.address = (self.memory.__array_interface__["data"][0] + 63) // 64 * 64
        self.size = 0
        self.lock = threading.Lock()
        self.asleep: dict[int, threading.Lock] = {}

    def grow(self, size: int) -> None:
        """Have at least `size` helpers, as far as the system allows."""
        from .cpu.helpers import watching

        watch = watching()
        with self.lock:
            while self.size < size:
                helper = threading.Thread(target=_help, args=(self, watch, self.size + 1), name="cugn", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # no more threads here, or the interpreter is on its way out
                    return
                self.size += 1

    def wake(self, count: int) -> None:
        """Wake those of the first `count` helpers that are asleep."""
        for number in range(1, count + 1):
            bed = self.asleep.pop(number, None)
            if bed is not None:
                bed.release()


def _help(pool: _Pool, watch: Callable[[int, int], int], number: int) -> None:
    """Watch for calls to help with; sleep when there have been none for a while."""
    bed = threading.Lock()
    bed.acquire()
    while True:
        watch(pool.address, number)
        pool.asleep[number] = bed
        bed.acquire()


_pool = _Pool()


def _renew() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _default() -> int:
    """CUGN_NUM_THREADS, else the processors that this process may run on."""
    given = os.environ.get("CUGN_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


count = _default()
"""Threads of a call, the caller's own included."""


def get_num_threads() -> int:
    """Return the number of threads that one call may use.

    Returns
    -------
    int
        The value of `set_num_threads`, else of the environment variable ``CUGN_NUM_THREADS``, else the number of
        processors that this process may run on.

    Examples
    --------
    >>> import cugn
    >>> cugn.get_num_threads() >= 1
    True
    """
    return count


def set_num_threads(threads: int) -> None:
    """Set the number of threads that one call on NumPy arrays may use, in the whole process.

    Results are the same bits for any number of threads.

    Parameters
    ----------
    threads : int
        At least 1, which keeps all work on the calling thread.

    Raises
    ------
    TypeError
        If `threads` is not an int.
    ValueError
        If it is below 1.

    Examples
    --------
    >>> import cugn
    >>> before = cugn.get_num_threads()
    >>> cugn.set_num_threads(1)
    >>> cugn.set_num_threads(before)
    """
    global count
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}: it must be an int")
    if threads < 1:
        raise ValueError(f"threads is {threads}: it must be at least 1")
    count = threads


class _Here(threading.local):
    """What holds for the calls of one thread."""

    alone = False


_here = _Here()


@contextmanager
def alone() -> Iterator[None]:
    """Calls of this thread get no help meanwhile: the other processors have work of their own."""
    before = _here.alone
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before


def setting() -> int:
    """What calls of this thread are prepared for: the number of threads, or 0 for one thread beside busy others."""
    return 0 if _here.alone else count


def start() -> None:
    """Have the threads that a large call uses."""
    _pool.grow(count - 1)


def run(entry: Callable[..., int], arguments: tuple[int, ...], threads: int) -> None:
    """Call a kernel with the help of up to threads - 1 others; returns when all of its work is done."""
    pool = _pool
    if pool.size < threads - 1:
        pool.grow(threads - 1)
    if pool.asleep:
        pool.wake(threads - 1)
    entry(CALLER, pool.address, *arguments)
