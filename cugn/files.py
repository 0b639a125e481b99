"""Normalize files larger than memory: .npy and Zarr arrays, block by block, with the output complete or absent.

Samples that fit in memory are read once and normalized by themselves. Larger ones take two passes over blocks of a few
megabytes, as `parts` says: moments of each block, merged, then their application. Blocks are small on purpose: one that
stays in the cache between reading, computing and writing costs little more than its copy. Moments are one sample ahead:
while one is written the next one is read, and of a file that is larger than the system's cache the second pass finds
what the first has read. Several threads read and compute, one at a time writes, and what is written is on its way to
the disk meanwhile.

`formats.py` reads and writes the blocks; the command is in `command.py`.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from .formats import (
    Array,
    FileError,
    Index,
    Memory,
    NpySource,
    Source,
    Target,
    ZarrSource,
    one_line,
    part_name,
    reading,
    size_text,
    writing,
)
from .functional import group_norm
from .moments import Moments
from .parts import Axes, Part, Statistics, entries, normalized
from .plan import FLOATS, Plan, Spec, axes_key, groups_key
from .progress import Progress
from .threads import alone

__all__ = ["FileError", "normalize_file"]

Task = tuple[Callable[[Index], Any], Index]
BLOCK_BYTES = 2 << 20  # of input; stays in the cache of a core
COPIES = 3  # of a block in memory at a time: as read, as computed, as written
AHEAD = 64  # blocks of whole samples whose moments are taken before the first of them is written, at least


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
            return max((elements_of(index) for index in blocks), default=0) * itemsize * copies

        passes = 2 if statistics is None else 1
        blocks = list(self.source.blocks(BLOCK_BYTES, ()))
        if statistics is None and save_stats is None:
            not_batch = [axis for axis in range(len(plan.shape)) if axis not in plan.batch_axes]
            samples = list(self.source.blocks(BLOCK_BYTES, not_batch))
            if largest(samples) <= memory:
                passes, blocks = 1, samples
        needed = largest(blocks)
        if needed > memory:
            missing = size_text(needed - memory)
            raise FileError(f"{self.path}: {missing} more memory are needed: a block of it takes {size_text(needed)}")
        threads = max(1, min(self.threads, memory // max(needed, 1)))
        # a block's calls get no helpers beside other blocks' threads: 4 GB were written in 5.3 s, not 9.2
        self.beside = alone if threads > 1 else nullcontext
        target = self.source.like(self.target, self.dtype)
        with (
            Progress(progress, passes * plan.size * itemsize, "B", size_text) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):
            try:
                if statistics is None and passes == 2:
                    self._two_passes(pool, blocks, target, save_stats, bar)
                else:
                    self._one_pass(pool, blocks, target, statistics, bar)
                target.commit()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nothing is written after it is removed
                target.abandon()
                raise
        return passes

    def _one_pass(
        self, pool: ThreadPoolExecutor, blocks: Sequence[Index], target: Target, known: Statistics | None, bar: Progress
    ) -> None:
        """Write the target, of whole samples or with statistics that are known."""

        def write(index: Index) -> None:
            own = None if known is None else Statistics(*(values[self._batch(index)] for values in known))
            self._write(index, target, own)

        for index, _ in _in_order(pool, ((write, index) for index in blocks)):
            bar.update(elements_of(index) * self.source.dtype.itemsize)

    def _two_passes(
        self, pool: ThreadPoolExecutor, blocks: Sequence[Index], target: Target, save_stats: Any, bar: Progress
    ) -> None:
        """Moments of the blocks of a sample, or of several, then the target's: beside the next ones' moments.

        Statistics that are to be saved are so before the first block is written.
        """
        shape = self.plan.stats_shape
        m = Moments(np.zeros(shape, np.int64), np.full(shape, np.nan), np.zeros(shape))
        whole = Part(np.arange(self.plan.G), np.zeros(shape), np.ones(shape), m)

        def part_of(index: Index) -> Part:
            with self.beside():
                return Part.of(self._read(index), self.labels[index[self.axes.channel]], self.axes)

        def write(index: Index) -> None:
            own = entries(whole, self._batch(index)).statistics(self.plan.eps)
            if self.x_dtype == np.float64:
                own = own.about_the_mean()  # as they are saved: given back they give the same bits
            self._write(index, target, own)

        def tasks() -> Iterator[Task | None]:
            before: Sequence[Index] = []
            for run in [*(self._runs(blocks) if save_stats is None else [blocks]), []]:
                for old, new in zip_longest(before, run):
                    if old is not None:
                        yield write, old
                    if new is not None:
                        yield part_of, new
                yield None  # until these moments are merged
                if save_stats is not None and run:
                    _save(Path(save_stats), whole)
                before = run

        for index, part in _in_order(pool, tasks()):
            if part is not None:
                known = entries(whole, self._batch(index))
                for values, new in zip(_arrays(known), _arrays(known.merge(part)), strict=True):
                    values[...] = new
            bar.update(elements_of(index) * self.source.dtype.itemsize)

    def _batch(self, index: Index) -> Index:
        """A block's samples."""
        return tuple(index[axis] for axis in self.axes.batch)

    def _runs(self, blocks: Sequence[Index]) -> list[list[Index]]:
        """Blocks that follow on each other and hold whole samples together; all, where samples are not one by one."""
        samples = [(key, list(run)) for key, run in groupby(blocks, lambda index: _bounds(self._batch(index)))]
        if len({key for key, _ in samples}) < len(samples):
            return [list(blocks)]
        runs: list[list[Index]] = [[]]
        for _, sample in samples:
            if len(runs[-1]) >= AHEAD:
                runs.append([])
            runs[-1] += sample
        return runs

    def _write(self, index: Index, target: Target, statistics: Statistics | None) -> None:
        """One block of the target."""
        with self.beside():
            y = self._normalized(self._read(index), index, statistics)
        target.write(index, y.astype(self.dtype, copy=False))

    def _normalized(self, x: Array, index: Index, statistics: Statistics | None) -> Array:
        """One block normalized: in its own memory, if the dtype is the same."""
        plan = self.plan
        out = x if x.dtype.name == plan.y_dtype else None
        if statistics is None:
            options = {"eps": plan.eps, "activation": plan.activation, **self.axes.keywords}
            return group_norm(x, self.groups, self.weight, self.bias, out=out, **options)
        channels = index[self.axes.channel]
        weight, bias = (None if v is None else v[channels] for v in (self.weight, self.bias))
        return normalized(x, self.labels[channels], self.axes, statistics, weight, bias, plan.activation, out)

    def _read(self, index: Index) -> Array:
        return self.source.read(index, self.memory).astype(self.x_dtype, copy=False)

    def _load(self, path: Path) -> Statistics:
        """Statistics that were saved."""
        with reading(path):
            try:
                with np.load(path, allow_pickle=False) as saved:
                    fields = {name: saved[name] for name in saved.files}
                    m = Moments(fields["count"], fields["mean"], fields["m2"])
            except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
                raise FileError(f"{path}: not a file of statistics: {one_line(error)}") from None
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


def _arrays(part: Part) -> tuple[Array, ...]:
    return (part.shift, part.unit, *part.moments)


def _save(path: Path, part: Part) -> None:
    """Save moments, complete or not at all."""
    total = part.total()
    with np.errstate(all="ignore"):
        low = (part.shift - total.mean) + part.unit * part.moments.mean
    temporary = part_name(path)
    with writing(path, 0):
        with open(temporary, "wb") as file:
            np.savez(file, count=total.count, mean=total.mean, m2=total.m2, mean_low=low)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _in_order(pool: ThreadPoolExecutor, tasks: Iterable[Task | None]) -> Iterator[tuple[Index, Any]]:
    """Blocks and results in the order of the tasks, with few of them under way at a time, and none after a None."""
    waiting: deque[tuple[Index, Future[Any]]] = deque()
    for task in tasks:
        if task is not None:
            function, index = task
            waiting.append((index, pool.submit(function, index)))
        while len(waiting) > (16 if task is not None else 0):
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _bounds(index: Index) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in index)


def elements_of(index: Index) -> int:
    return math.prod(s.stop - s.start for s in index)
