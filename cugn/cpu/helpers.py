"""How native calls get help: offering a call, taking it back, and the loop of a helper.

A caller publishes its call in the pool's memory: its entry's own address and its arguments. A helper that is awake
watches that memory without the GIL, so it joins within a microsecond; it falls asleep after a while without work, and
`cugn.threads` wakes it. The caller waits for those inside before it returns: until then its arrays are alive. One call
at a time has helpers; others that come meanwhile do their work alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from . import words as w
from .atomics import atomic_add, atomic_load, atomic_store, claim, pause
from .compile import inner
from .memory import load_i64
from .pointers import call_entry
from .schedule import give_way, wait_until_least

WATCHES = 12000
"""Looks at the pool before a helper falls asleep, about 200 us; waking it would cost a call 50 us."""
_POLITE_FROM = 3000
_CLAIMED = 1


@inner
def publish(pool: int, block: int) -> bool:
    """Offer a call to the helpers; False if they have one."""
    if not claim(pool + w.POOL_CALL, 0, _CLAIMED):
        return False
    atomic_add(pool + w.POOL_NUMBER, 1)
    atomic_store(pool + w.POOL_CALL, block)
    return True


@inner
def retire(pool: int) -> None:
    """Take the call back; returns when no helper is inside."""
    atomic_store(pool + w.POOL_CALL, 0)
    wait_until_least(pool + w.POOL_INSIDE, 0)


def watch(pool: int, number: int) -> int:
    """What a helper does while it is awake."""
    seen = -1
    idle = 0
    while idle < WATCHES:
        call = atomic_load(pool + w.POOL_NUMBER)
        if call != seen and atomic_load(pool + w.POOL_CALL) > _CLAIMED:
            atomic_add(pool + w.POOL_INSIDE, 1)
            # whoever takes a call back looks at INSIDE after that: this one is either seen there, or sees no call
            block = atomic_load(pool + w.POOL_CALL)
            if block > _CLAIMED:
                call_entry(load_i64(block, w.FUNCTION), number, block)
            atomic_add(pool + w.POOL_INSIDE, -1)
            seen = call
            idle = 0
        else:
            idle += 1
            pause()
            if idle > _POLITE_FROM:
                give_way()
    return 0


@cache
def watching() -> Callable[[int, int], int]:
    """The loop of a helper, compiled."""
    from .calls import loaded

    entry, _ = loaded("watch", lambda: watch)
    return entry
