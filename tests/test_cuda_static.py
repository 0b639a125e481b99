"""What NVIDIA's compiler makes of the CUDA kernels: no spills, wide accesses, registers within the budget.

No GPU and no driver: NVRTC compiles straight to machine code. A second for a kernel under one set of options and an
architecture is too much for all of them in every run, so here each kernel for each dtype meets each architecture, each
further option one of them, and so does every 40th combination of options. CUGN_EVERY_KERNEL=1 compiles everything that
the engine can build, for all architectures (hours on two cores); CUGN_EVERY_KERNEL=once for one each (an hour).
"""

from __future__ import annotations

import os
import random

import pytest
from simt import sass

from cugn.cuda import compile as cuda
from cugn.cuda import config
from cugn.plan import INTEGERS

pytestmark = pytest.mark.skipif(sass.missing_tools() is not None, reason=str(sass.missing_tools()))

#: Kernels that read x (and dy) in whole vectors, and those that write y (or dx) in whole vectors.
READERS = {"forward", "moments", "backward", "backward_sums", "second_sums"}
BOTH = {"apply_statistics", "backward_apply", "second_apply"}
WRITERS = {"forward", "backward"} | BOTH


def distance(s: cuda.Specialisation) -> int:
    """In how many options it differs from floats as they come, without anything added."""
    natural = s.file == "double_backward" or "float64" in (s.x_dtype, s.y_dtype)
    added = [s.activation is not None, s.masked, s.vector_channels > 1, s.x_dtype in INTEGERS]
    return sum([*added, s.tangent, s.single, s.double != natural])


def jobs() -> list[tuple[cuda.Specialisation, int]]:
    """What is compiled, and for which architectures."""
    everything = cuda.specialisations()
    wanted = os.environ.get("CUGN_EVERY_KERNEL")
    if wanted and wanted != "once":
        return [(s, arch) for s in everything for arch in sass.ARCHITECTURES]
    base = [s for s in everything if distance(s) == 0]
    single = [s for s in everything if distance(s) == 1]
    several = [s for s in everything if distance(s) > 1]
    rotated = [*single, *(several if wanted else several[::40])]
    return [(s, arch) for s in base for arch in sass.ARCHITECTURES] + [
        (s, sass.ARCHITECTURES[i % len(sass.ARCHITECTURES)]) for i, s in enumerate(rotated)
    ]


def label(s: cuda.Specialisation) -> str:
    """Name in the table."""
    flags = [name for name in ("masked", "single", "tangent", "double") if getattr(s, name)]
    flags.append(f"{s.vector_channels} a vector")
    return f"{s.x_dtype}->{s.y_dtype} {s.activation or ''} {' '.join(flags)}".replace("  ", " ").strip()


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
    """For every architecture, each kernel."""
    assert {s.kernel for s, _ in rows} == set(cuda.KERNELS)
    assert {row.arch for _, row in rows} == set(sass.ARCHITECTURES)
    for s, arch in jobs():
        assert [row.kernel for other, row in rows if (other, row.arch) == (s, arch)] == [s.kernel], (s, arch)


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
