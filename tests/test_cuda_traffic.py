"""What the CUDA kernels move: close to the least there is, in whole sectors, over enough blocks.

Counted by the emulator, access by access (simt/README.md). The bars, with x, y, dy, dx in bytes:

- a group that fits in a block's shared memory: reads <= 1.02 x, writes = y; in the backward reads <= 1.02 (x + dy),
  writes = dx;
- a larger group: reads 2.05 times that;
- at least 0.9 of the bytes of all sectors touched are used, channels-first and channels-last, for C/G >= 1;
- what is small (parameters, statistics, partial sums) comes on top, and has a bar of its own;
- shared memory takes no longer than global memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import simt
from cuda_on_cpu import NEEDED, emulated
from libraries import dtype_of
from simt import host_cupy

import cugn

pytestmark = NEEDED

BIG = ("x", "dy", "y", "dx")


class Case(NamedTuple):
    """A channels-first shape (N, C, S) and G; `last` turns the array to channels-last."""

    n: int
    c: int
    s: int
    g: int
    last: bool = False

    def __str__(self) -> str:
        return f"{self.n},{self.c},{self.s},G={self.g}{',last' if self.last else ''}"


FITS = [
    Case(2, 32, 784, 8),
    Case(2, 64, 196, 32),
    Case(8, 256, 49, 32),  # rows of 49 elements: heads and tails in every one
    Case(64, 256, 1, 32),
    Case(16, 24, 35, 24),  # instance norm
    Case(2, 30, 121, 1),  # layer norm
    Case(1, 2, 5000, 1),
    Case(2, 64, 196, 8, True),
    Case(2, 64, 196, 32, True),  # 2 channels a group
    Case(2, 64, 96, 64, True),  # 1 channel a group
    Case(8, 30, 49, 10, True),  # 3 channels a group: no width of a vector divides it
    Case(4, 256, 16, 32, True),
]
SPLIT = [
    Case(1, 2, 65_536, 1),
    Case(1, 4, 70_001, 2),
    Case(2, 3, 40_000, 1),
    Case(1, 32, 16_384, 4, True),
    Case(1, 64, 9_604, 32, True),
    Case(1, 48, 10_000, 16, True),
    Case(1, 32, 30_000, 32, True),  # 1 channel a group
]


class Traffic(NamedTuple):
    """Sums over the launches of one call, in bytes."""

    read: int
    written: int
    read_sectors: int
    written_sectors: int
    other: int
    launches: list[simt.Launch]

    @classmethod
    def of(cls, launches: Sequence[simt.Launch], big: Sequence[Any]) -> Traffic:
        """Traffic of the arrays `big`, and of everything else."""
        places = [(a.data.ptr, a.data.ptr + a.nbytes) for a in big]
        read = written = read_sectors = written_sectors = other = 0
        for launch in launches:
            for buffer in launch.buffers.values():
                # a host-side copy has no address: it counts as the large arrays' traffic
                if launch.mode == "host" or any(low <= buffer.address < high for low, high in places):
                    read += buffer.read.bytes
                    written += buffer.write.bytes
                    read_sectors += buffer.read.sector_bytes
                    written_sectors += buffer.write.sector_bytes
                else:
                    other += buffer.read.bytes + buffer.write.bytes
        return cls(read, written, read_sectors, written_sectors, other, list(launches))


@cache
def measure(case: Case, dtype: str, *, backward: bool = False, given: bool = True, **options: Any) -> Traffic:
    """Run one call in check mode, once for all the tests that ask something about it."""
    shape = (case.n, case.s, case.c) if case.last else (case.n, case.c, case.s)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype(dtype_of(dtype)) for _ in range(2))
    weight = rng.normal(size=case.c).astype(np.float32)
    axis = {"channel_axis": -1 if case.last else 1}
    with emulated() as library:
        X, DY, W = (library.array(v) for v in (x, dy, weight))
        out = library.array(np.zeros_like(x))
        if not backward:
            with simt.recorded() as launches:
                cugn.group_norm_forward(X, case.g, W, W, out=out, **axis, **options)
            return Traffic.of(launches, (X, out))
        statistics = {}
        if given:
            with simt.using(mode="fast"):
                _, mean, rstd = cugn.group_norm_forward(X, case.g, W, W, **axis)
            statistics = {"mean": mean, "rstd": rstd}
        with simt.recorded() as launches:
            cugn.group_norm_backward(DY, X, case.g, W, W, out=out, **statistics, **axis, **options)
        return Traffic.of(launches, (X, DY, out))


def size_of(case: Case, dtype: str) -> int:
    """Bytes of x."""
    return case.n * case.c * case.s * dtype_of(dtype).itemsize


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", FITS, ids=str)
def test_a_group_that_fits_is_read_once(case: Case, dtype: str) -> None:
    """x once and y once; in the backward x and dy once, and dx."""
    size = size_of(case, dtype)
    forward = measure(case, dtype)
    assert forward.read <= 1.02 * size
    assert forward.written == size
    backward = measure(case, dtype, backward=True)
    assert backward.read <= 1.02 * 2 * size
    assert backward.written == size


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_a_split_group_is_read_twice(case: Case, dtype: str) -> None:
    """Once for the statistics, once for the result."""
    size = size_of(case, dtype)
    forward = measure(case, dtype)
    assert forward.read <= 2.05 * size
    assert forward.written == size
    backward = measure(case, dtype, backward=True)
    assert backward.read <= 2.05 * 2 * size
    assert backward.written == size


@pytest.mark.parametrize("case", FITS, ids=str)
def test_small_arrays_stay_small(case: Case) -> None:
    """A channel of a sample costs its weight and bias and two sums, written and read; a group its statistics."""
    for traffic in (measure(case, "float32"), measure(case, "float32", backward=True)):
        # 8 bytes of parameters, 16 of sums, twice, and 32 of statistics where each channel is a group
        assert traffic.other <= 72 * case.n * case.c + 8 * case.c


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_workspaces_stay_small(case: Case) -> None:
    """Partial sums of the blocks that share a group."""
    for traffic in (measure(case, "float32"), measure(case, "float32", backward=True)):
        assert traffic.other <= 0.08 * (traffic.read + traffic.written)


def test_an_activation_costs_no_traffic() -> None:
    """Fused: the same bytes."""
    case = FITS[0]
    plain, fused = measure(case, "float32"), measure(case, "float32", activation="silu")
    assert (plain.read, plain.written) == (fused.read, fused.written)
    plain, fused = (measure(case, "float32", backward=True, activation=a) for a in (None, "silu"))
    assert (plain.read, plain.written) == (fused.read, fused.written)


@pytest.mark.parametrize("case", [FITS[0], FITS[7], SPLIT[0], SPLIT[3]], ids=str)
def test_statistics_that_are_not_given_cost_no_further_pass(case: Case) -> None:
    """The backward takes them along."""
    size = size_of(case, "float32")
    bar = 1.02 if case in FITS else 2.05
    assert measure(case, "float32", backward=True, given=False).read <= bar * 2 * size


# ---------------------------------------------------------------- sectors and widths


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", [*FITS, *SPLIT], ids=str)
def test_sectors_are_used(case: Case, dtype: str) -> None:
    """At least 0.9 of what the memory system moves for x, dy, y and dx is asked for."""
    for backward in (False, True):
        traffic = measure(case, dtype, backward=backward)
        assert traffic.read >= 0.9 * traffic.read_sectors, "loads"
        assert traffic.written >= 0.9 * traffic.written_sectors, "stores"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", [*FITS, *SPLIT], ids=str)
def test_accesses_are_wide(case: Case, dtype: str) -> None:
    """16 bytes each, but for less than a vector at either end of a contiguous stretch."""
    itemsize = dtype_of(dtype).itemsize
    if case.last:
        # rows of the channels of neighbouring groups, 256 bytes of them or all
        stretch = min(case.c * itemsize, 256)
        ends = 0 if stretch % 16 == 0 else 30
    else:
        # groups of a sample, or parts of one of 8 KiB at least
        stretch = min(case.c // case.g * case.s * itemsize, 8192)
        ends = 30
    for backward in (False, True):
        wide = total = 0
        for launch in measure(case, dtype, backward=backward).launches:
            for name in BIG:
                if name in launch.buffers:
                    for flow in (launch.buffers[name].read, launch.buffers[name].write):
                        wide, total = wide + flow.wide, total + flow.bytes
        assert wide >= (1 - ends / stretch) * total


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_misaligned_base_costs_little(shift: int, last: bool) -> None:
    """x some elements into a vector: tails are handled where they are, the rest stays wide."""
    shape = (1, 50, 32) if last else (1, 32, 50)
    whole = np.random.default_rng(0).normal(size=1600 + shift).astype(np.float32)
    with emulated() as library:
        X = library.array(whole)[shift:].reshape(shape)
        with simt.recorded() as launches:
            cugn.group_norm(X, 4, channel_axis=-1 if last else 1)
    flow = launches[0].buffers["x"].read
    assert flow.bytes == X.nbytes
    assert flow.wide >= 0.9 * flow.bytes
    assert flow.efficiency >= 0.9


# ---------------------------------------------------------------- shared memory


# Bytes that shared memory moves while global memory moves one, on an H100: 128 bytes a clock and multiprocessor, 132 of
# them at 1.7 GHz, to 3.35 TB/s. An A100 has 9.7, an RTX 4090 32.
SHARED_TO_GLOBAL = 128 * 132 * 1.7e9 / 3.35e12


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", [*FITS, *SPLIT], ids=str)
def test_shared_memory_keeps_up(case: Case, dtype: str) -> None:
    """Bank conflicts included, shared memory is done before global memory is."""
    for backward in (False, True):
        traffic = measure(case, dtype, backward=backward)
        wavefronts = sum(launch.shared_wavefronts for launch in traffic.launches)
        assert 128 * wavefronts <= SHARED_TO_GLOBAL * (traffic.read_sectors + traffic.written_sectors)


# ---------------------------------------------------------------- launches


def blocks(shape: tuple[int, ...], groups: int, *, backward: bool = False, **options: Any) -> dict[str, int]:
    """Blocks of each kernel of a call, without running it: the arrays take no memory."""
    launched: dict[str, int] = {}

    def count(self: Any, grid: Any, block: Any, args: Any, **_: Any) -> None:
        launched[self.name] = launched.get(self.name, 0) + grid[0]

    with emulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(simt.Kernel, "__call__", count)
        strides = tuple(int(s) for s in np.empty(0, np.float32).itemsize * np.cumprod((1, *shape[:0:-1]))[::-1])
        x = host_cupy.sparse(shape, np.float32, strides)
        out = host_cupy.sparse(shape, np.float32, strides)
        if backward:
            cugn.group_norm_backward(x, x, groups, out=out, **options)
        else:
            cugn.group_norm(x, groups, out=out, **options)
    return launched


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_one_large_sample_fills_the_device(last: bool, backward: bool) -> None:
    """N=1, C=128, S=512*512, G=32 on 132 multiprocessors: two blocks for each, at least, in every pass over x."""
    shape = (1, 512, 512, 128) if last else (1, 128, 512, 512)
    launched = blocks(shape, 32, backward=backward, channel_axis=-1 if last else 1)
    passes = sorted(launched.values())[-2:]
    assert len(passes) == 2
    assert min(passes) >= 264


def test_small_groups_share_blocks() -> None:
    """S=1, D=8: no block for each of 2^20 groups."""
    assert sum(blocks((32_768, 256), 32).values()) <= 32_768


def test_the_grid_does_not_depend_on_the_device() -> None:
    """Nor does any sum, then."""
    found = []
    for count in (8, 132):
        with emulated(host_cupy.Properties(multiprocessors=count)) as library, simt.recorded() as launches:
            cugn.group_norm(library.array(np.zeros((2, 8, 3000), np.float32)), 2)
        found.append([(launch.kernel, launch.grid, launch.block, launch.shared_mem) for launch in launches])
    assert found[0] == found[1]


def test_nothing_is_cleared_or_copied() -> None:
    """Dense arrays are taken as they are: no memset, no copy, no conversion beside the engine's own kernels."""
    for case in (FITS[0], FITS[7], SPLIT[0]):
        for backward in (False, True):
            launches = measure(case, "float32", backward=backward).launches
            assert all(launch.mode == "check" for launch in launches)
            assert not any("copy" in launch.kernel for launch in launches)
