"""Builds: the runtime once, each kernel source once for every (options, mode), kept on disk by hash."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
DEVICE_HEADER = RUNTIME / "device.h"
CXX = os.environ.get("CXX", "g++")

#: Room for dynamic shared memory in every module: what a block may have on sm_90 and sm_100.
DYNAMIC_SHARED_ROOM = 232448

#: Seen by the kernel's preprocessor, as under NVRTC.
DEVICE_MACROS = ("-D__CUDACC_RTC__=1", "-D__CUDA_ARCH__=900")


class BuildError(RuntimeError):
    """g++ refused the source; the message holds what it said."""


def missing_tools() -> str | None:
    """Why nothing can be built here, or None."""
    for tool in (CXX, "addr2line"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def cache_folder() -> Path:
    """Where builds are kept: SIMT_CACHE, else a folder of this user's among the temporary files."""
    folder = Path(os.environ.get("SIMT_CACHE") or Path(tempfile.gettempdir()) / f"cugn-simt-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def digest(*parts: object) -> str:
    """Name of a build in the cache."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def compile_with(arguments: Sequence[str]) -> None:
    """Run the compiler, or raise what it said."""
    done = subprocess.run([CXX, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{CXX} {' '.join(arguments)}\n{done.stderr}")


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The file `name` of the cache, made where it is missing: written aside, then renamed, so safe among processes."""
    path = cache_folder() / name
    if not path.exists():
        aside = path.with_name(f"{os.getpid()}-{threading.get_ident()}-{path.name}")
        make(aside)
        aside.replace(path)
    return path


# ---------------------------------------------------------------- the runtime


@functools.cache
def runtime_library() -> Path:
    """The shared library that all kernels of the process link to."""
    sources = sorted(RUNTIME.glob("*.cpp"))
    flags = [
        "-std=c++17",
        "-O2",
        "-march=native",
        "-fPIC",
        "-shared",
        *os.environ.get("SIMT_RUNTIME_FLAGS", "").split(),
    ]
    key = digest(CXX, flags, [path.read_text() for path in sorted(RUNTIME.iterdir()) if path.is_file()])

    def make(path: Path) -> None:
        # The name inside the library is what kernels look for at run time: the one that it will be renamed to.
        compile_with([*flags, f"-Wl,-soname,libsimt-{key}.so", *map(str, sources), "-o", str(path)])

    return cached(f"libsimt-{key}.so", make)


# ---------------------------------------------------------------- what is in a source


@dataclass(frozen=True)
class KernelDeclaration:
    """A `__global__` function as the source declares it."""

    name: str
    parameters: tuple[str, ...]
    launch_bounds: str
    is_template: bool


def _balanced(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise BuildError("unbalanced parentheses in a kernel's declaration")


def _parameter_names(text: str) -> tuple[str, ...]:
    names = []
    depth = 0
    start = 0
    for i, c in enumerate(text + ","):
        depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(c, 0)
        if c == "," and depth == 0:
            words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\[[^\]]*\]|=.*", "", text[start:i]))
            if words and words != ["void"]:
                names.append(words[-1])
            start = i + 1
    return tuple(names)


def kernel_declarations(preprocessed: str) -> list[KernelDeclaration]:
    """Find the kernels of a source whose own macros have been expanded."""
    found = []
    for match in re.finditer(r"\b__global__\b", preprocessed):
        before = preprocessed[max(preprocessed.rfind(c, 0, match.start()) for c in ";{}") + 1 : match.start()]
        position = match.end()
        bounds = re.search(r"__launch_bounds__\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)", before)
        launch_bounds = bounds[1] if bounds else ""
        while True:
            call = re.compile(r"([A-Za-z_]\w*)\s*\(").search(preprocessed, position)
            if call is None:
                raise BuildError("__global__ without a function")
            end = _balanced(preprocessed, call.end() - 1)
            inside = preprocessed[call.end() : end - 1]
            position = end
            if call[1] == "__launch_bounds__":
                launch_bounds = inside
            elif not call[1].startswith("__") and call[1] != "alignas":
                break
        found.append(KernelDeclaration(call[1], _parameter_names(inside), launch_bounds, "template" in before))
    return list({declaration.name: declaration for declaration in found}.values())


def preprocessor_options(options: Sequence[str]) -> tuple[str, ...]:
    """Of the options meant for NVRTC, those that mean the same to g++."""
    kept = []
    for option in options:
        if option.startswith(("--define-macro=", "--undefine-macro=", "--include-path=")):
            name, value = option.split("=", 1)
            option = {"--d": "-D", "--u": "-U", "--i": "-I"}[name[:3]] + value
        if option.startswith(("-D", "-U", "-I")):
            kept.append(option)
    return tuple(kept)


def standard_of(options: Sequence[str]) -> str:
    """The C++ standard asked for; C++14 is CuPy's choice where none is."""
    for option in options:
        match = re.fullmatch(r"--?std=(?:c|gnu)\+\+(\d\d)", option)
        if match:
            return f"-std=c++{match[1]}"
    return "-std=c++14"


# ---------------------------------------------------------------- inline PTX

#: The instructions that kernels may use, and their stand-ins in device.h: one register in, one out; or only inputs.
PTX = {
    "cvt.f32.f16 %0, %1;": "simt::float_of_half",
    "cvt.rn.f16.f32 %0, %1;": "simt::half_of_float",
    "cvt.f64.f32 %0, %1;": "simt::double_of_float",
    "cvt.rn.f32.f64 %0, %1;": "simt::float_of_double",
    "cp.async.cg.shared.global [%0], [%1], 16;": "simt::copy_async",
    "cp.async.wait_all;": "simt::copies_arrived",
}


def without_ptx(code: str) -> str:
    """Each `asm` statement that is known here, as a call; g++ refuses the others. Lines stay where they are."""

    def call(match: re.Match[str]) -> str:
        instruction, outputs, inputs = match.groups()
        function = PTX.get(" ".join(instruction.split()))
        operand = r'"=?\w"\s*\((\w+)\)'
        result, arguments = re.findall(operand, outputs), re.findall(operand, inputs)
        called = f"{function}({', '.join(arguments)})"
        return match[0] if function is None else f"({result[0]} = {called})" if result else called

    return re.sub(
        r'\basm(?:\s+volatile)?\s*\(\s*"([^"]*)"\s*:([^:;]*):([^:;]*?)(?::\s*"memory"\s*)?\)(?=;)', call, code
    )


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True)
class KernelLibrary:
    """A built source: the library, and what module.py has to know of its kernels, by name or name expression."""

    path: Path
    kernels: dict[str, KernelDeclaration]
    index: dict[str, int]


