"""The compiler's report tells spills, local arrays, wide and narrow accesses apart, for every architecture."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

import pytest
from simt import sass

pytestmark = pytest.mark.skipif(sass.missing_tools() is not None, reason=str(sass.missing_tools()))

GOOD = """
extern "C" __global__ void __launch_bounds__(256) k(const float4* x, float4* y) {
  __shared__ float4 s[256];
  const int i = blockIdx.x * 256 + threadIdx.x;
  s[threadIdx.x] = x[i];
  __syncthreads();
  y[i] = s[255 - threadIdx.x];
}"""
NARROW = """
extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }"""
LOCAL_ARRAY = """
extern "C" __global__ void k(const int* x, int* y) {
  int a[64];
  for (int i = 0; i < 64; i++) a[i] = x[i];
  for (int i = 0; i < 64; i++) a[x[i] & 63] += a[i];
  y[threadIdx.x] = a[threadIdx.x & 63];
}"""
# 200 values alive at once, and 32 registers to hold them
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) k(const float* x, float* y) {
  float a[200];
#pragma unroll
  for (int i = 0; i < 200; i++) a[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
  float s = 0;
#pragma unroll
  for (int i = 0; i < 200; i++) s = s * a[i] + a[199 - i];
  y[threadIdx.x] = s;
}"""


def rows(code, *architectures, options=()):
    return sass.compile_all([sass.Module("m", code, options)], architectures)


def test_every_architecture():
    found = rows(GOOD, *sass.ARCHITECTURES)
    assert [row.arch for row in found] == list(sass.ARCHITECTURES)
    for row in found:
        assert (row.label, row.kernel, row.shared, row.spills) == ("m", "k", 4096, False), row
        assert row.wide_loads == row.wide_stores == 1
        assert 8 <= row.registers <= 32
        assert row.instructions > 10


def test_narrow_accesses():
    (row,) = rows(NARROW, 90)
    assert (row.wide_loads, row.wide_stores, row.spills) == (0, 0, False)


@pytest.mark.parametrize("code", [LOCAL_ARRAY, SPILLING], ids=["local array", "spilled registers"])
@pytest.mark.parametrize("arch", [75, 90])
def test_local_memory(code, arch):
    (row,) = rows(code, arch)
    assert row.spills
    assert row.local_loads
    assert row.local_stores
    assert row.stack >= 64


@pytest.mark.skipif(sass.tool("nvdisasm") is None, reason="nvdisasm is not installed (nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_the_disassembler_sees_the_same_instructions(arch, tmp_path):
    """Loads and stores of every width, of global and local memory."""
    elements = ["signed char", "unsigned char", "short", "unsigned short", "int", "int2", "int4"]
    parameters = ", ".join(f"{element}* p{i}" for i, element in enumerate(elements))
    copies = " ".join(f"p{i}[threadIdx.x] = p{i}[threadIdx.x + 64];" for i in range(len(elements)))
    code = f'extern "C" __global__ void copy({parameters}) {{ {copies} }}'
    code += LOCAL_ARRAY.replace(" k(", " local(") + SPILLING.replace(" k(", " spilling(")
    machine_code = sass.cubin(code, (), arch)
    path = tmp_path / "kern.cubin"
    path.write_bytes(machine_code)
    text = subprocess.run([sass.tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    kernels = re.split(r"\n\.text\.(\w+):", text)
    assert sorted(kernels[1::2]) == ["copy", "local", "spilling"]
    seen = set()
    for kernel, lines in zip(kernels[1::2], kernels[2::2], strict=True):
        expected = Counter()
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", lines)
        for operation, *kinds in (instruction.split(".") for instruction in instructions):
            if operation in sass.OPCODES.values():
                expected[operation, next((widths[kind] for kind in kinds if kind in widths), 4)] += 1
        assert sass.memory_instructions(sass.texts(machine_code)[kernel]) == (len(instructions), expected), kernel
        seen |= expected.keys()
    assert seen >= {("LDL", 4), ("STL", 4), *((o, w) for o in ("LDG", "STG") for w in (1, 2, 4, 8, 16))}


def test_options_and_several_kernels():
    code = """
    extern "C" __global__ void a(TYPE* x) { x[threadIdx.x] = 1; }
    extern "C" __global__ void b(TYPE* x) { x[threadIdx.x] = 2; }"""
    assert [row.kernel for row in rows(code, 80, options=("-DTYPE=double",))] == ["a", "b"]


def test_what_the_compiler_says_is_shown():
    with pytest.raises(sass.CompileError, match=r"sm_80: .*undeclared_thing"):
        rows('extern "C" __global__ void k(float* y) { y[0] = undeclared_thing; }', 80)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (90, 256, 32, 0, 8),  # all 2048 threads
        (90, 256, 64, 0, 4),  # 65536 registers / (256 * 64)
        (90, 512, 128, 0, 1),
        (90, 512, 40, 0, 3),  # a warp takes 1280: 12 for each scheduler's 16384, 48 in all, 16 a block
        (90, 64, 32, 100 << 10, 2),
        (90, 64, 32, 227 << 10, 1),
        (90, 64, 32, (227 << 10) + 1, 0),
        (86, 512, 32, 0, 3),
        (75, 1024, 64, 0, 1),
        (80, 32, 16, 0, 32),
    ],
)
def test_blocks_of_a_multiprocessor(arch, threads, registers, shared, blocks):
    assert sass.blocks_resident(arch, threads, registers, shared) == blocks
    assert sass.occupancy(arch, threads, registers, shared) == blocks * threads / sass.MULTIPROCESSORS[arch].threads


def test_table():
    text = sass.table(rows(GOOD, 80))
    assert text.split("\n")[0].split()[:3] == ["module", "kernel", "sm"]
    assert text.split("\n")[1].split()[:3] == ["m", "k", "80"]
