"""Mutation testing of kernels: change one thing in the source, and see that some check notices.

`Mutant` is a change, `applied` makes it, `killer_of` looks for the check that notices it, and `run` does so for many
mutants in child processes: a mutant may crash its process (killed) or never end (killed as well).
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .build import BuildError
from .faults import SimtFault

#: Seconds that one mutant may take, builds included; ten times what it needs on an idle machine.
PATIENCE = 120.0


class Mutant(NamedTuple):
    """In `file`, the first `old` behind `after` becomes `new`. `by` names the check that is likely to notice."""

    name: str
    file: str
    after: str
    old: str
    new: str
    by: str


class Verdict(NamedTuple):
    """Which check noticed a mutant, and by what; `check` is empty for a mutant that survived."""

    mutant: str
    check: str
    how: str
    seconds: float


def applied(mutant: Mutant, text: str) -> str:
    """The changed source of `mutant.file`."""
    start = text.find(mutant.after)
    at = text.find(mutant.old, start)
    if start < 0 or at < 0:
        raise LookupError(f"{mutant.name}: {mutant.old!r} behind {mutant.after!r} is no longer in {mutant.file}")
    if mutant.old == mutant.new:
        raise LookupError(f"{mutant.name} changes nothing")
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def killer_of(mutant: Mutant, checks: Mapping[str, Callable[[], None]]) -> Verdict:
    """Run the checks, the likely one first, until one of them fails."""
    start = time.monotonic()
    for name in sorted(checks, key=lambda check: check != mutant.by):
        try:
            checks[name]()
        except SimtFault as fault:
            return Verdict(mutant.name, name, fault.faults[0].kind, time.monotonic() - start)
        except BuildError:
            raise  # a mutant that is no C++ proves nothing
        except Exception as error:
            return Verdict(mutant.name, name, f"{type(error).__name__}: {str(error)[:60]}", time.monotonic() - start)
    return Verdict(mutant.name, "", "", time.monotonic() - start)


def run(
    command: Sequence[str],
    names: Sequence[str],
    processes: int | None = None,
    progress: Callable[[Verdict], object] = lambda verdict: None,
    environment: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """Verdicts on `names`. Each process runs ``command name name ...`` and writes one JSON line for each of them."""
    waiting = list(names)
    verdicts: dict[str, Verdict] = {}

    def record(verdict: Verdict) -> None:
        verdicts[verdict.mutant] = verdict
        progress(verdict)

    children: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:

        def start(share: list[str]) -> None:
            child = _Child(command, share, environment)
            children[child.output.fileno()] = child
            selector.register(child.output, selectors.EVENT_READ)

        count = min(processes or os.cpu_count() or 1, len(waiting))
        for i in range(count):
            start(waiting[i::count])
        while children:
            for key, _ in selector.select(timeout=1):
                child = children[key.fd]
                line = child.output.readline()
                if line:
                    verdict = Verdict(*json.loads(line))
                    record(verdict)
                    child.done(verdict.mutant)
                    continue
                # the end: all done, or it died of the mutant at hand
                selector.unregister(child.output)
                del children[key.fd]
                code, errors = child.close()
                if child.share:
                    if code > 0:  # an exception, no signal: the checks are wrong, not the mutant
                        for other in children.values():
                            other.process.kill()
                            other.close()
                        raise RuntimeError(errors)
                    name = child.share.pop(0)
                    record(Verdict(name, "process", f"ended with {code}", time.monotonic() - child.since))
                    if child.share:
                        start(child.share)
            for child in children.values():
                if time.monotonic() - child.since > PATIENCE:
                    child.process.kill()
    return [verdicts[name] for name in names]


class _Child:
    """A process at work on its share of the mutants."""

    def __init__(self, command: Sequence[str], share: list[str], environment: Mapping[str, str] | None) -> None:
        self.share = list(share)
        self.since = time.monotonic()
        # no pipe: one that nobody reads fills up; closed by close()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *share], stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def done(self, name: str) -> None:
        """A verdict has arrived."""
        self.share.remove(name)
        self.since = time.monotonic()

    def close(self) -> tuple[int, str]:
        """Its status (negative: the signal that ended it), and what it complained of."""
        code = self.process.wait()
        self.output.close()
        self._errors.seek(0)
        errors = self._errors.read()
        self._errors.close()
        return code, errors


def work(names: Sequence[str], mutants: Sequence[Mutant], verdict: Callable[[Mutant], Verdict]) -> None:
    """The child's side of `run`."""
    by_name = {mutant.name: mutant for mutant in mutants}
    for name in names:
        print(json.dumps(verdict(by_name[name])), flush=True)


def line_of(v: Verdict) -> str:
    """A verdict as text."""
    return f"{'killed  ' if v.check else 'SURVIVED'}  {v.seconds:5.1f} s  {v.mutant:<50}  {v.check}: {v.how}"


def main(command: Sequence[str], names: Sequence[str]) -> None:
    """Print the verdicts as they come; status 1 where a mutant survived."""
    verdicts = run(command, names, progress=lambda verdict: print(line_of(verdict), flush=True))
    survivors = [v.mutant for v in verdicts if not v.check]
    print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} killed", *survivors, sep="\n")
    sys.exit(1 if survivors else 0)
