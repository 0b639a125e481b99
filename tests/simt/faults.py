"""What the emulator says when a kernel is wrong."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Every kind of fault, and what it means.
KINDS = {
    "race-shared": "two threads of a block, one writing, with no barrier between them",
    "race-global": "the same in global memory",
    "race-blocks": "two blocks, one writing, not ordered by fence, atomic, fence",
    "out-of-bounds": "an access outside every argument, or behind the launch's dynamic shared memory",
    "misaligned": "an access whose address is no multiple of its width",
    "uninitialised-shared": "a load from shared memory that the block has not written",
    "uninitialised-global": "a load from memory that nobody has written since it was allocated",
    "const-write": "a store through a pointer to const",
    "wild": "a store to a variable at file scope",
    "divergent-barrier": "threads of a block at different barriers, or gone",
    "bad-mask": "a shuffle whose mask lacks the calling lane or the lane that it reads",
    "deadlock": "lanes of a warp that wait for each other",
    "runaway": "a loop that does not end",
    "trap": "__trap()",
    "argument": "arguments that the kernel's parameters do not take",
    "launch": "a grid, block or shared memory size that the device refuses",
    "guard": "fast mode: bytes beside an allocation have been overwritten",
}


@dataclass(frozen=True)
class Fault:
    """One kind of mistake at one place of the source."""

    kind: str
    message: str
    file: str = ""
    line: int = 0
    source: str = ""
    block: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    count: int = 1

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.line else ""
        who = f" [block {self.block}, thread {self.thread}]" if self.block is not None else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        source = f"\n    {self.source.strip()}" if self.source else ""
        return f"{place}{self.kind}: {self.message}{who}{times}{source}"


class SimtFault(RuntimeError):
    """A launch that would be wrong on a device. `faults` has one entry for each kind and place, first come first."""

    def __init__(self, kernel: str, faults: list[Fault]) -> None:
        self.kernel = kernel
        self.faults = faults
        super().__init__(f"{kernel}\n" + "\n".join(map(str, faults)))

    @property
    def kinds(self) -> set[str]:
        """The kinds of all faults."""
        return {fault.kind for fault in self.faults}


class SourceLines:
    """The lines of a kernel source by (file, line), following its #line directives."""

    def __init__(self, code: str) -> None:
        self.text: dict[tuple[str, int], str] = {}
        file, line = "kern.cu", 1
        for text in code.split("\n"):
            directive = re.match(r'\s*#\s*(?:line\s+)?(\d+)(?:\s+"([^"]*)")?\s*$', text)
            if directive:
                line = int(directive[1])
                file = Path(directive[2]).name if directive[2] else file
                continue
            self.text[file, line] = text
            line += 1

    def of_barrier(self, line: int) -> str:
        """The file that has a barrier, shuffle or vote in `line`, of which the runtime knows only the number."""
        for (file, n), text in self.text.items():
            if n == line and re.search(r"__(sync|shfl|ballot|any|all|trap)", text):
                return file
        return "kern.cu"


def locate(library: Path, offsets: list[int]) -> Iterator[tuple[str, int, str]]:
    """(file, line, how it was reached) of program counters: the innermost inlined function that is the kernel's own."""
    if not offsets:
        return
    # a return address is behind its call: one byte back is inside it
    command = ["addr2line", "-a", "-i", "-f", "-s", "-C", "-e", str(library), *(hex(offset - 1) for offset in offsets)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^0x[0-9a-f]+\n", output, flags=re.MULTILINE)[1:]:
        lines = part.strip().split("\n")
        frames = [
            (function, *place.split(" ")[0].rsplit(":", 1))
            for function, place in zip(lines[::2], lines[1::2], strict=True)
        ]
        own = [
            (f, file, int(n)) for f, file, n in frames if file not in ("device.h", "simt-tail", "??") and n.isdigit()
        ]
        if not own:
            yield "", 0, ""
            continue
        function, file, line = own[0]
        callers = "".join(f", called from {f}:{n}" for _, f, n in own[1:])
        yield file, line, f"in {function.split('(')[0]}{callers}"
