"""Every planted change of the CUDA kernels is noticed: by a value, a fault, or what is read and written.

The list and the checks are in cuda_mutants.py, which can be run by itself. A change that no longer fits the source
fails here as well: move it along with the kernel.
"""

from __future__ import annotations

from functools import cache

import pytest
from cuda_mutants import CHECKS, COMMAND, MUTANTS
from cuda_on_cpu import NEEDED
from libraries import subprocess_environment
from simt import mutants

from cugn.cuda import compile as cuda

pytestmark = [NEEDED, pytest.mark.mutants]


@cache
def verdicts() -> dict[str, mutants.Verdict]:
    """Of all mutants, found in as many processes as there are processors."""
    names = [mutant.name for mutant in MUTANTS]
    return {v.mutant: v for v in mutants.run(COMMAND, names, environment=subprocess_environment())}


def test_there_are_enough() -> None:
    """At least forty, none twice, in every file of kernels that computes something."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.file for mutant in MUTANTS} >= {*cuda.HEADERS, "forward.cu", "backward.cu", "double_backward.cu"}


@pytest.mark.parametrize("check", CHECKS)
def test_the_unchanged_kernels_pass(check: str) -> None:
    """Or a check would kill anything."""
    CHECKS[check]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_noticed(mutant: mutants.Mutant) -> None:
    """Each by at least one check."""
    verdict = verdicts()[mutant.name]
    assert verdict.check, f"{mutant.name} survives all checks"
