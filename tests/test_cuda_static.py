"""What NVIDIA's compiler makes of the CUDA kernels: no spills, wide accesses, registers within the budget.

No GPU and no driver: NVRTC compiles straight to machine code. Two seconds a module and architecture are too many for
all of them in every run, so here each dtype and kernel file meets each architecture, each further option one of them,
and so does every 40th combination of options. CUGN_EVERY_KERNEL=1 compiles everything that the engine can build, for
all architectures (hours on two cores).
"""

from __future__ import annotations

import os
import random

import pytest
from simt import sass

from cugn.cuda import compile as cuda
from cugn.cuda import config

pytestmark = pytest.mark.skipif(sass.missing_tools() is not None, reason=str(sass.missing_tools()))

#: Kernels that read x (and dy) in whole vectors, and those that write y (or dx) in whole vectors.
READERS = {"forward", "moments", "backward", "backward_sums", "second_sums"}
BOTH = {"apply_statistics", "backward_apply", "second_apply"}
WRITERS = {"forward", "backward"} | BOTH


def is_base(s: cuda.Specialisation) -> bool:
    """Floats as they come, without anything added."""
    plain = (s.activation, s.masked, s.vector_channels) == (None, False, 1)
    if s.file == "double_backward":
        return plain
    return s.file == "copy" or (
        plain and not s.tangent and s.x_dtype == s.y_dtype and s.double == (s.x_dtype == "float64")
    )


def distance(s: cuda.Specialisation) -> int:
    """In how many options it differs from the base of its dtype."""
    options = [s.activation is not None, s.masked, s.vector_channels > 1, s.x_dtype != s.y_dtype]
    if s.file != "double_backward":
        options += [s.tangent, s.double != ("float64" in (s.x_dtype, s.y_dtype))]
    return sum(options)


def jobs() -> list[tuple[cuda.Specialisation, int]]:
    """What is compiled, and for which architectures."""
    everything = cuda.specialisations()
    if os.environ.get("CUGN_EVERY_KERNEL"):
        return [(s, arch) for s in everything for arch in sass.ARCHITECTURES]
    base = [s for s in everything if is_base(s)]
    single = [s for s in everything if not is_base(s) and distance(s) == 1]
    several = [s for s in everything if not is_base(s) and distance(s) > 1][::40]
    rotated = [(s, sass.ARCHITECTURES[i % len(sass.ARCHITECTURES)]) for i, s in enumerate([*single, *several])]
    return [(s, arch) for s in base for arch in sass.ARCHITECTURES] + rotated


def label(s: cuda.Specialisation) -> str:
    """Name in the table."""
    flags = [name for name in ("masked", "tangent", "double") if getattr(s, name)]
    flags.append(f"{s.vector_channels} a vector")
    return f"{s.file} {s.x_dtype}->{s.y_dtype} {s.activation or ''} {' '.join(flags)}".replace("  ", " ").strip()


@pytest.fixture(scope="module")
def rows() -> list[tuple[cuda.Specialisation, sass.Row]]:
    """The table, each row with the module that it comes from."""
    wanted = jobs()
    modules = {s: sass.Module(label(s), cuda.source(s.file), cuda.options(s)) for s, _ in wanted}
    pairs = [(modules[s], arch) for s, arch in wanted]
    # Several test processes may be doing this: each in an order of its own, so that few modules are made twice.
    random.Random(os.getpid()).shuffle(pairs)
    sass.compile_pairs(pairs)
    return [(s, row) for s, arch in wanted for row in sass.compile_one(modules[s], arch)]


def shown(found: list[sass.Row]) -> str:
    """For the message."""
    return "\n" + sass.table(found[:40])


def test_everything_compiles(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """For every architecture, each kernel of each file."""
    assert {row.arch for _, row in rows} == set(sass.ARCHITECTURES)
    for s, arch in jobs():
        kernels = {row.kernel for other, row in rows if other == s and row.arch == arch}
        assert kernels == set(cuda.KERNELS[s.file]), (s, arch)


def test_no_spills_and_no_local_memory(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """Everything a thread holds is in registers."""
    spilled = [row for _, row in rows if row.spills]
    assert not spilled, shown(spilled)


def test_registers_allow_the_largest_block(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """The largest block that config.py makes of a kernel has its registers on every architecture."""
    most = {"forward": config.MOST_THREADS}
    over = [row for _, row in rows if row.registers > 65536 // most.get(row.kernel, config.USUAL_THREADS)]
    assert not over, shown(over)


def test_global_accesses_are_16_bytes_wide(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """Where large arrays are read and written there are 16-byte loads and stores."""
    narrow = []
    for s, row in rows:
        reads = row.kernel in READERS or (row.kernel in BOTH and s.x_dtype == s.y_dtype)
        if (reads and row.wide_loads == 0) or (row.kernel in WRITERS and row.wide_stores == 0):
            narrow.append(row)
    assert not narrow, shown(narrow)


def test_shared_memory_is_what_the_launch_asks_for(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """config.py counts dynamic shared memory; static memory would come on top, unseen."""
    static = [row for _, row in rows if row.shared]
    assert not static, shown(static)
