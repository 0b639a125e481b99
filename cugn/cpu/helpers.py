"""How native calls get help: the pool's words, the entry of every kernel, and the loop of a helper.

A caller publishes its call in the pool's memory: the kernel's own address and its arguments. A helper that is awake
watches that memory without the GIL, so it joins within a microsecond; it falls asleep after a while without work, and
`cugn.threads` wakes it. The caller waits for those inside before it returns: until then its arrays are alive. One call
at a time has helpers; others that come meanwhile do their work alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..threads import ALONE, CALLER
from . import words as w
from .access import word
from .atomics import atomic_add, atomic_load, atomic_store, claim, pause, store_fence
from .compile import inner
from .gradients import gather_gradients
from .groups import data_of, join
from .memory import I64, load_i64, store_i64
from .program import Program
from .schedule import give_way, scheduler, wait_until_least

MOST_ARGUMENTS = 24
"""Of a kernel's entry. A helper passes as many, whatever the kernel takes: in C's calling conventions it does not see
those beyond its own.
"""
WATCHES = 12000
"""Looks at the pool before a helper falls asleep, about 200 us; waking it would cost a call 50 us."""
_POLITE_FROM = 3000
_CLAIMED = 1


@intrinsic
def call_kernel(typingctx: Any, function: Any, role: Any, block: Any) -> Any:
    """Call the entry of a kernel by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = cgutils.alloca_once(builder, I64)
        nothing = ir.PointerType(ir.PointerType(ir.IntType(8)))
        kind = ir.FunctionType(ir.IntType(32), [ir.PointerType(I64), nothing, *[I64] * MOST_ARGUMENTS])
        target = builder.inttoptr(args[0], ir.PointerType(kind))
        rest = [ir.Constant(I64, 0)] * (MOST_ARGUMENTS - 2)
        builder.call(target, [result, ir.Constant(nothing, None), args[1], args[2], *rest])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen


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


def entry_of(program: Program) -> Any:
    """entry(role, pool, function, geometry, arrays ..., work): what Python calls, and what helpers call by address.

    The arrays are those of the program's start, by their ids; work is the id of an array, whose header is cleared here.
    A helper gives the address of that memory in the place of the pool.
    """
    code = program.start.__code__
    geometry, _, *arrays = code.co_varnames[: code.co_argcount]
    names = [geometry, *arrays, "work"]
    listed = ", ".join(names)
    saved = "\n".join(f"            store_i64(block, {w.ARGUMENTS + k}, {name})" for k, name in enumerate(names))
    loaded = "\n".join(f"        {name} = load_i64(block, {w.ARGUMENTS + k})" for k, name in enumerate(names))
    gather = f"""
        if role <= CALLER:
            gather_gradients({geometry}, call)"""
    source = f"""
def entry(role, pool, function, {listed}):
    block = pool
    if role > CALLER:
{loaded}
    else:
        block = data_of(work)
        clear(block, word({geometry}, w.CLEARED))
        if role == CALLER:
            store_i64(block, w.FUNCTION, function)
{saved}
            if not publish(pool, block):
                role = ALONE
    call = join({geometry}, block, role)
    if call != 0:
        store_i64(call, w.CALL_WORK, block)
        first = start({geometry}, call, {", ".join(arrays)})
        schedule({geometry}, call, block, call, first, LAST, role)
        if word({geometry}, w.STREAM) != 0:
            store_fence(){gather if program.gradients else ""}
    if role == CALLER:
        retire(pool)
    return 0
"""
    scope: dict[str, Any] = {
        "__name__": __name__, "ALONE": ALONE, "CALLER": CALLER, "LAST": program.last, "w": w, "clear": clear,
        "data_of": data_of, "gather_gradients": gather_gradients, "join": join, "load_i64": load_i64,
        "publish": publish, "retire": retire, "schedule": scheduler(program.run_chunk, program.finish),
        "start": inner(program.start), "store_fence": store_fence, "store_i64": store_i64, "word": word,
    }  # fmt: skip
    exec(source, scope)
    return scope["entry"]


@inner
def clear(block: int, count: int) -> None:
    """Zero the first `count` bytes."""
    for k in range(count // 8):
        store_i64(block, k, 0)


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
                call_kernel(load_i64(block, w.FUNCTION), number, block)
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
