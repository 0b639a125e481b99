"""Who does what when: tickets, phases and waiting, inside one native call that any number of threads may join.

A thread that joins late finds fewer tickets, one that never comes is not missed: the caller alone can finish the
job. Nothing is waited for but a chunk that another thread is working on at this moment.
"""

from __future__ import annotations

from llvmlite import binding
from numba.core import types
from numba.core.typing import signature

from ..threads import ALONE, CALLER
from . import words as w
from .access import word
from .atomics import atomic_add, atomic_load, pause
from .compile import inner
from .memory import load_i64, store_i64
from .pointers import call_kernel

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


@inner
def wait_until_least(address: int, count: int) -> None:
    """Return when the counter has fallen to count."""
    spins = 0
    while atomic_load(address) > count:
        pause()
        spins += 1
        if spins > _SPINS:
            give_way()


@inner
def next_ticket(geometry: int, call: int, work: int, role: int) -> bool:
    """Take the next ticket and write into the call what it is for; False when there is none left.

    Tickets come in rounds: one round of whole tasks, or for each wave of split ones a round a phase. In a round every
    participant begins with a range of its own, the same one in call after call, and then takes from the others': a
    core finds in its cache what it wrote there in the call before. All tickets of a round are taken before the first
    of the next one, so a chunk that is waited for is always in work.
    """
    bundles = word(geometry, w.BUNDLES)
    chunks = word(geometry, w.CHUNKS)
    phases = word(geometry, w.PHASES)
    split = word(geometry, w.SPLIT) != 0
    tasks = word(geometry, w.N) * bundles
    wave_tasks = word(geometry, w.WAVE_TASKS)
    slots = 1 if role == ALONE else word(geometry, w.SLOTS)
    rounds = phases * ((tasks + wave_tasks - 1) // wave_tasks) if split else 1
    place = load_i64(call, w.CALL_PLACE)  # round and how many ranges of it are used up
    while place < rounds * slots:
        round = place // slots
        step = 0
        start = 0
        count = word(geometry, w.TICKETS)
        if split:
            step = round % phases
            start = round // phases * wave_tasks
            count = min(wave_tasks, tasks - start) * chunks
        who = (max(role, 0) + place) % slots
        low = who * count // slots
        size = (who + 1) * count // slots - low
        if role == ALONE:
            mine = load_i64(call, w.CALL_TAKEN)
            store_i64(call, w.CALL_TAKEN, mine + 1)
        else:
            mine = atomic_add(work + w.HEADER_BYTES + (round * slots + who) * 64, 1)
        if mine < size:
            ticket = low + (size - 1 - mine if step % 2 == 1 else mine)
            if split:
                task = start + ticket // chunks
                n0 = task // bundles
                b0 = task % bundles
                n1 = n0 + 1
                b1 = b0 + 1
                k0 = ticket % chunks
                k1 = k0 + 1
            else:
                across = word(geometry, w.BUNDLE_TICKETS)
                n0 = ticket // across * word(geometry, w.TICKET_SAMPLES)
                b0 = ticket % across * word(geometry, w.TICKET_BUNDLES)
                n1 = min(n0 + word(geometry, w.TICKET_SAMPLES), word(geometry, w.N))
                b1 = min(b0 + word(geometry, w.TICKET_BUNDLES), bundles)
                k0 = 0
                k1 = chunks
            store_i64(call, w.TICKET_STEP, step)
            store_i64(call, w.TICKET_N, n0)
            store_i64(call, w.TICKET_N + 1, n1)
            store_i64(call, w.TICKET_BUNDLE, b0)
            store_i64(call, w.TICKET_BUNDLE + 1, b1)
            store_i64(call, w.TICKET_CHUNK, k0)
            store_i64(call, w.TICKET_CHUNK + 1, k1)
            return True
        place += 1
        store_i64(call, w.CALL_PLACE, place)
        store_i64(call, w.CALL_TAKEN, 0)
    return False


@inner
def do_ticket(geometry: int, call: int, work: int, scratch: int, alone: bool) -> None:
    """The phases of a ticket's tasks, or the one phase that it is for."""
    bundles = word(geometry, w.BUNDLES)
    chunks = word(geometry, w.CHUNKS)
    split = word(geometry, w.SPLIT) != 0
    step = load_i64(call, w.TICKET_STEP)
    last = word(geometry, w.PHASES) - 1
    k0 = load_i64(call, w.TICKET_CHUNK)
    k1 = load_i64(call, w.TICKET_CHUNK + 1)
    for n in range(load_i64(call, w.TICKET_N), load_i64(call, w.TICKET_N + 1)):
        for bundle in range(load_i64(call, w.TICKET_BUNDLE), load_i64(call, w.TICKET_BUNDLE + 1)):
            task = n * bundles + bundle
            store = scratch + word(geometry, w.OWN_STORE_AT)
            # two counters of a split task: chunks done in all phases, phases finished
            progress = work + word(geometry, w.PROGRESS_AT) + task * 16
            if split:
                store = work + word(geometry, w.STORE_AT) + task * word(geometry, w.STORE_BYTES)
                if not alone:
                    wait_until(progress + 8, step)
            for phase in range(step, step + 1 if split else last + 1):
                run = word(geometry, w.RUN + phase)
                if run != 0:
                    for k in range(k0, k1):
                        # each phase runs against the direction of the one before: what was read last is still in cache
                        chunk = k1 - 1 - k if not split and phase % 2 == 1 else k
                        call_kernel(run, geometry, call, task, chunk, store, scratch)
                if not split or atomic_add(progress, 1) == (step + 1) * chunks - 1:
                    finish = word(geometry, w.FINISH + phase)
                    if finish != 0:
                        call_kernel(finish, geometry, call, task, -1, store, scratch)
                    if split:
                        atomic_add(progress + 8, 1)


@inner
def schedule(geometry: int, call: int, work: int, role: int) -> None:
    """Take tickets until there are none; the caller returns when all of them are done."""
    store_i64(call, w.CALL_PLACE, 0)
    store_i64(call, w.CALL_TAKEN, 0)
    alone = role == ALONE
    while next_ticket(geometry, call, work, role):
        do_ticket(geometry, call, work, call, alone)
        if not alone:
            atomic_add(work + w.DONE, 1)
    if role == CALLER:
        wait_until(work + w.DONE, word(geometry, w.TICKETS))
