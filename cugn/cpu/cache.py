"""Compiled kernels on disk: one file each, in a folder of the user's own, or none at all.

Numba's own cache stamps a kernel with the file that it is defined in, raises from the call when a file is truncated
or the folder cannot be written, and unpickles whatever it finds. Here the name of an entry is a hash of everything
that went into it (all sources of the engine, versions, CPU, options), an entry is used only if its digest is right
and the folder is writable by nobody else, and whatever goes wrong means: compile.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ask_for", "folder", "load", "save"]

LOADING_BYTES = 32 << 20
IMPORTING_BYTES = 180 << 20
"""Address space that Numba takes at least: 200 MB for 0.61, 260 MB for 0.68. With 120 MB, glibc ended the process."""
_DIGEST_BYTES = 32


@cache
def folder() -> Path | None:
    """Folder of the entries: CUGN_CACHE_DIR, else the user's cache folder; None where there is none to be trusted."""
    given = os.environ.get("CUGN_CACHE_DIR")
    if given:
        path = Path(given)
    elif sys.platform == "win32":
        path = Path(os.environ.get("LOCALAPPDATA", "~")) / "cugn" / "cache"
    elif sys.platform == "darwin":
        path = Path("~/Library/Caches/cugn")
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cugn"
    try:
        path = path.expanduser()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError):
        return None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return None  # somebody else could put an entry there, and entries are pickles
    return path


@cache
def _environment() -> bytes:
    """Hash of what all kernels depend on."""
    import llvmlite
    import numba
    from llvmlite import binding

    digest = hashlib.sha256()
    sources = Path(__file__).parent
    for source in [*sorted(sources.glob("*.py")), sources.parent / "threads.py"]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    facts = (
        numba.__version__,
        llvmlite.__version__,
        sys.version,
        binding.get_default_triple(),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
        os.environ.get("CUGN_F16C", "1"),
        *sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_")),
    )
    digest.update(repr(facts).encode())
    return digest.digest()


def _path(name: str) -> Path | None:
    place = folder()
    if place is None:
        return None
    return place / (hashlib.sha256(_environment() + name.encode()).hexdigest()[:40] + ".kernel")


def load(name: str) -> Any:
    """Numba's result of compiling the kernel of this name, or None."""
    if "numba" not in sys.modules:
        ask_for(IMPORTING_BYTES)
    path = _path(name)
    if path is None:
        return None
    try:
        data = path.read_bytes()
        digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        from numba.core import compiler
        from numba.core.registry import cpu_target

        context, parts = cpu_target.target_context, pickle.loads(payload)
        ask_for(LOADING_BYTES)  # now that Numba, which takes most of what there is, has been imported
        result = compiler.CompileResult._rebuild(context, *parts)
    except Exception:  # an entry that cannot be used, whatever the reason, is one that is not there
        return None
    return result


def ask_for(size: int) -> None:
    """Raise MemoryError where LLVM, which ends the process if it gets no memory, might not get enough."""
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        raise MemoryError(f"a kernel needs {size >> 20} MB to be loaded or made, which are not to be had") from None


def save(name: str, result: Any) -> bool:
    """Keep a compiled kernel; silently not, where that cannot be done. Whether it was."""
    path = _path(name)
    if path is None:
        return False
    from numba.core import serialize

    temporary = None
    try:
        payload = serialize.dumps(result._reduce())
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        Path(temporary).replace(path)  # whole or not at all, for every other process
        return True
    except Exception:  # a full disk, a folder that went away, a Numba without this inner function: no entry
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
