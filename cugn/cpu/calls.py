"""From arrays to native code: what a plan needs is prepared once, a call then allocates results and goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from .. import threads
from ..plan import Plan
from . import cache as disk
from . import geometry, phases
from . import words as w
from .phases import GATES, Kernel, Kind, Phase

Array = Any
SPARE_BYTES = 64 << 10
COMPILING_BYTES = 256 << 20
KINDS = {"float32": w.FLOAT32, "float64": w.FLOAT64, "float16": w.FLOAT16, "bfloat16": w.BFLOAT16}
SMALL_GROUP = 32
"""Elements of a group up to which the backward computes in float64: dx of two elements is what is left when dy
cancels.
"""


class _Ready(NamedTuple):
    """What a plan's calls of one operation share."""

    setting: int
    """`threads.setting` that it was prepared for."""
    entry: Callable[..., int]
    function: int
    """Address of the native entry, for helpers."""
    address: int
    work_bytes: int
    threads: int
    plain: bool
    """Vectors over the channels, and statistics that are given, can be read as they are."""
    spare: list[Array]
    """Memory of calls that are over, for calls on one thread: what they need is small, and allocating it 0.3 us."""
    kept: list[Any]
    """What lies behind the addresses: the geometry, the kernels."""


@cache
def _entry(operation: str) -> tuple[Callable[..., int], int]:
    """What Python calls for an operation, and its address."""

    def build() -> Any:
        from .entries import entry_of

        return entry_of(operation)

    return loaded(f"entry {operation}", build)


@cache
def _kernel(kernel: Kernel) -> tuple[Any, int]:
    """What keeps a kernel alive, and its address."""

    def build() -> Any:
        factory = getattr(import_module(f".{kernel.module}", __package__), kernel.factory)
        return factory(*kernel.options).py_func

    return loaded(repr(tuple(kernel)), build, for_python=False)


def kernels_loaded() -> int:
    """How many kernels this process has."""
    return _kernel.cache_info().currsize


def loaded(
    name: str, build: Callable[[], Any], *, for_python: bool = True, holds_gil: bool = False
) -> tuple[Callable[..., int], int]:
    """A native function, for Python if that calls it, and its address: from disk, else compiled and kept there.

    The main thread leaves that to another one and waits: Ctrl-C would break off an import of Numba, of which Python
    keeps parts that cannot be imported again.
    """
    if threading.current_thread() is not threading.main_thread():
        return _obtain(name, build, for_python, holds_gil)
    results: list[tuple[Callable[..., int], int]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(_obtain(name, build, for_python, holds_gil))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="cugn compiles")
    try:
        thread.start()
    except RuntimeError:  # no more threads here
        return _obtain(name, build, for_python, holds_gil)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _obtain(name: str, build: Callable[[], Any], for_python: bool, holds_gil: bool) -> tuple[Callable[..., int], int]:
    result = disk.load(name)
    if result is None:
        from .compile import compiled

        disk.ask_for(COMPILING_BYTES)
        result = compiled(build(), name, for_python, holds_gil)
        if disk.save(name, result):
            # what Numba builds a kernel from is ten times its size: kept no longer than that takes
            result = disk.load(name) or result
    return result.entry_point, result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


def _empty_result(plan: Plan, x: Array) -> Array:
    """Array of the result's dtype in x's memory order."""
    if plan.x_dtype == plan.y_dtype:
        return np.empty_like(x)
    return np.empty_like(x, dtype=plan.y_dtype)


