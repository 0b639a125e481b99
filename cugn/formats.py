"""Arrays in files, read and written by blocks: .npy and Zarr, with the output complete or absent.

A target grows under a temporary name beside its final one and is renamed when it is complete and on the disk.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = Any
Index = tuple[slice, ...]
WRITE_BYTES = 256 << 10  # at a time: 2 GB took 1.65 s of system time, by 2 MB at a time 2.65 s
WRITE_BEHIND = 64 << 20  # bytes that are written before the system is asked to bring them to the disk
_WINDOWS = os.name == "nt"  # where an open file can be neither renamed nor removed


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
        with reading(path), open(path, "rb") as file:
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
                raise FileError(f"{path}: not a .npy file: {one_line(error)}") from None
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
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
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
        self.path, self.part = path, part_name(path)
        self.nbytes = math.prod(source.shape) * dtype.itemsize
        self.turn = threading.Lock()
        self.written = self.sent = 0
        with writing(path, self.nbytes):
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
        with writing(self.path, self.nbytes):
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
        with self.turn, writing(self.path, self.nbytes), open(self.part, "r+b", buffering=0) as file:
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
        with writing(self.path, self.nbytes):
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
        with reading(path):
            try:
                self.array = zarr.open_array(path, mode="r")
            except OSError:
                raise
            except Exception as error:
                raise FileError(f"{path}: not a Zarr array: {one_line(error)}") from None
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
        with reading(self.path):
            values = np.asarray(self.array[index])
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))

    def like(self, path: Path, dtype: np.dtype[Any]) -> ZarrTarget:
        """A new array of this shape, chunks and compression, with the attributes."""
        return ZarrTarget(path, self, dtype)


class ZarrTarget:
    """A Zarr array in the making."""

    def __init__(self, path: Path, source: ZarrSource, dtype: np.dtype[Any]) -> None:
        import zarr

        self.path, self.part, self.nbytes = path, part_name(path), 0
        if path.exists():
            raise FileError(f"{path}: exists already, and a folder cannot be replaced in one step: remove it first")
        with writing(path, 0):
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
        with writing(self.path, self.nbytes):
            self.array[index] = values

    def commit(self) -> None:
        """Bring everything to the disk, then give the folder its name."""
        with writing(self.path, self.nbytes):
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


def _cuts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def part_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None


@contextmanager
def writing(path: Path, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise FileError(f"{path}: no room for {size_text(nbytes)}: {size_text(free)} are free") from None
        raise FileError(f"{path}: cannot be written: {error.strerror or one_line(error)}") from None


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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def size_text(nbytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.3g} {unit}" if unit != "bytes" else f"{nbytes} bytes"
        nbytes /= 1000  # type: ignore[assignment]
    raise AssertionError
