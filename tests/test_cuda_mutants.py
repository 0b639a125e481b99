"""Every planted change of the CUDA kernels is noticed: by a value, a fault, or what is read and written.

The list and the checks are in cuda_mutants.py, which can be run by itself. A change that no longer fits the source
fails here as well: move it along with the kernel.
"""

from __future__ import annotations

import pytest
from cuda_mutants import CHECKS, COMMAND, MUTANTS
from cuda_on_cpu import NEEDED
from libraries import subprocess_environment
from simt import mutants

from cugn.cuda import compile as cuda

pytestmark = [NEEDED, pytest.mark.mutants]


# So many share a process: it takes seconds to start, and each process that runs tests should have some.
BATCH = 12
BATCHES = [MUTANTS[i : i + BATCH] for i in range(0, len(MUTANTS), BATCH)]


def test_there_are_enough() -> None:
    """At least forty, none twice, in every file of kernels that computes something."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.file for mutant in MUTANTS} >= {*cuda.HEADERS, "forward.cu", "backward.cu", "double_backward.cu"}


@pytest.mark.parametrize("check", CHECKS)
def test_the_unchanged_kernels_pass(check: str) -> None:
    """Or a check would kill anything."""
    CHECKS[check]()


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"{batch[0].name} ... {batch[-1].name}")
def test_each_is_noticed(batch: list[mutants.Mutant]) -> None:
    """By at least one check."""
    names = [mutant.name for mutant in batch]
    verdicts = mutants.run(COMMAND, names, processes=1, environment=subprocess_environment())
    assert [v.mutant for v in verdicts] == names
    survivors = [v.mutant for v in verdicts if not v.check]
    assert not survivors