def _memory(size: int) -> Array:
    """Memory of a call: whole cache lines, so that no vector lies in two."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.__array_interface__["data"][0] % 64
    return memory[start : start + size]


def _plain(vector: Array) -> bool:
    return vector is None or vector.strides[0] == vector.itemsize


def _plain_statistics(plan: Plan, values: Array) -> bool:
    return values.shape == plan.stats_shape and values.dtype == np.float64 and values.flags.c_contiguous


def _vector(vector: Array) -> Array:
    """A vector over the channels as a kernel reads it: contiguous."""
    return None if vector is None else np.ascontiguousarray(vector)


def _kind(vector: Array, otherwise: str) -> int:
    """Dtype of a vector, as the kernels have it in WEIGHT_KIND and BIAS_KIND."""
    return KINDS[otherwise if vector is None else vector.dtype.name]


def _ready(
    operation: str, steps: list[Phase], shape: geometry.Geometry, weight: Array, bias: Array, plain: bool = True
) -> _Ready:
    """An operation of these phases."""
    assert shape.table or shape.lanes or shape.words[w.PHASES] == len(steps)  # which the tickets of split tasks are for
    shape.words[w.PHASES] = len(steps)
    kept: list[Any] = [shape]
    for k, step in enumerate(steps):
        for at, kernel in zip((w.RUN, w.FINISH), step, strict=True):
            if kernel is not None:
                keeps, shape.words[at + k] = _kernel(kernel)
                kept.append(keeps)
    plain = plain and _plain(weight) and _plain(bias)
    entry, function = _entry(operation)
    return _Ready(threads.setting(), entry, function, shape.address, shape.work_bytes, shape.threads, plain, [], kept)


def enter(ready: _Ready, *arguments: int) -> None:
    """Call the entry, with arrays by their ids; its last argument is memory to work in."""
    _, entry, function, address, work_bytes, count, _, spare, _ = ready
    try:
        work = spare.pop()
    except IndexError:  # asking first would not do: another thread may take the last one in between
        work = _memory(work_bytes)
    if count == 1:
        entry(threads.ALONE, 0, function, address, *arguments, id(work))
    else:
        threads.run(entry, (function, address, *arguments, id(work)), count)
    if work_bytes <= SPARE_BYTES:
        spare.append(work)


def _smallest(plan: Plan) -> int:
    """Elements of the smallest group."""
    return int(np.diff(plan.group_bounds).min()) * plan.S


def _kind_of_work(plan: Plan, shape: geometry.Geometry, compute: str) -> Kind:
    """What a plan's kernels are compiled for."""
    labelled = plan.labels is not None
    kinds = (plan.x_dtype, plan.y_dtype, compute, plan.activation, shape.by_rows, shape.dense, labelled, plan.masked)
    return Kind(*kinds)


