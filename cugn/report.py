"""The report of ``python -m cugn``: what can run here, is it right, and how fast against this machine's copy."""

from __future__ import annotations

import math
import os
import platform
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np

from . import reference, threads
from ._version import __version__
from .engines import resolve

__all__ = ["report"]

Array = Any

DTYPES = ("float32", "float64", "float16", "bfloat16")
SAMPLE, GROUPS = (256, 56, 56), 32
BYTES = 32 * 2**20
"""Of one array in the timing: two of them are beyond most caches, a group (100 KB in float32) fits in a core's own."""
FEATURES = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "neon", "fullfp16", "sve")


@dataclass(frozen=True)
class Host:
    """An array library, the engine that serves it, and the way there and back from NumPy."""

    engine: str
    arrays: str
    dtypes: tuple[str, ...]
    there: Callable[[np.ndarray[Any, Any]], Array] = field(repr=False, default=lambda array: array)
    back: Callable[[Array], np.ndarray[Any, Any]] = field(repr=False, default=np.asarray)
    wait: Callable[[], object] = field(repr=False, default=lambda: None)
    copy: Callable[[Array, Array], object] = field(repr=False, default=np.copyto)
    in_place: bool = True
    """Whether results can be written into an array that the caller supplies."""


def report() -> int:
    """Print what is here, check and time every engine.

    Returns
    -------
    int
        0 if every engine that can run here is right, else 1.
    """
    print(f"cugn {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}\n")
    for name, value in _environment():
        print(_wrapped(f"  {name:10s}", value))
    print(f"\n{'':21s}{'forward':25s}  backward")
    columns = f"{'error':>10s}{'GB/s':>8s}{'/ copy':>7s}"
    print(f"{'engine':11s}{'dtype':10s}{columns}  {columns}", flush=True)
    wrong: list[str] = []
    for engine in ("cpu", "cuda", "dask", "reference"):
        try:
            host = _host(engine)
        except _Absent as reason:
            print(_wrapped(f"{engine:11s}", f"not here: {reason}"), flush=True)
            continue
        try:
            copy = _copy_speed(host)
        except Exception as error:
            wrong.append(f"{engine}: {_told(error)}")
            continue
        for dtype in host.dtypes:
            cells = []
            for operation in ("forward", "backward"):
                try:
                    cells.append(_cell(host, dtype, operation, copy, wrong))
                except Exception as error:  # an engine may fail in any way: that is what the report is for
                    wrong.append(f"{engine} {dtype} {operation}: {_told(error)}")
                    cells.append(f"{'FAIL':25s}")
            print(f"{engine:11s}{dtype:10s}{'  '.join(cells)}".rstrip(), flush=True)
    print(
        "\nerror: the largest, as a share of the promised bound; x is 1000 standard\n"
        "deviations from zero (16-bit: 10). GB/s of x, y (x, dy, dx) once each;\n"
        f"copy: one thread's, of the same {BYTES >> 20} MiB. reference: every other array library."
    )
    for line in wrong:
        print(_wrapped("FAIL  ", line))
    print("\n" + (f"{len(wrong)} wrong" if wrong else "all right"))
    return 1 if wrong else 0


class _Absent(Exception):
    """Why an engine cannot run here."""


