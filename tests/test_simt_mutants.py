"""The mutation engine: what is noticed, what survives, what crashes, what never ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import simt
from simt import mutants
from simt.mutants import Mutant, Verdict

SOURCE = "a = 1;\nvoid f() { b = 1; }\nvoid g() { b = 1; }\n"


def test_the_first_text_behind_the_anchor_is_changed():
    assert mutants.applied(Mutant("m", "f", "", "1", "2", ""), SOURCE) == SOURCE.replace("a = 1", "a = 2")
    assert mutants.applied(Mutant("m", "f", "void g", "b = 1;", "", ""), SOURCE).endswith("void g() {  }\n")
    for after, old, new in (("void h", "1", "2"), ("void g", "c = 1", ""), ("", "1", "1")):
        with pytest.raises(LookupError):
            mutants.applied(Mutant("m", "f", after, old, new, ""), SOURCE)


def test_the_likely_check_goes_first_and_the_first_failure_counts():
    asked = []

    def check(name: str, error: Exception | None) -> None:
        asked.append(name)
        if error is not None:
            raise error

    fault = simt.SimtFault("k", [simt.Fault("race-shared", "here")])
    checks = {
        "a": lambda: check("a", None),
        "b": lambda: check("b", None),
        "c": lambda: check("c", fault),
        "d": lambda: check("d", AssertionError("3 times the bound")),
    }
    verdict = mutants.killer_of(Mutant("m", "", "", "", "", by="b"), checks)
    assert asked == ["b", "a", "c"]
    assert (verdict.check, verdict.how) == ("c", "race-shared")
    assert mutants.killer_of(Mutant("m", "", "", "", "", by="d"), checks).how == "AssertionError: 3 times the bound"
    assert mutants.killer_of(Mutant("m", "", "", "", "", by=""), {"a": checks["a"]}).check == ""


def test_what_does_not_compile_proves_nothing():
    def broken() -> None:
        raise simt.BuildError("expected ';'")

    with pytest.raises(simt.BuildError):
        mutants.killer_of(Mutant("m", "", "", "", "", ""), {"a": broken})


CHILD = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from simt import mutants

def verdict(mutant):
    if mutant.name == "crashes": os.kill(os.getpid(), signal.SIGSEGV)
    if mutant.name == "hangs": time.sleep(60)
    if mutant.name == "wrong test": raise ValueError("the checks are broken")
    return mutants.Verdict(mutant.name, "" if mutant.name == "survives" else "values", "", 0.0)

names = ["survives", "killed", "crashes", "hangs", "wrong test", "also killed"]
mutants.work(sys.argv[2:], [mutants.Mutant(n, "", "", "", "", "") for n in names], verdict)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_children_that_crash_or_hang(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = (sys.executable, str(script), str(Path(__file__).parent))
    monkeypatch.setattr(mutants, "PATIENCE", 4.0)
    names = ["survives", "crashes", "killed", "hangs", "also killed"]
    seen: list[Verdict] = []
    found = mutants.run(command, names, processes, progress=seen.append)
    assert [v.mutant for v in found] == names
    assert [v.check for v in found] == ["", "process", "values", "process", "values"]
    assert sorted(v.mutant for v in seen) == sorted(names)
    assert "SURVIVED" in mutants.line_of(found[0])
    with pytest.raises(RuntimeError, match="the checks are broken"):
        mutants.run(command, ["killed", "wrong test"], processes)
