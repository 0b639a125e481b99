"""Who does what when: tickets, phases and waiting, inside one native call that any number of threads may join.

A thread that joins late finds fewer tickets, one that never comes is not missed: the caller alone can finish the
job. Nothing is waited for but a chunk that another thread is working on at this moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding
from numba.core import types
from numba.core.typing import signature

from . import words as w
from .access import word
from .compile import inner
from .simd import atomic_add, atomic_load, pause

_SPINS = 2000  # about 30 us of pause; then the processor is offered to whoever holds the chunk that is waited for

if binding.address_of_symbol("sched_yield") is not None:
    give_way = types.ExternalFunction("sched_yield", signature(types.int32))
else:

    @inner
    def give_way() -> int:
        """Where the system has no sched_yield."""
        pause()
        return 0


@inner
def wait_until(address: int, count: int) -> None:
    """Return when the counter has reached count."""
    spins = 0
    while atomic_load(address) < count:
        pause()
        spins += 1
        if spins > _SPINS:
            give_way()


def scheduler(run_chunk: Callable[..., Any], finish: Callable[..., Any]) -> Any:
    """Kernel part that takes tickets until there are none.

    run_chunk(phase, geometry, call, task, chunk, store, scratch); finish(... without chunk ...),
    which follows when all chunks of the task's phase are done. Phases run from `first` to `last`; the last has no
    finish.
    """

    @inner
    def whole_task(geometry: int, call: int, task: int, scratch: int, first: int, last: int) -> None:
        store = scratch + word(geometry, w.OWN_STORE_AT)
        chunks = word(geometry, w.CHUNKS)
        for phase in range(first, last + 1):
            for k in range(chunks):
                # each phase runs against the direction of the one before: what was read last is still in cache
                chunk = k if (phase - first) % 2 == 0 else chunks - 1 - k
                run_chunk(phase, geometry, call, task, chunk, store, scratch)
            if phase < last:
                finish(phase, geometry, call, task, store, scratch)

    @inner
    def run(geometry: int, call: int, work: int, scratch: int, first: int, last: int, caller: bool) -> None:
        tickets = word(geometry, w.TICKETS)
        bundles = word(geometry, w.BUNDLES)
        chunks = word(geometry, w.CHUNKS)
        split = word(geometry, w.SPLIT) != 0
        tasks = word(geometry, w.N) * bundles
        wave_tasks = word(geometry, w.WAVE_TASKS)
        phases = last - first + 1
        while True:
            ticket = atomic_add(work + w.TAKEN, 1)
            if ticket >= tickets:
                break
            if not split:
                samples = word(geometry, w.TICKET_SAMPLES)
                together = word(geometry, w.TICKET_BUNDLES)
                across = word(geometry, w.BUNDLE_TICKETS)
                n0 = ticket // across * samples
                b0 = ticket % across * together
                for n in range(n0, min(n0 + samples, word(geometry, w.N))):
                    for bundle in range(b0, min(b0 + together, bundles)):
                        whole_task(geometry, call, n * bundles + bundle, scratch, first, last)
            else:
                wave = ticket // (wave_tasks * chunks * phases)
                start = wave * wave_tasks
                here = min(wave_tasks, tasks - start)
                rest = ticket - start * chunks * phases
                step = rest // (here * chunks)
                index = rest % (here * chunks)
                if step % 2 == 1:
                    index = here * chunks - 1 - index
                task = start + index // chunks
                chunk = index % chunks
                store = work + word(geometry, w.STORE_AT) + task * word(geometry, w.STORE_BYTES)
                # two counters a task: chunks done in all phases, phases finished
                progress = work + word(geometry, w.PROGRESS_AT) + task * 16
                wait_until(progress + 8, step)
                run_chunk(first + step, geometry, call, task, chunk, store, scratch)
                if atomic_add(progress, 1) == (step + 1) * chunks - 1 and step < phases - 1:
                    finish(first + step, geometry, call, task, store, scratch)
                    atomic_add(progress + 8, 1)
            atomic_add(work + w.DONE, 1)
        if caller:
            wait_until(work + w.DONE, tickets)

    return run
