"""``python -m cugn.cuda``: registers, shared memory, occupancy and modelled time of the kernels, without a GPU."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config
from .compile import Specialisation, options, source
from .config import Box, Device, Problem

ARCHITECTURES = {  # KB of shared memory that a block may opt in to, KB of a multiprocessor, its threads
    75: (64, 64, 1024),
    80: (163, 164, 2048),
    86: (99, 100, 1536),
    89: (99, 100, 1536),
    90: (227, 228, 2048),
    100: (227, 228, 2048),
    120: (99, 100, 1536),
}

SHAPES = (  # N, C, S, G, whether channels are last
    (64, 256, 1, 32, False),
    (8, 1024, 196, 32, False),
    (8, 320, 4096, 32, False),
    (8, 320, 4096, 32, True),
    (1, 128, 512 * 512, 32, False),
    (1, 128, 512 * 512, 32, True),
)


@dataclass(frozen=True)
class Usage:
    """What the compiler gave a kernel."""

    registers: int
    local_bytes: int


def compiled(specialisation: Specialisation, architecture: int) -> bytes:
    """Machine code of a module; neither a GPU nor a driver is needed."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source(specialisation.file), f"{specialisation.file}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options(specialisation), "-ftz=true", f"-arch=sm_{architecture}"))
        return bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy drops the last byte
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def usage(code: bytes) -> Usage:
    """Registers and local memory of a module's kernel, by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        shown = subprocess.run(
            [cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    values = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", shown.split("Function", 1)[1])}
    return Usage(values["REG"], values["STACK"] + values["LOCAL"])


def cuobjdump() -> str:
    """Path of cuobjdump: on the PATH, or of the package nvidia-cuda-cuobjdump."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/cuobjdump"
    found = shutil.which("cuobjdump") or (str(packaged) if packaged.exists() else None)
    if found is None:
        raise FileNotFoundError("cuobjdump is needed: pip install nvidia-cuda-cuobjdump")
    return found


def blocks_per_multiprocessor(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    _, shared_kb, most_threads = ARCHITECTURES[architecture]
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (warp_registers * (threads // 32))
    by_shared = (shared_kb << 10) // (shared + config.RESERVED_SHARED)
    return min(by_registers, by_shared, most_threads // threads, 32 if architecture in (80, 90, 100) else 16)


def launches(problem: Problem, device: Device) -> list[tuple[str, Box, int, float]]:
    """(kernel, box, shared memory, bytes of global memory for each element) of a call, merges left out."""
    p, item = problem, problem.itemsize
    resident = config.resident_box(p, device)
    if p.arrays == 2:
        if resident is not None:
            return [("backward", resident, config.backward_bytes(resident, p), 3 * item)]
        box = config.split_box(p, device)
        again = config.apply_box(p, box)
        return [
            ("backward_sums", box, config.backward_sums_bytes(box, p), 2 * item),
            ("backward_apply", again, config.backward_apply_bytes(again, p), 3 * item),
        ]
    if resident is not None:
        return [("forward", resident, config.forward_bytes(resident, p), 2 * item)]
    box = config.split_box(p, device)
    again = config.apply_box(p, box)
    return [
        ("moments", box, config.moments_bytes(box, p), item),
        ("apply_statistics", again, config.apply_bytes(again, p), 2 * item),
    ]


def problem_of(N: int, C: int, S: int, G: int, last: bool, dtype: str, arrays: int) -> Problem:
    """A contiguous call."""
    itemsize = config.ITEMSIZE[dtype]
    outer, inner = (S, 1) if last else (1, S)
    return Problem(
        N=N,
        outer=outer,
        C=C,
        inner=inner,
        unit=C // G,
        itemsize=itemsize,
        real=8 if dtype == "float64" else 4,
        tangent=False,
        arrays=arrays,
        masked=False,
        heavy=False,
        contiguous_rows=True,
        contiguous_samples=True,
        aligned_rows=C * inner * itemsize % config.SECTOR == 0,
        aligned=True,
    )


def table(architectures: list[int], dtypes: list[str], bandwidth: float) -> list[dict[str, Any]]:
    """A row for each kernel that these shapes launch."""
    rows = []
    for architecture in architectures:
        device = Device(ARCHITECTURES[architecture][0] << 10)
        found: dict[Specialisation, Usage] = {}
        for dtype in dtypes:
            for *sizes, last in SHAPES:
                for arrays in (1, 2):
                    N, C, S, G = sizes
                    problem = problem_of(N, C, S, G, last, dtype, arrays)
                    same = 1 if problem.inner % (16 // problem.itemsize) == 0 else 2 if problem.inner > 1 else 16
                    for name, box, shared, bytes_each in launches(problem, device):
                        given = {"x_dtype": dtype, "y_dtype": dtype, "double": dtype == "float64"}
                        module = Specialisation.of(name, **given, vector_channels=same, single=problem.single)
                        if module not in found:
                            found[module] = usage(compiled(module, architecture))
                        kernel = found[module]
                        blocks = blocks_per_multiprocessor(architecture, box.threads, kernel.registers, shared)
                        rows.append(
                            {
                                "kernel": name,
                                "architecture": f"sm_{architecture}",
                                "dtype": dtype,
                                "N, C, S, G": f"{N}, {C}, {S}, {G} {'last' if last else 'first'}",
                                "blocks": box.tiles,
                                "threads": box.threads,
                                "registers": kernel.registers,
                                "local bytes": kernel.local_bytes,
                                "shared KB": round(shared / 1024, 1),
                                "occupancy": f"{blocks * box.threads / ARCHITECTURES[architecture][2]:.0%}",
                                "bytes/element": bytes_each,
                                "modelled us": round(N * C * S * bytes_each / bandwidth / 1e3, 1),
                            }
                        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m cugn.cuda", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[90], choices=sorted(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="*", default=["float32", "float16"], choices=sorted(config.ITEMSIZE))
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="of the memory, in GB/s (H100 SXM: 3350)")
    arguments = parser.parse_args()
    rows = table(arguments.arch, arguments.dtype, arguments.bandwidth)
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    print(f"Times are modelled, not measured: bytes / ({arguments.bandwidth:g} GB/s), as if nothing else waited.")


if __name__ == "__main__":
    main()