def _prepare_forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> _Ready:
    compute = "float64" if plan.y_dtype == "float64" else "float32"
    shape = geometry.of(
        plan, [x, out], threads.setting(), compute=compute, where=where, phases=2, in_lanes=True,
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype),
    )  # fmt: skip
    kind = _kind_of_work(plan, shape, compute)._replace(table=shape.table, lanes=shape.lanes)
    return _ready("forward", phases.forward(kind), shape, weight, bias)


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output, mean and rstd."""
    if out is None:
        out = _empty_result(plan, x)
    ready: _Ready | None = plan.__dict__.get("cpu_forward")
    if ready is None or ready[0] != threads.setting():
        ready = plan.__dict__["cpu_forward"] = _prepare_forward(plan, x, weight, bias, where, out)
    if not ready.plain:
        weight, bias = _vector(weight), _vector(bias)
    mean = np.empty(plan.stats_shape)
    rstd = np.empty(plan.stats_shape)
    weight_id = 0 if weight is None else id(weight)
    bias_id = 0 if bias is None else id(bias)
    enter(ready, id(x), id(out), weight_id, bias_id, id(mean), id(rstd), 0 if where is None else id(where))
    return out, mean, rstd


def _prepare_backward(
    plan: Plan, dy: Array, x: Array, weight: Array, bias: Array, mean: Array, rstd: Array, where: Array, out: Array
) -> _Ready:
    given = mean is not None
    # dweight and dbias in float64 are sums in float64
    wide = "float64" in (plan.y_dtype, plan.weight_dtype) or _smallest(plan) <= SMALL_GROUP
    compute = "float64" if wide else "float32"
    shape = geometry.of(
        plan, [x, dy, out], threads.setting(), compute=compute, where=where, phases=2 if given else 3,
        sums=geometry.SUMS + plan.masked, gradients=2, in_lanes=True,
        keeps=phases.keeps_dz(compute, plan.activation, plan.masked),
        weight_kind=_kind(weight, plan.y_dtype), bias_kind=_kind(bias, plan.y_dtype),
    )  # fmt: skip
    kind = _kind_of_work(plan, shape, compute)._replace(table=shape.table, lanes=shape.lanes)
    plain = not given or (_plain_statistics(plan, mean) and _plain_statistics(plan, rstd))
    return _ready("backward", phases.backward(kind, given), shape, weight, bias, plain)


def _statistics(plan: Plan, values: Array) -> Array:
    """Statistics that the caller gave, one by one, as float64."""
    return np.ascontiguousarray(np.broadcast_to(values, plan.stats_shape), np.float64)


def _is_exacting(plan: Plan) -> bool:
    """Whether the backward needs more digits of the statistics than the caller can give."""
    if plan.y_dtype != "float64":
        return False
    known: bool | None = plan.__dict__.get("cpu_exacting")
    if known is None:
        pairs = not plan.masked and 2 in np.diff(plan.group_bounds) * plan.S
        known = plan.__dict__["cpu_exacting"] = plan.activation in GATES or pairs
    return known


def _own(plan: Plan, x: Array, mean: Array, rstd: Array, where: Array) -> bool:
    """Whether statistics that the caller gave are x's, so that the kernel may take them itself.

    In float64 the slope of a gate needs a mean of more digits than one float64 has: at mean/std 1e4, dx would be off by
    six times its bound. A group of two elements needs as many of rstd: 50 times.
    """
    from .parts import moments

    with np.errstate(all="ignore"):
        count, own, m2 = moments(plan, x, where)
        variance = m2 / count + plan.eps
        scale = 1 / np.sqrt(variance)
        near = np.abs(own - mean) * rstd <= 1e-9 * (1 + np.abs(own) * rstd)
        # one group whose squares leave the range must not take the digits of all others
        told = (variance > 2.0**-900) & (variance < 2.0**1000)
        near &= (np.abs(scale - rstd) <= 1e-9 * scale) | ~told
        constant = np.isinf(scale) & np.isinf(rstd)
        none = np.isnan(own) & np.isnan(mean) & np.isnan(rstd)  # of a group of which a mask keeps nothing, or spoiled
        return bool((near | constant | none).all())


def backward(
    plan: Plan, dy: Array, x: Array, weight: Array, bias: Array, mean: Array, rstd: Array, where: Array, out: Array
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias."""
    if out is None:
        out = _empty_result(plan, x)
    if mean is not None and _is_exacting(plan) and _own(plan, x, mean, rstd, where):
        mean = rstd = None
    given = mean is not None
    name = "cpu_backward_given" if given else "cpu_backward"
    ready: _Ready | None = plan.__dict__.get(name)
    if ready is None or ready[0] != threads.setting():
        ready = plan.__dict__[name] = _prepare_backward(plan, dy, x, weight, bias, mean, rstd, where, out)
    if not ready.plain:
        weight, bias = _vector(weight), _vector(bias)
        if given:
            mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
    if not given:
        mean = np.empty(plan.stats_shape)
        rstd = np.empty(plan.stats_shape)
    dweight, dbias = channel_gradients(plan)
    weight_id = 0 if weight is None else id(weight)
    bias_id = 0 if bias is None else id(bias)
    mask = 0 if where is None else id(where)
    enter(ready, id(x), id(dy), id(out), weight_id, bias_id, id(mean), id(rstd), id(dweight), id(dbias), mask, given, 0)
    return out, dweight, dbias


def channel_gradients(plan: Plan) -> tuple[Array, Array]:
    """Arrays for dweight and dbias; beyond the range of a 16-bit type they become infinite."""
    dtype = plan.weight_dtype
    return np.empty(plan.C, dtype), np.empty(plan.C, dtype)
