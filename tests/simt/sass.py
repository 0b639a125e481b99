"""What NVIDIA's compiler makes of a kernel, without a driver: registers, spills, local memory, 16-byte accesses.

NVRTC compiles straight to a cubin for each architecture; `cuobjdump` (a wheel as well) says what its kernels use. The
few instructions that are counted are told apart here: NVIDIA's disassembler needs 0.3 to 0.9 s a module, a third of
what NVRTC does. Results are kept on disk by hash, and new ones are made in several processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from . import build

#: Turing, Ampere (data centre and desktop), Ada, Hopper, Blackwell (data centre and desktop).
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

#: What CuPy adds to a RawModule's options.
CUPY_OPTIONS = ("-ftz=true",)

#: From sm_90 on a cubin counts the shared memory that the driver keeps for itself.
RESERVED_SHARED = 1024

#: Instructions that access memory, by the lower nine bits of their 128 (three more tell kinds of operands apart), and
#: bytes of an access by bits 73 to 75, on all ARCHITECTURES: test_simt_sass.py holds them against the disassembler.
OPCODES = {0x181: "LDG", 0x186: "STG", 0x183: "LDL", 0x187: "STL", 0x1AE: "LDGSTS"}
WIDTHS = (1, 1, 2, 2, 4, 8, 16, 32)


class CompileError(RuntimeError):
    """NVRTC refused the source; the message is its log."""


@dataclass(frozen=True)
class Module:
    """A source under one set of options; `label` names it in the table."""

    label: str
    code: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture. Static counts of instructions: loops count once, unrolled ones several times."""

    label: str
    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    local: int
    local_loads: int
    local_stores: int
    wide_loads: int
    wide_stores: int
    instructions: int

    @property
    def spills(self) -> bool:
        """Whether anything lies in local memory: spilled registers, or an array that is indexed at run time."""
        return bool(self.stack or self.local or self.local_loads or self.local_stores)


@cache
def tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: of NVIDIA's wheels, or installed."""
    try:
        import nvidia
    except ImportError:
        return shutil.which(name)
    for folder in nvidia.__path__:
        for found in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(found)
    return shutil.which(name)


def missing_tools() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except ImportError:
        return "CuPy is not installed"
    except Exception as error:  # cupy: RuntimeError, or what the dynamic loader says
        return f"NVRTC cannot be loaded: {error}"
    if tool("cuobjdump") is None:
        return "cuobjdump is not installed (nvidia-cuda-cuobjdump)"
    return None


