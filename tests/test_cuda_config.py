"""Promise: launch choices are arithmetic on the shape: they cover every element once, fit the device, ignore N."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from cugn.cuda import config
from cugn.cuda.config import Box, Device, Problem

H100 = Device(227 << 10)
DEVICES = {"sm_75": Device(64 << 10), "sm_86": Device(99 << 10), "sm_80": Device(163 << 10), "sm_90": H100}
SIZES = [
    (1, 1, 1, 1),
    (2, 1, 8, 4),
    (7, 1, 32, 16),
    (3, 49, 2048, 32),
    (5, 49, 2048, 2048),
    (2, 3136, 256, 32),
    (1, 512 * 512, 128, 32),
    (2, 4097, 30, 10),
    (4, 100, 3, 3),
    (3, 1, 100_000, 1),
    (2, 64, 1025, 1),
    (1, 10**6, 1, 1),
    (2, 77, 96, 96),
    (1, 2050, 4, 2),
]


def problem(N: int, S: int, C: int, G: int, itemsize: int = 4, last: bool = False, **fields: Any) -> Problem:
    """A contiguous call."""
    outer, inner = (S, 1) if last else (1, S)
    values: dict[str, Any] = {
        "N": N,
        "outer": outer,
        "C": C,
        "inner": inner,
        "unit": C // G,
        "itemsize": itemsize,
        "real": 8 if itemsize == 8 else 4,
        "tangent": False,
        "arrays": 1,
        "masked": False,
        "heavy": False,
        "contiguous_rows": True,
        "contiguous_samples": True,
        "aligned_rows": C * inner * itemsize % 32 == 0,
        "aligned": True,
    }
    return Problem(**{**values, **fields})


ALL = [
    problem(*sizes, itemsize=itemsize, last=last, arrays=arrays, masked=masked)
    for sizes in SIZES
    for itemsize, last, arrays, masked in itertools.product((2, 4, 8), (False, True), (1, 2), (False, True))
] + [  # tables by labels: boxes of whole samples
    problem(N, 1, C, 1, itemsize=itemsize, arrays=arrays, masked=masked, labels=labels)
    for N, C, labels in ((1, 9, 4), (33, 100, 50), (2, 1500, 11), (300, 2000, 1), (100_000, 128, 8))
    for itemsize, arrays, masked in itertools.product((2, 4, 8), (1, 2), (False, True))
]


def boxes(p: Problem, device: Device) -> list[tuple[str, Box, int]]:
    """Every box that a call may launch, with its dynamic shared memory."""
    split = config.split_box(p, device)
    again = config.apply_box(p, split)
    resident = config.resident_box(p, device)
    if p.arrays == 2:
        found = [
            ("split", split, config.backward_sums_bytes(split, p)),
            ("again", again, config.backward_apply_bytes(again, p)),
        ]
        return found + ([("resident", resident, config.backward_bytes(resident, p))] if resident else [])
    found = [("split", split, config.moments_bytes(split, p)), ("again", again, config.apply_bytes(again, p))]
    return found + ([("resident", resident, config.forward_bytes(resident, p))] if resident else [])


def tiled(total: int, tiles: int, size: int) -> bool:
    """Tiles of a size that cover a length, none of them empty."""
    return (tiles - 1) * size < total <= tiles * size


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_boxes_cover_the_array_and_fit_the_device(device: Device) -> None:
    for p in ALL:
        for kind, box, shared in boxes(p, device):
            what = f"{kind} {p} {box}"
            assert tiled(p.N, box.sample_tiles, box.samples), what
            assert tiled(p.outer, box.row_tiles, box.rows), what
            assert tiled(p.inner, box.column_tiles, box.columns), what
            if box.channels >= p.unit:
                assert box.channels % p.unit == 0, what
                assert tiled(p.C, box.channel_tiles, box.channels), what
            else:
                assert tiled(p.unit, box.channel_tiles // p.units, box.channels), what
            assert box.channels == 1 or box.columns == p.inner, what
            assert box.samples == 1 or (box.rows == p.outer and box.channels == p.C), what
            assert shared <= device.shared_per_block - config.RESERVED_SHARED, what
            assert box.elements < 2**21, f"{what}: indices inside a box are divided in float32"
            assert box.tiles < 2**31, what
            if kind == "resident":
                assert box.channels >= p.unit, what
                assert box.parts == 1, what


def test_threads_and_teams() -> None:
    for p in ALL:
        for kind, box, _ in boxes(p, H100):
            what = f"{kind} {p} {box}"
            most = config.MOST_THREADS if kind == "resident" else config.USUAL_THREADS
            assert 32 <= box.threads <= most, what
            assert box.threads & (box.threads - 1) == 0, what
            for team in (box.group_team, box.channel_team):
                assert 1 <= team <= box.threads, what
                assert team & (team - 1) == 0, what


def test_rows_in_shared_memory_are_in_different_banks() -> None:
    """Rows do not overlap, have room for their edges, and lie such that few loads wait for each other."""
    found = []
    for p in ALL:
        for kind, box, _ in boxes(p, H100):
            assert box.pitch % p.vector == 0
            width = box.channels * box.columns
            edges = 0 if p.aligned_rows and width % p.vector == p.unit * p.inner % p.vector == 0 else p.vector - 1
            assert box.pitch >= width + edges, f"{kind} {p}: no room for any alignment"
            if not box.flat and kind != "again":
                packed = dataclasses.replace(box, pitch=width)
                assert config.wavefronts(p, box) <= config.wavefronts(p, packed)
                found.append(config.wavefronts(p, box) / config.wavefronts(p, packed))
    assert sum(found) / len(found) < 0.8


def test_alignment_moves_rows_and_nothing_else() -> None:
    """All that decides the order of a sum is the same for every address."""
    for p in ALL:
        other = dataclasses.replace(p, aligned=False)
        for (kind, a, _), (_, b, _) in zip(boxes(p, H100), boxes(other, H100), strict=True):
            same = {f.name for f in dataclasses.fields(Box)} - {"pitch", "flat"}
            assert all(getattr(a, name) == getattr(b, name) for name in same), (kind, p)
            assert b.flat or kind == "again" or not config.contiguous(p, b), "rows with edges that need none"


def test_no_choice_depends_on_the_batch() -> None:
    """All that decides the order of a sum over a group is the same for every N.

    Where rows are single the teams do; how many groups share a block is free there.
    """
    for p in ALL:
        other = dataclasses.replace(p, N=p.N + 1000)
        for (kind, a, _), (_, b, _) in zip(boxes(p, H100), boxes(other, H100), strict=True):
            same = {f.name for f in dataclasses.fields(Box)} - {"sample_tiles"}
            if p.outer == 1 and a.parts == b.parts == 1:
                same = {"rows", "columns", "group_team", "channel_team"}
            assert all(getattr(a, name) == getattr(b, name) for name in same), (kind, p)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("arrays", [1, 2])
def test_one_large_sample_fills_the_device(itemsize: int, last: bool, arrays: int) -> None:
    """N = 1, C = 128, S = 512 * 512, G = 32: two blocks for each of 132 multiprocessors, in every large kernel."""
    p = problem(1, 512 * 512, 128, 32, itemsize, last, arrays=arrays)
    assert config.resident_box(p, H100) is None
    for kind, box, _ in boxes(p, H100):
        assert box.tiles >= 264, kind


def test_groups_are_resident_as_far_as_shared_memory_goes() -> None:
    """The largest float32 group that one block holds, and one vector more."""
    limit = 0
    for S in range(4, 100_000, 4):
        if config.resident_box(problem(1, S, 1, 1), H100) is None:
            limit = S
            break
    assert 4 * limit > 220 << 10
    assert config.resident_box(problem(1, limit - 4, 1, 1), H100) is not None
    assert config.resident_box(problem(1, limit - 4, 1, 1), DEVICES["sm_86"]) is None
    assert config.resident_box(problem(1, limit // 2 - 64, 1, 1, arrays=2), H100) is not None


def test_tiny_groups_share_a_block() -> None:
    for D in (2, 8, 32):
        box = config.resident_box(problem(4096, 1, 256, 256 // D), H100)
        assert box is not None
        assert box.units >= 64
        assert box.tiles <= 4096


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("G", [1, 8, 64])
def test_rows_are_whole_sectors(itemsize: int, G: int) -> None:
    """Channels-last: rows of a box are whole sectors where the array's are, or long enough."""
    for C, S in itertools.product((64, 320, 1024, 100), (196, 4096, 40_000)):
        if C % G:
            continue
        p = problem(2, S, C, G, itemsize, last=True)
        for kind, box, _ in boxes(p, H100):
            row = box.channels * itemsize
            full = box.channels == C
            assert full or row >= 640 or (p.aligned_rows and row % 32 == 0 and row >= 64), (kind, p, box)


def test_partial_sums_stay_small() -> None:
    """dweight and dbias: a workspace of at most an eighth of x beyond the first MiB, and at least one row."""
    for p in ALL:
        if p.arrays == 1:
            continue
        p = dataclasses.replace(p, N=5000)
        box = config.resident_box(p, H100)
        if box is None:
            continue
        sums = config.channel_sums(p, box)
        assert sums.repeat * sums.rows >= box.sample_tiles
        assert sums.repeat * (sums.rows - 1) < box.sample_tiles
        x_bytes = p.N * p.C * p.outer * p.inner * p.itemsize
        assert sums.rows == 1 or sums.rows * p.C * 2 * p.real <= max(x_bytes // 8, min(1 << 20, x_bytes // 2))


def test_merges_fill_a_warp_at_least() -> None:
    for parts in (1, 2, 33, 1000, 10**6):
        threads, team = config.merge_threads(parts)
        assert threads % 32 == 0
        assert threads % team == 0
        threads, team = config.merge_channel_threads(7, parts)
        assert threads % 32 == 0
        assert threads % team == 0
