"""Normalize files larger than memory: .npy and Zarr arrays, block by block, with the output complete or absent.

Samples that fit in memory are read once and normalized by themselves. Larger ones take two passes over blocks of a few
megabytes, as `parts` says: moments of each block, merged, then their application. Blocks are small on purpose: one that
stays in the cache between reading, computing and writing costs little more than its copy. Several threads read and
compute, one at a time writes, and what is written is on its way to the disk meanwhile.

The output grows under a temporary name beside its final one and is renamed when it is complete and on the disk.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import shutil
import sys
import threading
import time
import tokenize
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .functional import group_norm
from .moments import Moments
from .parts import Axes, Part, Statistics, normalized
from .plan import FLOATS, Plan, Spec, axes_key, groups_key

__all__ = ["FileError", "add_arguments", "main", "normalize_file", "run"]

Array = Any
Index = tuple[slice, ...]
BLOCK_BYTES = 2 << 20  # of input; stays in the cache of a core
WRITE_BYTES = 256 << 10  # at a time: 2 GB took 1.65 s of system time, by 2 MB at a time 2.65 s
WRITE_BEHIND = 64 << 20  # bytes that are written before the system is asked to bring them to the disk
_WINDOWS = os.name == "nt"  # where an open file can be neither renamed nor removed
COPIES = 3  # of a block in memory at a time: as read, as computed, as written


class FileError(Exception):
    """A file that cannot be read or written as asked; the message says which and why."""


class Source(Protocol):
    """An array in a file that is read by blocks."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def blocks(self, limit: int, whole: Sequence[int]) -> Iterator[Index]:
        """Indices of blocks of at most `limit` bytes where possible, which cover the axes `whole` entirely."""

    def read(self, index: Index, memory: Memory) -> Array:
        """One block, in native byte order."""

    def like(self, path: Path, dtype: np.dtype[Any]) -> Target:
        """A new file of this kind, shape and order."""


class Target(Protocol):
    """An array in a file that appears when it is complete."""

    def write(self, index: Index, values: Array) -> None:
        """Write one block."""

    def commit(self) -> None:
        """Bring everything to the disk, then give the file its name."""

    def abandon(self) -> None:
        """Remove what was written."""


