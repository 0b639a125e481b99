"""The entry of each operation: what Python calls. It puts the arrays in place and goes through the phases.

The phases are addresses in the geometry (`phases.py`), so there is one entry for all dtypes and layouts.
"""

from __future__ import annotations

from typing import Any

from ..threads import ALONE, CALLER
from . import words as w
from .access import word
from .atomics import store_fence
from .compile import inner
from .gradients import gather_gradients
from .groups import data_of, join, load_vector, start_call, tangent_at
from .helpers import publish, retire
from .memory import load_i64, store_i64
from .schedule import schedule


@inner
def forward(
    geometry: int, call: int, x: int, out: int, weight: int, bias: int, mean: int, rstd: int, where: int
) -> None:
    """Without an out there are the moments alone: m2 in the place of rstd, under a mask with the counts behind it."""
    store_i64(call, 0, data_of(x))
    store_i64(call, 1, data_of(out))
    store_i64(call, w.CALL_ONLY, out == 0)
    start_call(geometry, call, weight, bias, mean, rstd, where, 0, 0)


@inner
def backward(
    geometry: int, call: int, x: int, dy: int, out: int, weight: int, bias: int, mean: int, rstd: int, dweight: int,
    dbias: int, where: int, given: int, parts: int,
) -> None:  # fmt: skip
    """Whole, or in parts; `given` says whether mean and rstd are.

    parts: in a backward in parts, an array of two rows over the groups, for the sums of dy*weight and of
    dy*weight*x_hat, or with their means.
    """
    store_i64(call, 0, data_of(x))
    store_i64(call, 1, data_of(dy))
    store_i64(call, 2, data_of(out))
    store_i64(call, w.CALL_ONLY, 0)
    store_i64(call, w.CALL_GIVEN, given)
    store_i64(call, w.CALL_PARTS, data_of(parts))
    start_call(geometry, call, weight, bias, mean, rstd, where, dweight, dbias)


@inner
def jvp(
    geometry: int, call: int, x: int, tx: int, out: int, weight: int, bias: int, tweight: int, tbias: int, mean: int,
    rstd: int, where: int,
) -> None:  # fmt: skip
    """Tangents are float64."""
    store_i64(call, 2, data_of(out))
    start_tangents(geometry, call, x, tx, tweight, tbias)
    start_call(geometry, call, weight, bias, mean, rstd, where, 0, 0)


@inner
def double_backward(
    geometry: int, call: int, x: int, ddx: int, dy: int, gdy: int, gx: int, weight: int, bias: int, ddweight: int,
    ddbias: int, mean: int, rstd: int, gweight: int, gbias: int, where: int,
) -> None:  # fmt: skip
    """Tangents are float64."""
    store_i64(call, 2, data_of(dy))
    store_i64(call, 3, data_of(gdy))
    store_i64(call, 4, data_of(gx))
    start_tangents(geometry, call, x, ddx, ddweight, ddbias)
    start_call(geometry, call, weight, bias, mean, rstd, where, gweight, gbias)


@inner
def start_tangents(geometry: int, call: int, x: int, u: int, tweight: int, tbias: int) -> None:
    """What a jvp and a double backward have in common."""
    store_i64(call, 0, data_of(x))
    store_i64(call, 1, data_of(u))
    store_i64(call, w.CALL_ONLY, 0)
    channels = word(geometry, w.C)
    load_vector(tangent_at(geometry, call, 0), data_of(tweight), w.FLOAT64, channels, 0.0)
    load_vector(tangent_at(geometry, call, 1), data_of(tbias), w.FLOAT64, channels, 0.0)


@inner
def clear(block: int, count: int) -> None:
    """Zero the first `count` bytes."""
    for k in range(count // 8):
        store_i64(block, k, 0)


_STARTS = {"forward": forward, "backward": backward, "jvp": jvp, "double_backward": double_backward}
_WITH_GRADIENTS = {"backward", "double_backward"}
"""Those that end with dweight and dbias, where there are arrays for them."""


def entry_of(operation: str) -> Any:
    """entry(role, pool, function, geometry, arrays ..., work): what Python calls, and what helpers call by address.

    The arrays are those of the operation's start, by their ids; work is the id of an array, whose header is cleared
    here. A helper gives the address of that memory in the place of the pool.
    """
    start = _STARTS[operation]
    code = start.py_func.__code__
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
        start({geometry}, call, {", ".join(arrays)})
        schedule({geometry}, call, block, role)
        if word({geometry}, w.STREAM) != 0:
            store_fence(){gather if operation in _WITH_GRADIENTS else ""}
    if role == CALLER:
        retire(pool)
"""
    scope: dict[str, Any] = {
        "__name__": __name__, "ALONE": ALONE, "CALLER": CALLER, "w": w, "clear": clear,
        "data_of": data_of, "gather_gradients": gather_gradients, "join": join, "load_i64": load_i64,
        "publish": publish, "retire": retire, "schedule": schedule,
        "start": start, "store_fence": store_fence, "store_i64": store_i64, "word": word,
    }  # fmt: skip
    exec(source, scope)
    return scope["entry"]