#: check: -O1 keeps one access in the source one access in the program (-O2 merges neighbouring ones, scalar replacement
#: of aggregates splits a float4 into four). Uninitialised locals become a pattern that shows. fast: -O2 takes a third
#: more of g++'s time than a test gets back, but without it nothing is contracted.
MODE_FLAGS = {
    "check": ("-O1", "-g1", "-gdwarf-4", "-fno-tree-sra", "-fsanitize=thread", "-ffp-contract=off"),
    "fast": ("-O1", "-march=native", "-ffp-contract=off"),
    "fast-contract": ("-O2", "-march=native", "-mfma", "-ffp-contract=fast"),
}
COMMON_FLAGS = (
    "-w",
    "-fno-var-tracking",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",
    "-ftrivial-auto-var-init=pattern",
    # Statics of inline functions would be one object in the whole process: two modules, one __shared__ array.
    "-fno-gnu-unique",
)


def _precompiled_header(flags: tuple[str, ...]) -> Path:
    """device.h compiled for these flags: half of a small kernel's build time otherwise."""
    folder = cache_folder() / f"header-{digest(CXX, flags, DEVICE_HEADER.read_text())}"
    folder.mkdir(exist_ok=True)
    header = cached(f"{folder.name}/device.h", lambda path: shutil.copyfile(DEVICE_HEADER, path))
    cached(
        f"{folder.name}/device.h.gch",
        lambda path: compile_with([*flags, "-x", "c++-header", str(header), "-o", str(path)]),
    )
    return header