class Memory(threading.local):
    """Memory of a thread, used again for each block: fresh memory would be paid for in page faults."""

    bytes: Array = np.empty(0, np.uint8)

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """An array of this shape in the thread's memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self.bytes.size < nbytes:
            self.bytes = np.empty(nbytes, np.uint8)
        return self.bytes[:nbytes].view(dtype).reshape(shape)


class NpySource:
    """A .npy file, read in runs that are contiguous in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path), open(path, "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise FileError(f"{path}: .npy version {version} is not known")
                self.shape, self.fortran, self.dtype = read_header(file)
            except (ValueError, SyntaxError, tokenize.TokenError) as error:  # NumPy evaluates the header as Python
                raise FileError(f"{path}: not a .npy file: {_one_line(error)}") from None
            self.offset = file.tell()
            missing = self.offset + math.prod(self.shape) * self.dtype.itemsize - os.fstat(file.fileno()).st_size
        if self.dtype.hasobject:
            raise FileError(f"{path}: holds Python objects, not numbers")
        if missing > 0:
            raise FileError(f"{path}: cut short: {missing} bytes are missing")

    def blocks(self, limit: int, whole: Sequence[int]) -> Iterator[Index]:
        """Runs of the file: leading axes one by one, a range of the next one, all of the others."""
        ndim = len(self.shape)
        order = range(ndim)[::-1] if self.fortran else range(ndim)
        sizes = [self.shape[axis] for axis in order]
        inner = ndim  # sizes[inner:] are taken whole
        while inner > 0 and (
            math.prod(sizes[inner - 1 :]) * self.dtype.itemsize <= limit or any(axis in whole for axis in order[:inner])
        ):
            inner -= 1
        outer = max(inner - 1, 0)
        step = max(1, limit // (math.prod(sizes[inner:]) * self.dtype.itemsize)) if inner else 1
        ranges = [
            _cuts(size, 1 if k < outer else step if k == outer and inner else size) for k, size in enumerate(sizes)
        ]
        for index in product(*ranges):
            yield tuple(index[::-1] if self.fortran else index)

    def read(self, index: Index, memory: Memory) -> Array:
        """One block, in native byte order."""
        shape = [s.stop - s.start for s in index]
        array = memory.take(shape[::-1] if self.fortran else shape, self.dtype)
        with _reading(self.path), open(self.path, "rb", buffering=0) as file:
            file.seek(self.position(index))
            view = memoryview(array.reshape(-1).view(np.uint8))
            while view:
                count = file.readinto(view)
                if not count:
                    raise FileError(f"{self.path}: cut short while it was read")
                view = view[count:]
        array = array.T if self.fortran else array
        return array if self.dtype.isnative else array.astype(self.dtype.newbyteorder("="))

    def position(self, index: Index) -> int:
        """Byte in the file at which a block starts."""
        starts, sizes = [s.start for s in index], list(self.shape)
        if self.fortran:
            starts, sizes = starts[::-1], sizes[::-1]
        flat = 0
        for start, size in zip(starts, sizes, strict=True):
            flat = flat * size + start
        return self.offset + flat * self.dtype.itemsize

    def like(self, path: Path, dtype: np.dtype[Any]) -> NpyTarget:
        """A new file of this shape and order."""
        return NpyTarget(path, self, dtype)


class NpyTarget:
    """A .npy file in the making."""

    def __init__(self, path: Path, source: NpySource, dtype: np.dtype[Any]) -> None:
        self.path, self.part = path, _part_name(path)
        self.nbytes = math.prod(source.shape) * dtype.itemsize
        self.turn = threading.Lock()
        self.written = self.sent = 0
        with _writing(path, self.nbytes):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            # Not emptied when it is opened: another run may be writing it.
            self.file = os.fdopen(os.open(self.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
            try:
                _lock(self.file.fileno(), path)
            except FileError:
                self.file.close()
                raise
        try:
            self._lay_out(source, dtype)
        except BaseException:
            self.abandon()
            raise

    def _lay_out(self, source: NpySource, dtype: np.dtype[Any]) -> None:
        """Write the header and take the room."""
        with _writing(self.path, self.nbytes):
            self.file.truncate(0)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": source.fortran}
            np.lib.format.write_array_header_1_0(self.file, {**header, "shape": source.shape})
            self.file.flush()
            self.layout = _Layout(self.part, source, dtype, self.file.tell())
            # A full disk shows now and not after an hour. Room is not reserved: fallocate made writing slower.
            if self.nbytes > shutil.disk_usage(self.path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, index: Index, values: Array) -> None:
        """Write one block; one thread at a time, for the system lets in no other and has it spin meanwhile."""
        values = np.ascontiguousarray(values.T if self.layout.fortran else values)
        with self.turn, _writing(self.path, self.nbytes), open(self.part, "r+b", buffering=0) as file:
            start = file.seek(self.layout.position(index))
            view = memoryview(values.reshape(-1).view(np.uint8))
            while view:
                view = view[file.write(view[:WRITE_BYTES]) :]
            self.written = max(self.written, start + values.nbytes)
            if self.written - self.sent > WRITE_BEHIND and hasattr(os, "posix_fadvise"):
                # Linux begins to write what is not wanted in memory: fsync at the end finds little left to do.
                os.posix_fadvise(file.fileno(), self.sent, self.written - self.sent, os.POSIX_FADV_DONTNEED)
                self.sent = self.written

    def commit(self) -> None:
        """Bring everything to the disk, then give the file its name."""
        with _writing(self.path, self.nbytes):
            os.fsync(self.file.fileno())
            if _WINDOWS:
                self.file.close()
            os.replace(self.part, self.path)
            self.file.close()
            _sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Remove what was written."""
        if _WINDOWS:
            self.file.close()
        self.part.unlink(missing_ok=True)
        self.file.close()  # after it is gone: with the file the lock is given up


class _Layout(NpySource):
    """Where blocks lie in a .npy file that is being written."""

    def __init__(self, path: Path, source: NpySource, dtype: np.dtype[Any], offset: int) -> None:
        self.path, self.shape, self.fortran = path, source.shape, source.fortran
        self.dtype, self.offset = dtype, offset


class ZarrSource:
    """A Zarr array in a folder, read by its chunks (by shards, where it has them)."""

    def __init__(self, path: Path) -> None:
        try:
            import zarr
        except ImportError:
            raise FileError(f"{path}: reading Zarr needs the package zarr (pip install cugn[zarr])") from None
        self.path = path
        with _reading(path):
            try:
                self.array = zarr.open_array(path, mode="r")
            except OSError:
                raise
            except Exception as error:
                raise FileError(f"{path}: not a Zarr array: {_one_line(error)}") from None
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.unit = self.array.shards or self.array.chunks

    def blocks(self, limit: int, whole: Sequence[int]) -> Iterator[Index]:
        """Boxes of whole chunks; one chunk is never cut."""
        box = [
            size if axis in whole else unit for axis, (size, unit) in enumerate(zip(self.shape, self.unit, strict=True))
        ]
        for axis in reversed(range(len(box))):
            unit = box[axis]
            fits = limit // max(1, math.prod(box) * self.dtype.itemsize)
            box[axis] = min(self.shape[axis], unit * max(1, fits))
        yield from product(*(_cuts(size, length) for size, length in zip(self.shape, box, strict=True)))

    def read(self, index: Index, memory: Memory) -> Array:
        """One block, in native byte order."""
        with _reading(self.path):
            values = np.asarray(self.array[index])
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))

    def like(self, path: Path, dtype: np.dtype[Any]) -> ZarrTarget:
        """A new array of this shape, chunks and compression, with the attributes."""
        return ZarrTarget(path, self, dtype)


class ZarrTarget:
    """A Zarr array in the making."""

    def __init__(self, path: Path, source: ZarrSource, dtype: np.dtype[Any]) -> None:
        import zarr

        self.path, self.part, self.nbytes = path, _part_name(path), 0
        if path.exists():
            raise FileError(f"{path}: exists already, and a folder cannot be replaced in one step: remove it first")
        with _writing(path, 0):
            self.part.mkdir(exist_ok=True)
            self.folder = os.open(self.part, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None
            try:
                if self.folder is not None:
                    _lock(self.folder, path)
            except FileError:
                self._unlock()
                raise
            for entry in self.part.iterdir():  # of a run that was killed
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            old = source.array
            metadata = {"dimension_names": old.metadata.dimension_names} if old.metadata.zarr_format == 3 else {}
            self.array = zarr.create_array(
                self.part,
                shape=old.shape,
                dtype=dtype,
                chunks=old.chunks,
                shards=old.shards,
                compressors=old.compressors or None,
                zarr_format=old.metadata.zarr_format,
                attributes=dict(old.attrs),
                **metadata,
            )

    def write(self, index: Index, values: Array) -> None:
        """Write one block."""
        with _writing(self.path, self.nbytes):
            self.array[index] = values

    def commit(self) -> None:
        """Bring everything to the disk, then give the folder its name."""
        with _writing(self.path, self.nbytes):
            for folder, _, files in os.walk(self.part):
                for name in files:
                    with open(Path(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                _sync_folder(Path(folder))
            os.rename(self.part, self.path)
            _sync_folder(self.path.parent)
            self._unlock()

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.part, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self.folder is not None:
            os.close(self.folder)


def normalize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    groups: Any,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    batch_axis: int | tuple[int, ...] | None = 0,
    activation: str | None = None,
    dtype: Any = None,
    memory: int = 256 << 20,
    stats: str | os.PathLike[str] | None = None,
    save_stats: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> int:
    """Normalize a .npy file or a Zarr array of any size into another one.

    Parameters
    ----------
    source, target : path
        A .npy file, or the folder of a Zarr array. The target is of the same kind, order, chunks and compression; a
        .npy file may replace an older one, also the source.
    groups, weight, bias, eps, channel_axis, batch_axis, activation
        As in `cugn.group_norm`; the arrays are NumPy arrays.
    dtype : dtype, optional
        Of the target: float16, float32 or float64. The source's, or float32 for integers.
    memory : int, optional
        Bytes that blocks may take.
    stats : path, optional
        Statistics of an earlier run (see `save_stats`), applied in place of the file's own.
    save_stats : path, optional
        Receives the statistics: a .npz file with the fields of `cugn.Moments`, and `mean_low`, what the mean's rounding
        to float64 has lost.
    threads : int, optional
        Blocks in work at a time; by default one a processor, at most 4.
    progress : bool, optional
        Show progress on standard error.

    Returns
    -------
    int
        Number of passes over the source: 1 or 2.

    Raises
    ------
    FileError
        If a file cannot be read or written, with the reason.
    TypeError, ValueError
        As `cugn.group_norm`.

    Notes
    -----
    The target appears under its name when it is complete and on the disk: a run that is killed leaves nothing there,
    and a hidden file or folder ``.NAME.part``, which the next run to the same target takes over.

    Examples
    --------
    >>> import numpy as np, tempfile, cugn, cugn.files
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> x = np.random.default_rng(0).normal(5, 2, (2, 4, 30)).astype(np.float32)
    >>> np.save(folder / "x.npy", x)
    >>> cugn.files.normalize_file(folder / "x.npy", folder / "y.npy", 2)
    1
    >>> bool(np.array_equal(np.load(folder / "y.npy"), cugn.group_norm(x, 2)))
    True
    """
    job = _Job(
        Path(source), Path(target), groups, weight, bias, eps, channel_axis, batch_axis, activation, dtype, threads
    )
    return job.run(memory, stats, save_stats, progress)


class _Job:
    """One run, its arguments checked against the source."""

    def __init__(
        self,
        source: Path,
        target: Path,
        groups: Any,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        channel_axis: int,
        batch_axis: Any,
        activation: str | None,
        dtype: Any,
        threads: int | None,
    ) -> None:
        self.source: Source = ZarrSource(source) if source.is_dir() else NpySource(source)
        self.path, self.target = source, target
        self.groups, self.weight, self.bias = groups, weight, bias
        x_dtype = self.source.dtype.newbyteorder("=")
        given = [(name, array) for name, array in (("weight", weight), ("bias", bias)) if array is not None]
        try:
            self.plan = Plan.of(
                Spec(np.ndarray, self.source.shape, x_dtype),
                groups_key(groups),
                [(name, Spec(np.ndarray, array.shape, array.dtype)) for name, array in given],
                eps=eps,
                channel_axis=channel_axis,
                batch_axis=axes_key(batch_axis, "batch_axis"),
                activation=activation,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from None
        plan = self.plan
        self.dtype = np.dtype(plan.y_dtype if dtype is None else dtype)
        if self.dtype.name not in FLOATS:
            raise TypeError(f"dtype is {self.dtype}: it must be float16, float32 or float64")
        # Blocks go to a wider dtype before they are computed, to a narrower one after.
        self.x_dtype = self.dtype if self.dtype.itemsize > np.dtype(plan.y_dtype).itemsize else x_dtype
        self.axes = Axes(plan.batch_axes, plan.channel_axis)
        labels = np.repeat(np.arange(plan.G), np.diff(plan.group_bounds)) if plan.labels is None else plan.labels
        self.labels = np.asarray(labels)
        self.threads = threads or min(4, os.cpu_count() or 1)
        self.memory = Memory()

    def run(self, memory: int, stats: Any, save_stats: Any, progress: bool) -> int:
        """Normalize, and tell the number of passes that it took."""
        plan, itemsize = self.plan, self.source.dtype.itemsize
        statistics = None if stats is None else self._load(Path(stats))
        copies = COPIES * max(self.dtype.itemsize, self.x_dtype.itemsize, itemsize) // itemsize

        def largest(blocks: Sequence[Index]) -> int:
            return max((_elements(index) for index in blocks), default=0) * itemsize * copies

        passes = 2 if statistics is None else 1
        blocks = list(self.source.blocks(BLOCK_BYTES, ()))
        if statistics is None and save_stats is None:
            not_batch = [axis for axis in range(len(plan.shape)) if axis not in plan.batch_axes]
            samples = list(self.source.blocks(BLOCK_BYTES, not_batch))
            if largest(samples) <= memory:
                passes, blocks = 1, samples
        needed = largest(blocks)
        if needed > memory:
            raise FileError(
                f"{self.path}: {_size(needed - memory)} more memory are needed: a block of it takes {_size(needed)}"
            )
        threads = max(1, min(self.threads, memory // max(needed, 1)))
        with _Progress(progress, passes * plan.size * itemsize) as bar, ThreadPoolExecutor(threads) as pool:
            if statistics is None and passes == 2:
                part = self._moments(pool, blocks, bar)
                statistics = part.statistics(plan.G, plan.eps)
                if save_stats is not None:
                    _save(Path(save_stats), part)
            self._write(pool, blocks, statistics, bar)
        return passes

    def _moments(self, pool: ThreadPoolExecutor, blocks: Sequence[Index], bar: _Progress) -> Part:
        """Moments of all groups of all samples."""
        shape = self.plan.stats_shape
        m = Moments(np.zeros(shape, np.int64), np.full(shape, np.nan), np.zeros(shape))
        whole = Part(np.arange(self.plan.G), np.zeros(shape), np.ones(shape), m)

        def part_of(index: Index) -> Part:
            return Part.of(self._read(index), self.labels[index[self.axes.channel]], self.axes)

        for index, part in _in_order(pool, part_of, blocks):
            at = tuple(index[axis] for axis in self.axes.batch)
            merged = _entries(whole, at).merge(part)
            for values, entries in zip(_arrays(_entries(whole, at)), _arrays(merged), strict=True):
                values[...] = entries
            bar.update(_elements(index) * self.source.dtype.itemsize)
        return whole

    def _write(
        self, pool: ThreadPoolExecutor, blocks: Sequence[Index], statistics: Statistics | None, bar: _Progress
    ) -> None:
        """Write the target."""
        target = self.source.like(self.target, self.dtype)

        def write(index: Index) -> None:
            y = self._normalized(self._read(index), index, statistics)
            target.write(index, y.astype(self.dtype, copy=False))

        try:
            for index, _ in _in_order(pool, write, blocks):
                bar.update(_elements(index) * self.source.dtype.itemsize)
            target.commit()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # nothing is written after it is removed
            target.abandon()
            raise

    def _normalized(self, x: Array, index: Index, statistics: Statistics | None) -> Array:
        """One block normalized: in its own memory, if the dtype is the same."""
        plan = self.plan
        out = x if x.dtype.name == plan.y_dtype else None
        if statistics is None:
            options = {"eps": plan.eps, "activation": plan.activation, **self.axes.keywords}
            return group_norm(x, self.groups, self.weight, self.bias, out=out, **options)
        channels = index[self.axes.channel]
        at = tuple(index[axis] for axis in self.axes.batch)
        weight, bias = (None if v is None else v[channels] for v in (self.weight, self.bias))
        own = Statistics(*(values[at] for values in statistics))
        return normalized(x, self.labels[channels], self.axes, own, weight, bias, plan.activation, out)

    def _read(self, index: Index) -> Array:
        return self.source.read(index, self.memory).astype(self.x_dtype, copy=False)

    def _load(self, path: Path) -> Statistics:
        """Statistics that were saved."""
        with _reading(path):
            try:
                with np.load(path, allow_pickle=False) as saved:
                    fields = {name: saved[name] for name in saved.files}
                    m = Moments(fields["count"], fields["mean"], fields["m2"])
            except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
                raise FileError(f"{path}: not a file of statistics: {_one_line(error)}") from None
        low = fields.get("mean_low", np.zeros_like(m.mean))
        shape = self.plan.stats_shape
        try:
            count, mean, low, m2 = (np.broadcast_to(values, shape) for values in (m.count, m.mean, low, m.m2))
        except ValueError:
            raise FileError(f"{path}: holds statistics of shape {m.mean.shape}: {self.path} needs {shape}") from None
        rstd = Moments(count, mean, m2).rstd(self.plan.eps)
        if self.x_dtype == np.float64:
            return Statistics(count, mean, np.ones(shape), low, rstd)
        return Statistics.given(count, mean, rstd)


def _entries(part: Part, at: tuple[slice, ...]) -> Part:
    """Those of some of the samples, as views."""
    return Part(part.present, part.shift[at], part.unit[at], Moments(*(values[at] for values in part.moments)))


def _arrays(part: Part) -> tuple[Array, ...]:
    return (part.shift, part.unit, *part.moments)


def _save(path: Path, part: Part) -> None:
    """Save moments, complete or not at all."""
    total = part.total(len(part.present))
    with np.errstate(all="ignore"):
        low = (part.shift - total.mean) + part.unit * part.moments.mean
    temporary = _part_name(path)
    with _writing(path, 0):
        with open(temporary, "wb") as file:
            np.savez(file, count=total.count, mean=total.mean, m2=total.m2, mean_low=low)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Index], Any], blocks: Iterable[Index]
) -> Iterator[tuple[Index, Any]]:
    """Blocks and results in the order of the blocks, with few of them under way at a time."""
    waiting: deque[tuple[Index, Future[Any]]] = deque()
    for index in blocks:
        waiting.append((index, pool.submit(function, index)))
        if len(waiting) > 16:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


class _Progress:
    """A bar of bytes on standard error: tqdm's if it is installed, else a line for each tenth."""

    def __init__(self, shown: bool, total: int) -> None:
        self.shown, self.total, self.done = shown, total, 0
        self.bar: Any = None
        if shown:
            with suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, unit="B", unit_scale=True)

    def update(self, count: int) -> None:
        """Add bytes that are done."""
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and 10 * before // self.total < 10 * self.done // self.total:
            print(f"{100 * self.done // self.total:3d} % of {_size(self.total)}", file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def _elements(index: Index) -> int:
    return math.prod(s.stop - s.start for s in index)


def _part_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from None


@contextmanager
def _writing(path: Path, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise FileError(f"{path}: no room for {_size(nbytes)}: {_size(free)} are free") from None
        raise FileError(f"{path}: cannot be written: {error.strerror or _one_line(error)}") from None


def _lock(descriptor: int, path: Path) -> None:
    """Keep other runs from the same temporary file, until the process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows: it is up to the caller there
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{path}: another run is writing it") from None


def _sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system knows of that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _resident() -> int:
    """Bytes of memory that the process has; 250 MB where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 250 << 20


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(nbytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.3g} {unit}" if unit != "bytes" else f"{nbytes} bytes"
        nbytes /= 1000  # type: ignore[assignment]
    raise AssertionError


def _bytes(text: str) -> int:
    """Bytes of "512MB", "2GiB", "1e9"."""
    match = re.fullmatch(r"([0-9.eE+]+)\s*([kMGT]?)(i?)B?", text.strip())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < 1e18:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 512MB or 2GiB")
    return int(number * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def _integers(text: str) -> int | tuple[int, ...] | None:
    """An integer, several with commas between them, or "none"."""
    if text.lower() == "none":
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer and no list of integers such as 0,0,1,1") from None
    return values if "," in text else values[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m cugn normalize``."""
    parser.description = "Normalize a .npy file or a Zarr array of any size, block by block."
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help=".npy file, or folder of a Zarr array")
    add("target", metavar="OUT", type=Path, help="of the same kind; appears when it is complete")
    add("--groups", metavar="G", type=_integers, required=True, help="number of groups, or C labels such as 0,0,1,1")
    add("--channel-axis", metavar="A", type=int, default=1, help="axis of the channels (1)")
    add("--batch-axis", metavar="A", type=_integers, default=0, help='axis or axes of the samples, or "none" (0)')
    add("--eps", type=float, default=1e-5, help="added to the variance (1e-5)")
    add("--dtype", choices=["float16", "float32", "float64"], help="of OUT (IN's; float32 for integers)")
    add("--activation", choices=["relu", "silu", "gelu", "gelu_tanh"], help="applied to the result")
    add("--weight", metavar="F", type=Path, help=".npy file of C scales")
    add("--bias", metavar="F", type=Path, help=".npy file of C shifts")
    add("--memory", metavar="SIZE", type=_bytes, default="512MB", help="that the process shall not exceed (512MB)")
    add("--stats", metavar="F", type=Path, help="apply these statistics, of an earlier --save-stats")
    add("--save-stats", metavar="F", type=Path, help="save the statistics of IN as .npz")
    add("--threads", metavar="N", type=int, help="blocks in work at a time (one a processor, at most 4)")
    add("--quiet", action="store_true", help="no progress bar and no closing line")


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for, and give the exit status."""
    start = time.perf_counter()
    group_norm(np.zeros((1, 2), np.float32), 1)  # so that the memory of the engine and its compiled code is counted
    try:
        weight, bias = (None if path is None else _vector(path) for path in (options.weight, options.bias))
        passes = normalize_file(
            options.source,
            options.target,
            options.groups,
            weight=weight,
            bias=bias,
            eps=options.eps,
            channel_axis=options.channel_axis,
            batch_axis=options.batch_axis,
            activation=options.activation,
            dtype=options.dtype,
            memory=max(0, options.memory - _resident()),
            stats=options.stats,
            save_stats=options.save_stats,
            threads=options.threads,
            progress=not options.quiet,
        )
    except (FileError, TypeError, ValueError, MemoryError) as error:
        print(f"cugn normalize: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cugn normalize: {options.target}: interrupted, nothing was left", file=sys.stderr)
        return 130
    if not options.quiet:
        seconds = time.perf_counter() - start
        print(f"{options.target}: {passes} {'pass' if passes == 1 else 'passes'}, {seconds:.1f} s")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m cugn normalize`` with these arguments."""
    parser = argparse.ArgumentParser(prog="python -m cugn normalize")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _vector(path: Path) -> Array:
    """A small .npy file."""
    source = NpySource(path)
    if len(source.shape) != 1:
        raise FileError(f"{path}: holds an array of shape {source.shape}: it must be one value for each channel")
    values = source.read((slice(0, source.shape[0]),), Memory())
    return values.copy()


if __name__ == "__main__":
    sys.exit(main())