def _environment() -> list[tuple[str, str]]:
    """Name and description of each thing that decides what can run."""
    from llvmlite import binding

    present = binding.get_host_cpu_features()
    features = " ".join(name for name in FEATURES if present.get(name)) or "no vector units known"
    try:
        gpu = _gpu()
    except _Absent as reason:
        gpu = f"none: {reason}"
    packages = ("numpy", "numba", "ml_dtypes", "array-api-compat", "dask")
    return [
        ("packages", ", ".join(f"{name} {_version(name) or 'not installed'}" for name in packages)),
        ("CPU", f"{_cpu_name()} ({binding.get_host_cpu_name()}): {features}"),
        ("threads", f"{threads.get_num_threads()} (CUGN_NUM_THREADS sets it), of {os.cpu_count()} cores"),
        ("GPU", gpu),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    """Name of the GPU; _Absent, with the reason, where there is none."""
    try:
        import cupy
    except ImportError as error:
        raise _Absent("CuPy is not installed (pip install 'cugn[cuda13]')") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _Absent(f"CuPy {cupy.__version__} says {str(error).partition(': ')[2] or error}") from error
    if count == 0:
        raise _Absent(f"CuPy {cupy.__version__} finds no device")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    capability = f"{properties['major']}.{properties['minor']}"
    return f"{properties['name'].decode()}, compute capability {capability}, CuPy {cupy.__version__}"


def _host(engine: str) -> Host:
    """How to call an engine; _Absent, with the reason, where it cannot run."""
    if engine == "cpu":
        return Host("cpu", "NumPy", DTYPES)
    if engine == "reference":
        return Host("reference", "array API", ("float32",))
    if engine == "cuda":
        _gpu()
        import cupy

        wait = cupy.cuda.Device().synchronize
        return Host("cuda", "CuPy", DTYPES, cupy.asarray, cupy.asnumpy, wait, cupy.copyto)
    try:
        import dask.array
    except ImportError as error:
        raise _Absent("Dask is not installed (pip install 'cugn[dask]')") from error

    def chunked(array: np.ndarray[Any, Any]) -> Array:
        sizes = [-(-n // 2) if axis in (0, array.ndim - 1) else n for axis, n in enumerate(array.shape)]
        return dask.array.from_array(array, chunks=tuple(sizes)) if array.ndim > 1 else array

    return Host("dask", "Dask", ("float32",), chunked, in_place=False)


def _cell(host: Host, dtype: str, operation: str, copy: float, wrong: list[str]) -> str:
    """One cell of the table: error against the promised bound, GB/s, and its share of the copy."""
    served, error = "", 0.0
    for channel_axis in (1, -1):
        served, share = _error(host, dtype, operation, channel_axis)
        error = max(error, math.inf if math.isnan(share) else share)
        if not share <= 1:
            order = "channels-first" if channel_axis == 1 else "channels-last"
            wrong.append(f"{host.engine} {dtype} {operation}, {order}: error is {share:.3g} times the bound")
    if served != host.engine:
        return f"{f'by {served}':25s}"
    speed = _speed(host, dtype, operation)
    mark = f"{'FAIL' if error > 1 else 'ok':5s}{error:5.2f}" if error < 100 else f"FAIL{error:6.0e}"
    return f"{mark}{speed / 1e9:8.1f}{speed / copy:7.2f}"


def _arguments(host: Host, dtype: str, shape: tuple[int, ...], channel_axis: int) -> dict[str, Array]:
    """x, dy, weight and bias, in the host's arrays; x is far from zero, where careless formulas fail."""
    rng = np.random.default_rng(0)
    channels = shape[channel_axis]
    offset = 1e3 if dtype in ("float32", "float64") else 10.0
    drawn = {
        "x": offset + rng.standard_normal(shape, dtype=np.float32),
        "dy": rng.standard_normal(shape, dtype=np.float32),
        "weight": rng.uniform(0.5, 2, channels),
        "bias": rng.uniform(-1, 1, channels),
    }
    return {name: host.there(_rounded(array, dtype)) for name, array in drawn.items()}


def _rounded(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _call(
    host: Host, operation: str, arrays: dict[str, Array], groups: int, channel_axis: int, out: Array = None
) -> tuple[str, Callable[[], tuple[Array, ...]]]:
    """Name of the engine that serves a call, and the call."""
    names = ("weight", "bias") if operation == "forward" else ("dy", "weight", "bias")
    operands = [(name, arrays[name]) for name in names]
    if out is not None:
        operands.append(("out", out))
    engine, plan = resolve(operation, arrays["x"], groups, operands, 1e-5, channel_axis, 0, None)
    if host.engine == "reference":
        engine = reference
    x, dy, weight, bias = (arrays[name] for name in ("x", "dy", "weight", "bias"))
    if operation == "forward":
        return engine.__name__.rpartition(".")[2], lambda: engine.forward(plan, x, weight, bias, None, out)
    return (
        engine.__name__.rpartition(".")[2],
        lambda: engine.backward(plan, dy, x, weight, bias, None, None, None, out),
    )


def _error(host: Host, dtype: str, operation: str, channel_axis: int) -> tuple[str, float]:
    """Name of the serving engine, and its largest error as a share of the promised bound (NaN: not a number)."""
    shape = (3, 12, 37, 19) if channel_axis == 1 else (3, 37, 19, 12)
    groups = 4
    arrays = _arguments(host, dtype, shape, channel_axis)
    served, call = _call(host, operation, arrays, groups, channel_axis)
    results = [host.back(result).astype(np.float64) for result in call()]
    exact = {name: host.back(array).astype(np.float64) for name, array in arrays.items()}
    x, dy = (np.moveaxis(exact[name], channel_axis, 1).reshape(3, 12, -1) for name in ("x", "dy"))
    weight, bias = exact["weight"][:, None], exact["bias"][:, None]
    x_hat, rstd = _textbook(x, groups)
    if host.engine == "reference":  # which is the measure of the others, and itself held against the textbook
        wanted = _textbook_results(operation, x_hat, rstd, dy, weight, bias, groups)
    else:
        numpy = Host("reference", "NumPy", (dtype,))
        wanted = [np.asarray(a) for a in _call(numpy, operation, exact, groups, channel_axis)[1]()]
        wanted[0] = np.moveaxis(wanted[0], channel_axis, 1).reshape(x.shape)
    results[0] = np.moveaxis(results[0], channel_axis, 1).reshape(x.shape)
    eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).eps)
    if operation == "forward":
        scale = np.abs(weight) * np.maximum(1, np.abs(x_hat)) + np.abs(bias)
        # 16-bit results are the nearest value, half an ulp, and 1 % of one for the arithmetic before it.
        bounds = [{"float32": 3, "float64": 4}.get(dtype, 0.51) * eps * scale]
    else:
        k = (8 if dtype == "float64" else 4) * eps
        sums = [np.abs(dy * x_hat).sum((0, 2)), np.abs(dy).sum((0, 2))]
        bounds = [np.full(x.shape, k * np.abs(wanted[0]).max()), *(k * terms for terms in sums)]
    compared = zip(results, wanted, bounds, strict=False)  # the forward's statistics are not compared
    return served, max(float(np.max(np.abs(result - want) / bound)) for result, want, bound in compared)


def _textbook(x: np.ndarray[Any, Any], groups: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x_hat and rstd, each of x's shape, of x of shape (N, C, S)."""
    grouped = x.reshape(x.shape[0], groups, -1)
    rstd = 1 / np.sqrt(grouped.var(axis=2, keepdims=True) + 1e-5)
    x_hat = (grouped - grouped.mean(axis=2, keepdims=True)) * rstd
    return x_hat.reshape(x.shape), np.broadcast_to(rstd, grouped.shape).reshape(x.shape)


def _textbook_results(operation: str, x_hat: Any, rstd: Any, dy: Any, weight: Any, bias: Any, groups: int) -> list[Any]:
    if operation == "forward":
        return [weight * x_hat + bias]
    grouped = (x_hat.shape[0], groups, -1)
    g, h = (weight * dy).reshape(grouped), x_hat.reshape(grouped)
    projected = g - g.mean(axis=2, keepdims=True) - h * (g * h).mean(axis=2, keepdims=True)
    return [rstd * projected.reshape(x_hat.shape), (dy * x_hat).sum((0, 2)), dy.sum((0, 2))]


def _timed_shape(dtype: str) -> tuple[int, ...]:
    itemsize = _rounded(np.empty(0), dtype).itemsize
    return (BYTES // (math.prod(SAMPLE) * itemsize), *SAMPLE)


def _speed(host: Host, dtype: str, operation: str) -> float:
    """Bytes a second of an operation: x and y once each, or x, dy and dx."""
    shape = _timed_shape(dtype)
    arrays = _arguments(host, dtype, shape, 1)
    out = host.there(np.zeros(shape, _rounded(np.empty(0), dtype).dtype)) if host.in_place else None
    _, call = _call(host, operation, arrays, GROUPS, 1, out)
    nbytes = int(arrays["x"].nbytes)

    def computed() -> None:
        results = call()
        if not host.in_place:
            for result in results:
                result.compute()

    return (2 if operation == "forward" else 3) * nbytes / _seconds(computed, host.wait)


def _copy_speed(host: Host) -> float:
    """Bytes a second, read and written, of a copy by one thread (or by the GPU)."""
    source, target = np.ones(_timed_shape("float32"), np.float32), np.zeros(_timed_shape("float32"), np.float32)
    if host.in_place:
        source, target = host.there(source), host.there(target)
    return 2 * int(source.nbytes) / _seconds(lambda: host.copy(target, source), host.wait)


def _seconds(call: Callable[[], object], wait: Callable[[], object], rounds: int = 5) -> float:
    """Median time of a call after a first one that compiles and touches the memory."""
    call()
    wait()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return median(times)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, 79, initial_indent=head, subsequent_indent=" " * len(head))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