def _tail(exports: Sequence[tuple[str, str]], dynamic_names: Sequence[str]) -> str:
    """What is appended to a source: entry points, and the storage behind `extern __shared__`."""
    lines = ['\n#line 1 "simt-tail"']
    for i, (name, bounds) in enumerate(exports):
        lines.append(
            f'extern "C" {{ void simt_entry_{i}(void** a) {{ simt::call(&{name}, a); }} '
            f"const int* simt_signature_{i}() {{ return simt::signature(&{name}); }} "
            f"int simt_bound_{i}() {{ return simt::first_bound({bounds}); }} }}"
        )
    symbols = "".join(
        f".globl {n}\\n.hidden {n}\\n.type {n},@object\\n{n}:\\n" for n in (*dynamic_names, "simt_dynamic")
    )
    lines.append(
        f'asm(".section .tbss,\\"awT\\",@nobits\\n.balign 256\\n{symbols}.zero {DYNAMIC_SHARED_ROOM}\\n.text\\n");\n'
        "extern thread_local unsigned char simt_dynamic[];\n"
        'extern "C" unsigned char* simt_dynamic_low() { return simt_dynamic; }\n'
    )
    return "\n".join(lines)


def kernel_library(code: str, options: Sequence[str], name_expressions: Sequence[str], mode: str) -> KernelLibrary:
    """Build `code` for `mode` ("check", "fast", "fast-contract"), or take it from the cache."""
    macros = (*DEVICE_MACROS, *preprocessor_options(options))
    flags = (standard_of(options), *COMMON_FLAGS, *MODE_FLAGS[mode])
    runtime = runtime_library()
    key = digest(CXX, code, macros, flags, tuple(name_expressions), runtime.name, DEVICE_HEADER.read_text(), PTX)

    def describe(path: Path) -> None:
        done = subprocess.run(
            [CXX, "-E", "-P", "-x", "c++", standard_of(options), *macros, "-"],
            input=code,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(done.stderr)
        declared = {d.name: d for d in kernel_declarations(done.stdout)}
        kernels = {name: d for name, d in declared.items() if not d.is_template}
        for expression in name_expressions:
            kernels[expression] = declared[expression.split("<")[0].split("::")[-1].strip()]
        dynamic = re.findall(r"extern\s+__shared__\s[^;\[]*?(\w+)\s*\[\s*\]", done.stdout)
        path.write_text(
            json.dumps(
                {
                    "kernels": {k: [d.name, d.parameters, d.launch_bounds, d.is_template] for k, d in kernels.items()},
                    "dynamic": sorted(set(dynamic)),
                }
            )
        )

    described = json.loads(
        cached(f"kernels-{digest(code, macros, tuple(name_expressions), CXX, '1')}.json", describe).read_text()
    )
    kernels = {k: KernelDeclaration(n, tuple(p), b, t) for k, (n, p, b, t) in described["kernels"].items()}

    def make(path: Path) -> None:
        exports = [(k, "" if d.is_template else d.launch_bounds) for k, d in kernels.items()]
        source = path.with_suffix(".cu")
        source.write_text(f'#line 1 "kern.cu"\n{without_ptx(code)}\n{_tail(exports, described["dynamic"])}')
        built = path.with_suffix(".o")
        header = _precompiled_header(flags)
        try:
            # -D after the header: precompiled headers must not depend on them
            compile_with([*flags, "-include", str(header), *macros, "-x", "c++", "-c", str(source), "-o", str(built)])
            # Of the standard libraries only what has no shared one: the runtime brings the others with it, and to look
            # for a kernel's few symbols in them is most of linking (0.10 s of processor time, and 0.01 without).
            link = ["-shared", "-nostdlib", "-Wl,-Bsymbolic", "-Wl,-rpath,$ORIGIN", str(built), str(runtime), "-lgcc"]
            compile_with([*link, "-o", str(path)])
        finally:
            source.unlink()
            built.unlink(missing_ok=True)

    path = cached(f"kernel-{key}.so", make)
    return KernelLibrary(path, kernels, {name: i for i, name in enumerate(kernels)})
