"""A private pool of threads that help with one native call at a time, and never have to.

The caller posts a job, then does the job itself; helpers that wake in time take some of its tickets
(`schedule.py`). So there is nothing to wait for when a helper is late, missing (a child after fork, interpreter
shutdown), or busy with another caller: concurrent and nested callers, Dask's threads and processes made by fork or
spawn need no special case.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["count", "get_num_threads", "run", "set_num_threads"]


class _Job:
    """A native call to be joined; holds every array that it reads or writes until the last helper has left it."""

    __slots__ = ("call",)

    def __init__(self, entry: Callable[..., int], arguments: tuple[int, ...], arrays: tuple[Any, ...]) -> None:
        self.call: tuple[Callable[..., int], tuple[int, ...], tuple[Any, ...]] | None = (entry, arguments, arrays)


class _Pool:
    """Daemon threads that wait for jobs. Made anew in a child process, which has none of its parent's threads."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.size = 0
        self.lock = threading.Lock()

    def grow(self, size: int) -> None:
        """Have at least `size` helpers, as far as the system allows."""
        with self.lock:
            while self.size < size:
                helper = threading.Thread(target=_help, args=(self.jobs,), name="cugn", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # no more threads here, or the interpreter is on its way out
                    return
                self.size += 1


def _help(jobs: SimpleQueue[_Job]) -> None:
    """Join one job after another."""
    while True:
        job = jobs.get()
        call = job.call
        del job
        if call is not None:
            call[0](*call[1], 0)
        # an idle helper must not keep the arrays of its last job alive
        del call


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


def run(entry: Callable[..., int], arguments: tuple[int, ...], arrays: tuple[Any, ...], threads: int) -> None:
    """Call a kernel with the help of up to threads - 1 others; returns when all of its work is done."""
    pool = _pool
    if pool.size < threads - 1:
        pool.grow(threads - 1)
    job = _Job(entry, arguments, arrays)
    finished = False
    try:
        for _ in range(threads - 1):
            pool.jobs.put(job)
        entry(*arguments, 1)
        finished = True
    finally:
        # an interrupt between these lines leaves helpers at work: join them, so that nothing is written after the
        # return
        if not finished:
            entry(*arguments, 1)
        job.call = None
