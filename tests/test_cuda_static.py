"""What NVIDIA's compiler makes of the CUDA kernels: no spills, wide accesses, registers within the budget.

No GPU and no driver: NVRTC compiles straight to machine code. A second or more for a kernel under one set of options
and an architecture is too much for all 20,000 of them in every run, so here a covering selection is compiled, some 130:
each kernel with each value of its options (dtypes, activation, mask, vectors, float64, jvp) and for each
architecture, and each value for each architecture in some kernel. CUGN_TESTS=all takes each pair of values, 250;
CUGN_EVERY_KERNEL=1 everything that the engine can build, for all architectures (hours on two cores);
CUGN_EVERY_KERNEL=once that for one each and, where that leaves less than 8 registers, for the others too (three hours).
"""

from __future__ import annotations

import os
import random
from functools import cache
from itertools import combinations, cycle
from typing import Any

import pytest
from covering import covering
from libraries import EVERYTHING
from simt import sass

from cugn.cuda import compile as cuda
from cugn.cuda import config

pytestmark = pytest.mark.skipif(sass.missing_tools() is not None, reason=str(sass.missing_tools()))

#: Kernels that read x (and dy) in whole vectors, and those that write y (or dx) in whole vectors.
READERS = {"forward", "moments", "backward", "backward_sums", "second_sums"}
BOTH = {"apply_statistics", "backward_apply", "second_apply"}
WRITERS = {"forward", "backward"} | BOTH

#: Registers that the launch bounds of box.cuh leave a thread, as few as that; 255 where that is more.
LIMITS = (80, 128, 255)
EVERY = os.environ.get("CUGN_EVERY_KERNEL")
ONCE = EVERY == "once"


Job = tuple[cuda.Specialisation, int]


def covered(job: Job) -> list[tuple[Any, ...]]:
    """What compiling a kernel for an architecture takes off the list of what has to be compiled."""
    s, arch = job
    values = [(name, getattr(s, name)) for name in sorted(cuda.KERNELS[s.kernel][1])]
    pairs = [(s.kernel, *pair) for pair in combinations(values, 2)] if EVERYTHING else []
    return [*pairs, *((s.kernel, value) for value in values), (s.kernel, arch), *((value, arch) for value in values)]


@cache
def jobs() -> list[Job]:
    """What is compiled, and for which architectures."""
    if ONCE:
        return list(zip(cuda.specialisations(), cycle(sass.ARCHITECTURES), strict=False))
    everything = [(s, arch) for s in cuda.specialisations() for arch in sass.ARCHITECTURES]
    return everything if EVERY else covering(everything, covered)


def label(s: cuda.Specialisation) -> str:
    """Name in the table."""
    flags = [name for name in ("masked", "single", "tangent", "double") if getattr(s, name)]
    flags.append(f"{s.vector_channels} a vector")
    return f"{s.x_dtype}->{s.y_dtype} {s.activation or ''} {' '.join(flags)}".replace("  ", " ").strip()


def compiled(wanted: list[Job]) -> list[tuple[cuda.Specialisation, sass.Row]]:
    """Their rows, each with what it is of."""
    modules = {s: sass.Module(label(s), cuda.source(s.file), cuda.options(s)) for s, _ in wanted}
    pairs = [(modules[s], arch) for s, arch in wanted]
    # Several test processes may be at one kernel: each in an order of its own, so that few modules are made twice.
    random.Random(os.getpid()).shuffle(pairs)
    sass.compile_pairs(pairs, processes=1 if "PYTEST_XDIST_WORKER" in os.environ else None)
    return [(s, row) for s, arch in wanted for row in sass.compile_one(modules[s], arch)]


def near_a_limit(row: sass.Row) -> bool:
    """Whether what another architecture needs more may be more than there is."""
    return any(limit - 8 <= row.registers <= limit for limit in LIMITS)


@pytest.fixture(scope="module", params=cuda.KERNELS)
def rows(request: pytest.FixtureRequest) -> list[tuple[cuda.Specialisation, sass.Row]]:
    """The table of a kernel, each row with the module that it comes from."""
    found = compiled([(s, arch) for s, arch in jobs() if s.kernel == request.param])
    if ONCE:
        near = [(s, row.arch) for s, row in found if near_a_limit(row)]
        found += compiled([(s, other) for s, arch in near for other in sass.ARCHITECTURES if other != arch])
    return found


def shown(found: list[sass.Row]) -> str:
    """For the message."""
    return "\n" + sass.table(found[:40])


def test_everything_compiles(rows: list[tuple[cuda.Specialisation, sass.Row]]) -> None:
    """For every architecture (for one, if each is asked for once), the kernel that was asked for and no other."""
    if not ONCE:
        assert {row.arch for _, row in rows} == set(sass.ARCHITECTURES)
    for s, row in rows:
        assert row.kernel == s.kernel
    asked = [job for job in jobs() if job[0].kernel == rows[0][0].kernel]
    assert [(s, row.arch) for s, row in rows][: len(asked)] == asked


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