def cubin(code: str, options: Sequence[str], arch: int) -> bytes:
    """Machine code for `arch`."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, "kern.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, *CUPY_OPTIONS, f"-arch=sm_{arch}"))
        # CuPy drops the last byte, and the tools refuse what is left.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError:
        raise CompileError(f"sm_{arch}: {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def texts(machine_code: bytes) -> dict[str, bytes]:
    """The instructions of each kernel: the sections of an ELF file that are called .text.KERNEL."""
    (table,) = struct.unpack_from("<Q", machine_code, 40)
    _, count, names_at = struct.unpack_from("<3H", machine_code, 58)
    headers = [struct.unpack_from("<2I4Q", machine_code, table + 64 * i) for i in range(count)]
    names = headers[names_at][4]
    found = {}
    for name, _, _, _, offset, size in headers:
        section = machine_code[names + name : machine_code.index(b"\0", names + name)].decode()
        if section.startswith(".text."):
            found[section.removeprefix(".text.")] = machine_code[offset : offset + size]
    return found


def memory_instructions(text: bytes) -> tuple[int, Counter[tuple[str, int]]]:
    """How many instructions there are, and of those of `OPCODES` how many of each width in bytes."""
    words = np.frombuffer(text, "<u8").reshape(-1, 2).astype(np.int64)
    operation, width = words[:, 0] & 0x1FF, words[:, 1] >> 9 & 7
    known = np.isin(operation, list(OPCODES))
    pairs = zip(operation[known].tolist(), width[known].tolist(), strict=True)
    return len(words), Counter((OPCODES[code], WIDTHS[bits]) for code, bits in pairs)


def inspect(label: str, arch: int, machine_code: bytes) -> list[Row]:
    """One row for each kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kern.cubin")
        path.write_bytes(machine_code)
        command = [tool("cuobjdump"), "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = texts(machine_code)
    rows = []
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        found = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", numbers)}
        total, count = memory_instructions(instructions[name])
        rows.append(
            Row(
                label=label,
                kernel=name,
                arch=arch,
                registers=found["REG"],
                # it counts where the kernel has barriers or shared memory at all
                shared=max(0, found["SHARED"] - (RESERVED_SHARED if arch >= 90 else 0)),
                stack=found["STACK"],
                local=found["LOCAL"],
                local_loads=sum(n for (operation, _), n in count.items() if operation == "LDL"),
                local_stores=sum(n for (operation, _), n in count.items() if operation == "STL"),
                wide_loads=count["LDG", 16] + count["LDGSTS", 16],
                wide_stores=count["STG", 16],
                instructions=total,
            )
        )
    return sorted(rows, key=lambda row: row.kernel)


def compile_one(module: Module, arch: int) -> list[Row]:
    """The rows of one module for one architecture, made or taken from the cache."""
    path = build.cache_folder() / f"sass-{_key(module, arch)}.json"
    if not path.exists():
        rows = inspect("", arch, cubin(module.code, module.options, arch))
        build.cached(path.name, lambda aside: aside.write_text(json.dumps([asdict(row) for row in rows])))
    return [Row(**{**values, "label": module.label}) for values in json.loads(path.read_text())]


def compile_pairs(
    pairs: Iterable[tuple[Module, int]],
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """The rows of these modules, each for the architecture beside it; several processes where there is much to do."""
    pairs = list(pairs)
    missing = [pair for pair in pairs if not (build.cache_folder() / f"sass-{_key(*pair)}.json").exists()]
    if len(missing) > 1 and processes != 1:
        # spawn: NVRTC is not made for a fork
        with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
            for done, _ in enumerate(pool.map(compile_one, *zip(*missing, strict=True)), 1):
                if progress is not None:
                    progress(done, len(missing))
    return [row for pair in pairs for row in compile_one(*pair)]


def compile_all(modules: Iterable[Module], architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """The table of all kernels of `modules` for `architectures`."""
    return compile_pairs([(module, arch) for module in modules for arch in architectures])


def _key(module: Module, arch: int) -> str:
    return build.digest(module.code, module.options, CUPY_OPTIONS, arch, _versions(), Path(__file__).read_text())


@cache
def _versions() -> tuple[object, ...]:
    from cupy.cuda import nvrtc

    return nvrtc.getVersion(), tool("cuobjdump")


# ---------------------------------------------------------------- occupancy


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of a multiprocessor share."""

    threads: int
    blocks: int
    shared: int
    shared_of_block: int
    registers: int = 65536


#: CUDA C++ Programming Guide, technical specifications per compute capability.
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 << 10, 64 << 10),
    80: Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}


def blocks_resident(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once; `shared` is static and dynamic memory of one."""
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // 256) * 256  # given out in pieces of 256
    reserved = RESERVED_SHARED if arch >= 80 else 0
    shared_of_block = -(-(shared + reserved) // 128) * 128
    if shared > limits.shared_of_block:
        return 0
    return min(
        limits.threads // (warps * 32),
        limits.blocks,
        # four schedulers, each with a quarter of the registers
        4 * (limits.registers // 4 // registers_of_warp) // warps,
        limits.shared // shared_of_block if shared_of_block else limits.blocks,
    )


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that are resident."""
    warps = -(-threads // 32)
    return blocks_resident(arch, threads, registers, shared) * warps * 32 / MULTIPROCESSORS[arch].threads


def table(rows: Iterable[Row]) -> str:
    """The rows as text."""
    header = ("module", "kernel", "sm", "regs", "shared", "stack", "local", "LDG.128", "STG.128", "instr")
    lines = [
        (
            r.label,
            r.kernel,
            r.arch,
            r.registers,
            r.shared,
            r.stack,
            r.local_loads + r.local_stores,
            r.wide_loads,
            r.wide_stores,
            r.instructions,
        )
        for r in rows
    ]
    widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{c!s:<{w}}" if i < 2 else f"{c!s:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [header, *lines]
    )
