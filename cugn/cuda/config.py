"""Launch choices: from the shape of a call and the device's properties to boxes, threads and bytes. Pure arithmetic.

A *box* is what one block of threads works on; ``kernels/box.cuh`` says how. How a sum is split depends on the sizes of
a sample, the dtype and the memory order alone, never on N, an address or the number of multiprocessors: the same bits
for a sample whatever the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = [
    "ITEMSIZE",
    "Box",
    "Device",
    "Problem",
    "Sums",
    "apply_box",
    "channel_sums",
    "resident_box",
    "split_box",
]

ITEMSIZE = {
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

SECTOR = 32
"""Bytes that the memory system moves at least."""

FEW_ROWS_BYTES = 640
"""Rows of a box this long waste at most 2 of 22 sectors however they are aligned: an efficiency above 0.9."""

ALIGNED_ROW_BYTES = 64, 256
"""Wanted length of rows that begin and end at sectors, of boxes of whole groups and of split ones: what the memory
delivers at once, and where there are many rows what the threads of a warp have side by side."""

SMALL_BOX_BYTES = 96 << 10
"""Small groups share a block up to this much shared memory: two blocks on a multiprocessor, each with enough to do for
what is done once a block. Measured on an H200: (16384, 1024), G = 1 takes 74 us with half of it, 66 with this."""

SMALL_BOX_BYTES_OF_ROWS = 48 << 10, 96 << 10
"""The same where there are rows, of one array and of two. What is in such a box decides the order of its sums, and so
it cannot go by the number of samples."""

ENOUGH_BLOCKS = 132
"""Groups share a block as long as there are so many blocks, one for each multiprocessor of an H100."""

LEAST_THREADS = 128
LEAST_BOX_BYTES = 4 << 10
"""Groups share a block in any case until it has so many threads (in the backward) and so much of x: what the ends of a
box waste of vectors and sectors does not count then."""

SINGLE_THREADS = 128
"""Threads of the backward of channels of one element: three blocks have their registers, of 256 threads one."""

VECTORS_OF_A_LANE = 8
"""Vectors that a thread of a team has at least where the team has several threads: of fewer the sums over the team cost
more."""

SPLIT_BOX_BYTES = 72 << 10, 110 << 10
"""Shared memory of the boxes of a split group, of one array and of more: three blocks on a multiprocessor of sm_90, and
two, so that the loads of one hide the sums of the others; more in a box makes what is done once a box count less."""

APPLY_ROWS = 2
"""Boxes of `apply` hold this many times the rows, for they need no shared memory: the statistics, 24 bytes a group and
up to 16 a channel, are read less often. N = 1, C = 128, S = 512 * 512 still makes more than 264 boxes."""

MOST_THREADS = 512
"""Threads at most of the forward, and of the backward in float32, as in their launch bounds: 128 registers each."""

USUAL_THREADS = 256
"""Threads of all other kernels, and of these where more than one block fits: one loads while the other sums."""

ONE_BLOCK_BYTES = 112 << 10
"""From this much shared memory on a multiprocessor holds one block: then it gets all the threads."""

LEAST_TEAM = 4
"""Threads that sum up a group at least, if it has as many vectors: neighbours then read neighbouring vectors, not ones
a power of two apart, four or more of them in a bank."""

LABEL_THREADS = 128
"""Threads that merge the channels of one labelled group, or that are a block of the teams that do."""

PLANES = 12
"""Values of a group that the kernels of a split group hand on: as `Plane` in the kernels."""

SCRATCH_DOUBLES = 64
RESERVED_SHARED = 1 << 10
"""What the driver keeps of a block's shared memory."""

FEW_OF_CHANNEL = 16
"""Elements of a channel in a box below which the backward takes its sums about the group's mean, not the box's."""

PARTIAL_SHARE = 8
"""Workspace for dweight and dbias at most a share of x of 1 to this, beyond the first MiB."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the choices need to know of a GPU."""

    shared_per_block: int
    """Bytes of shared memory that a block may opt in to: 227 KB on sm_90 and sm_100, 64 KB on sm_75, 99 KB on sm_86."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Arrays (N, outer, C, inner), and what of them belongs together."""

    N: int
    outer: int
    C: int
    inner: int
    unit: int
    """Neighbouring channels that belong together: a group's; one where channels are merged by labels; all where a box
    has the label groups of whole samples.
    """
    itemsize: int
    """Bytes of an element of x."""
    real: int
    """Bytes of the arithmetic of an element."""
    tangent: bool
    """Whether it is the jvp."""
    arrays: int
    """Arrays of a box that are held in shared memory: x, or x and dy; in the double backward ddx, too."""
    masked: bool
    heavy: bool
    """Whether there is an activation, and vectors, that take registers: with a second derivative, of a 16-bit type."""
    contiguous_rows: bool
    """Whether consecutive rows of all arrays follow each other in memory (so == C * inner)."""
    contiguous_samples: bool
    """Whether consecutive samples do, too (sn == outer * C * inner)."""
    aligned_rows: bool
    """Whether rows and samples of all arrays are whole sectors apart."""
    aligned: bool
    """Whether all arrays begin at a multiple of 16 bytes: it decides where a box lies in shared memory, no more."""
    labels: int = 0
    """Label groups of a unit of all channels; else 0."""

    @property
    def units(self) -> int:
        """Units of a sample."""
        return self.C // self.unit

    @property
    def single(self) -> bool:
        """Whether a channel of a sample has one element."""
        return self.outer == self.inner == 1

    @property
    def vector(self) -> int:
        """Elements of a 16-byte vector."""
        return 16 // self.itemsize


@dataclass(frozen=True, slots=True)
class Box:
    """What a block works on, and with how many threads. See `kernels/box.cuh`."""

    samples: int
    rows: int
    channels: int
    columns: int
    sample_tiles: int
    row_tiles: int
    channel_tiles: int
    column_tiles: int
    pitch: int
    """Elements from row to row in shared memory."""
    flat: bool
    groups: int
    """Groups of a sample in the box; 1 where it is a part of one."""
    parts: int
    """Boxes that hold a group of a sample."""
    threads: int
    group_team: int
    """Threads that sum up a group."""
    channel_team: int
    """Threads that sum up a channel."""

    @property
    def tiles(self) -> int:
        """Boxes of the whole array."""
        return self.sample_tiles * self.row_tiles * self.channel_tiles * self.column_tiles

    @property
    def units(self) -> int:
        """Groups in the box, of all its samples."""
        return self.samples * self.groups

    @property
    def spatial_parts(self) -> int:
        """Boxes that hold a channel of a sample."""
        return self.row_tiles * self.column_tiles

    @property
    def elements(self) -> int:
        """Elements of a full box."""
        return self.samples * self.rows * self.channels * self.columns

    def array_bytes(self, itemsize: int) -> int:
        """Shared memory of the box of one array: as `box_bytes` in the kernels."""
        vector = 16 // itemsize
        if self.flat:
            return (self.elements + 2 * vector - 2) // vector * 16
        return self.samples * self.rows * self.pitch * itemsize

    def mask_bytes(self, masked: bool) -> int:
        """Shared memory of the mask."""
        return _round_up(self.elements, 16) if masked else 0

    def tables_bytes(self, real: int, tangent: bool, coefficients: int) -> int:
        """What is looked up for groups and channels: as `Tables` in the kernels."""
        exact, of_group = (0, 4) if real == 8 else (2 + coefficients, 3)
        shares = 1 if real == 8 and coefficients else 0
        looked_up = (of_group + coefficients + shares) * spread(self.units, real)
        looked_up += (4 if tangent else 2) * spread(self.channels, real)
        return _round_up(8 * exact * self.units + real * looked_up, 16)


@lru_cache(maxsize=1024)
def resident_box(problem: Problem, device: Device) -> Box | None:
    """Box of whole groups that fits in a block's shared memory, or None: then a group is split."""
    p = problem
    limit = device.shared_per_block - RESERVED_SHARED
    bytes_of = backward_bytes if p.arrays == 2 else forward_bytes
    least = 1 if p.outer == 1 else _groups_for_whole_sectors(p, ALIGNED_ROW_BYTES[0])
    box = _box(p, 1, p.outer, least * p.unit, p.inner)
    if bytes_of(box, p) > limit:
        box = _flattened(p, box)  # rows without gaps
        return box if box.flat and bytes_of(box, p) <= limit else None
    small = SMALL_BOX_BYTES if p.outer == 1 else SMALL_BOX_BYTES_OF_ROWS[p.arrays - 1]
    while True:
        samples, groups = (1, min(p.units, 2 * box.groups)) if box.groups < p.units else (2 * box.samples, p.units)
        larger = _box(p, samples, p.outer, groups * p.unit, p.inner)
        large = box.elements * p.itemsize >= LEAST_BOX_BYTES and (p.arrays == 1 or box.threads >= LEAST_THREADS)
        few = p.outer == 1 and large and larger.tiles < ENOUGH_BLOCKS
        if bytes_of(larger, p) > min(limit, small) or few:
            break
        box = larger
    most = min(limit, max(small, bytes_of(box, p) * 9 // 8))
    box = _laid_out(p, box, lambda box: bytes_of(box, p), most)
    if p.outer == p.arrays == 1 and box.tiles < ENOUGH_BLOCKS:
        # The fewer blocks there are, the more it counts when each ends; the teams, and so the sums, stay what they are.
        # Not in the backward: with more warps for the same sums shared memory would take longer than global memory.
        loads = box.elements // (1 if p.labels else p.vector)
        box = replace(box, threads=max(box.threads, min(USUAL_THREADS, _power_of_two(loads))))
    return box


@lru_cache(maxsize=1024)
def split_box(problem: Problem, device: Device) -> Box:
    """Box of a part of a group, or of parts of neighbouring groups."""
    budget = min(SPLIT_BOX_BYTES[problem.arrays > 1], device.shared_per_block - RESERVED_SHARED)
    elements = max(problem.vector, budget // (problem.arrays * (problem.itemsize + problem.masked)))
    bytes_of = {1: (moments_bytes, apply_bytes), 2: (backward_sums_bytes,), 3: (second_bytes,)}[problem.arrays]

    def most(box: Box) -> int:
        return max(of(box, problem) for of in bytes_of)

    while True:
        box = _part(problem, elements)
        if most(box) <= budget or elements == problem.vector:
            return _laid_out(problem, box, most, budget)
        elements = max(problem.vector, elements * 7 // 8)


def _part(p: Problem, elements: int) -> Box:
    """Box of at most about so many elements."""
    if p.inner >= elements:  # a stretch of one channel
        columns = _round_up(_even(p.inner, elements), 64)
        return _box(p, 1, 1, 1, min(columns, p.inner))
    if p.outer == 1 and p.unit * p.inner <= elements:  # whole groups
        return _box(p, 1, 1, p.unit * (elements // (p.unit * p.inner)), p.inner)
    if p.outer == 1:  # some channels of one group
        return _box(p, 1, 1, min(p.unit, _even(p.unit, max(1, elements // p.inner))), p.inner)
    channels = _channels_for_whole_sectors(p, ALIGNED_ROW_BYTES[1]) if p.unit > 1 else p.unit
    if channels >= p.unit:
        channels = p.unit * _groups_for_whole_sectors(p, ALIGNED_ROW_BYTES[1])
    rows = max(1, elements // (channels * p.inner))
    return _box(p, 1, _even(p.outer, rows), channels, p.inner)


def apply_box(problem: Problem, box: Box) -> Box:
    """Box for the second reading of what `box` split: taller where there are rows."""
    if box.rows == 1:
        return box
    taller = _box(problem, 1, min(problem.outer, APPLY_ROWS * box.rows), box.channels, box.columns)
    return replace(taller, threads=min(taller.threads, USUAL_THREADS), group_team=1, channel_team=1)  # it has no sums


@dataclass(frozen=True, slots=True)
class Sums:
    """How the sums over the samples, dweight and dbias, are split; it may depend on N."""

    repeat: int
    """Sample tiles that a block of the backward goes through, one after the other."""
    rows: int
    """Rows of partial sums, each of C channels."""


def channel_sums(problem: Problem, box: Box) -> Sums:
    """Few enough rows of partial sums for the memory that they take, many enough to fill the device.

    A row of two sums is wanted for each sample tile; blocks take several tiles where that would come near the size of
    x, or where there are more than 2048 blocks anyway.
    """
    p = problem
    row_bytes = 2 * p.C * p.real
    x_bytes = p.N * p.C * p.outer * p.inner * p.itemsize
    most_rows = max(1, max(x_bytes // PARTIAL_SHARE, min(1 << 20, x_bytes // 2)) // row_bytes)
    repeat = max(1, -(-box.sample_tiles // most_rows), box.tiles // 2048)
    repeat = min(repeat, box.sample_tiles)
    return Sums(repeat, -(-box.sample_tiles // repeat))


def _box(p: Problem, samples: int, rows: int, channels: int, columns: int) -> Box:
    channels = min(channels, p.C)
    width = channels * columns
    # One stretch of memory: where rows are no whole number of vectors, so that not each has its edges. Others are kept
    # apart, for a pitch that avoids bank conflicts: this much room, wherever they begin; an odd number of vectors, so
    # that 8 rows can be in different banks.
    contiguous = _contiguous(p, samples, rows, width)
    flat = (samples == 1 and rows == 1) or (contiguous and (rows == 1 or width % p.vector != 0))
    pitch = _round_up(width + p.vector - 1, p.vector)
    if pitch // p.vector % 2 == 0:
        pitch += p.vector
    parts_of_channels = -(-p.unit // channels)
    row_tiles, column_tiles = -(-p.outer // rows), -(-p.inner // columns)
    parts = row_tiles * column_tiles * parts_of_channels
    elements = samples * rows * width
    alone = elements * p.arrays * p.itemsize >= ONE_BLOCK_BYTES
    most = MOST_THREADS if alone and _has_many_threads(p) else USUAL_THREADS
    if p.single and p.arrays == 2 and not alone:
        most = SINGLE_THREADS
    load = 1 if p.labels else p.vector
    threads = min(most, max(32, _power_of_two(elements // load // 4)))
    sample_tiles = -(-p.N // samples)
    channel_tiles = -(-p.C // channels) if channels >= p.unit else p.units * parts_of_channels
    groups = p.labels or max(1, channels // p.unit)
    units = samples * groups
    group_chunks = max(1, rows * width // groups // load)
    channel_chunks = max(1, rows * columns // (p.vector if columns % p.vector == 0 else 1))
    if p.outer == 1 and parts == 1:  # by the sizes of a sample alone: the batch decides how many are in the box
        group_team = min(most, _team(max(LEAST_TEAM, group_chunks // VECTORS_OF_A_LANE), group_chunks))
        channel_team = min(most, _team(max(1, channel_chunks // VECTORS_OF_A_LANE), channel_chunks))
        threads = max(threads, group_team, channel_team)
    else:
        group_team = _team(max(LEAST_TEAM, threads // units), group_chunks)
        channel_team = _team(max(1, threads // (samples * channels)), channel_chunks)
    return Box(
        samples=samples,
        rows=rows,
        channels=channels,
        columns=columns,
        sample_tiles=sample_tiles,
        row_tiles=row_tiles,
        channel_tiles=channel_tiles,
        column_tiles=column_tiles,
        pitch=pitch,
        flat=flat,
        groups=groups,
        parts=parts,
        threads=threads,
        group_team=group_team,
        channel_team=channel_team,
    )


def _has_many_threads(p: Problem) -> bool:
    """Whether the kernel's launch bounds allow MOST_THREADS: as LARGE_BACKWARD in `kernels/box.cuh`."""
    large_backward = not (p.tangent or p.heavy) and p.real == 4 and p.inner >= p.vector
    return not p.labels and (p.arrays == 1 or (p.arrays == 2 and large_backward))


def _contiguous(p: Problem, samples: int, rows: int, width: int) -> bool:
    full_rows = width == p.C * p.inner and p.contiguous_rows
    return full_rows and (samples == 1 or (rows == p.outer and p.contiguous_samples))


def contiguous(p: Problem, box: Box) -> bool:
    """Whether the box is one stretch of memory."""
    return _contiguous(p, box.samples, box.rows, box.channels * box.columns)


def _flattened(p: Problem, box: Box) -> Box:
    """The box as one stretch of shared memory, if it is one of memory."""
    return replace(box, flat=box.flat or contiguous(p, box))


def _laid_out(p: Problem, box: Box, bytes_of: Callable[[Box], int], budget: int) -> Box:
    """Where the rows of a box lie in its shared memory, or in the budget if that is more; no sum depends on it.

    Rows that begin anywhere have an edge on both sides, which goes element by element: one stretch has two of them.
    Others have the pitch with the fewest bank conflicts.
    """
    if not p.aligned:
        box = _flattened(p, box)
    if box.flat:
        return box
    width = box.channels * box.columns
    # without edges where all boxes begin and end at vectors
    whole = p.aligned and p.aligned_rows and width % p.vector == p.unit * p.inner % p.vector == 0
    least = width if whole else _round_up(width + p.vector - 1, p.vector)
    boxes = [replace(box, pitch=pitch) for pitch in range(least, box.pitch + 4 * p.vector, p.vector)]
    most = max(budget, bytes_of(box))
    return min((box for box in boxes if bytes_of(box) <= most), key=lambda box: wavefronts(p, box))


def wavefronts(p: Problem, box: Box) -> float:
    """Cycles of shared memory for each element of x that the sums of a box take, bank conflicts included.

    Of the first loads of a warp: x is read twice by the teams of groups, all arrays once by the teams of channels.
    """
    width = box.channels * box.columns
    found = 2 * _wavefronts(p, box, width // box.groups, box.group_team, box.groups, box.units)
    if p.arrays > 1:
        channels = box.samples * box.channels
        found += p.arrays * _wavefronts(p, box, box.columns, box.channel_team, box.channels, channels)
    return found


def _wavefronts(p: Problem, box: Box, run: int, team: int, per_sample: int, units: int) -> float:
    """The same for teams that read runs of `run` elements, of `per_sample` units in a sample."""
    load = p.vector if run % p.vector == 0 else 1
    per_row, lanes = run // load, min(32, box.threads)
    bytes_of_load = load * p.itemsize
    phase_lanes = min(32, 128 // max(4, bytes_of_load))
    total = elements = 0
    for first in range(0, lanes, phase_lanes):
        banks: dict[int, set[int]] = {}
        for lane in range(first, first + phase_lanes):
            unit, chunk = divmod(lane, team)
            row = chunk // per_row
            if unit >= units or row >= box.rows:
                continue
            elements += load
            n, k = divmod(unit, per_sample)
            at = ((n * box.rows + row) * box.pitch + k * run + chunk % per_row * load) * p.itemsize
            for word in range(at // 4, (at + max(4, bytes_of_load)) // 4):
                banks.setdefault(word % 32, set()).add(word)
        total += max((len(words) for words in banks.values()), default=0)
    return total / max(1, elements)


def forward_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `forward`."""
    return apply_bytes(box, p) + moments_bytes(box, p)


def backward_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `backward`: as `Work` in the kernels."""
    kept = 0 if p.single else box.samples * box.channels
    return _backward_bytes(box, p, kept) + 2 * box.array_bytes(p.itemsize)


def backward_sums_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `backward_sums`."""
    return backward_apply_bytes(box, p) + 2 * box.array_bytes(p.itemsize)


def backward_apply_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `backward_apply`."""
    return _backward_bytes(box, p, box.channels)


def _backward_bytes(box: Box, p: Problem, kept: int) -> int:
    """All but the arrays, with `kept` sums of channels."""
    doubles = SCRATCH_DOUBLES + box.units + 2 * spread(kept, 8) + 2 * spread(box.channels, 8)
    return _round_up(8 * doubles + box.tables_bytes(p.real, p.tangent, 2), 16) + box.mask_bytes(p.masked)


def second_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of the kernels of the double backward: as `SecondWork` in the kernels."""
    doubles = SCRATCH_DOUBLES + 10 * spread(box.units, 8) + 4 * spread(box.channels, 8)
    return _round_up(8 * doubles, 16) + 3 * box.array_bytes(p.itemsize) + box.mask_bytes(p.masked)


def moments_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `moments`."""
    return 8 * SCRATCH_DOUBLES + box.array_bytes(p.itemsize) + box.mask_bytes(p.masked)


def apply_bytes(box: Box, p: Problem) -> int:
    """Dynamic shared memory of `apply_statistics`."""
    return box.tables_bytes(p.real, p.tangent, 0)


def _groups_for_whole_sectors(p: Problem, wanted: int) -> int:
    """Neighbouring groups that make rows of a box out of whole sectors, or so long that the ends do not count."""
    run = p.unit * p.inner * p.itemsize
    if p.aligned_rows:
        for groups in range(-(-wanted // run), 2 * SECTOR + -(-wanted // run)):
            if groups * run % SECTOR == 0:
                return min(p.units, groups)
    return min(p.units, -(-FEW_ROWS_BYTES // run))


def _channels_for_whole_sectors(p: Problem, wanted: int) -> int:
    """As `_groups_for_whole_sectors`, channels of one unit; all of them where it takes those."""
    row = p.inner * p.itemsize
    if p.aligned_rows and p.unit * row % SECTOR == 0:
        for channels in range(-(-wanted // row), p.unit):
            if channels * row % SECTOR == 0:
                return channels
    return min(p.unit, -(-FEW_ROWS_BYTES // row))


def _team(threads: int, chunks: int) -> int:
    """Threads for a unit of `chunks` loads: a power of two, at most so many and no more than there are loads."""
    threads = min(threads, _power_of_two(chunks))
    return 1 << (threads.bit_length() - 1)


def spread(entries: int, itemsize: int) -> int:
    """Entries of a table in shared memory with its gaps, one every 128 bytes: as `spread` in the kernels."""
    return entries + entries // (128 // itemsize)


def part_values(real: int) -> int:
    """Doubles that are written of the moments of a part: as `PART` in the kernels."""
    return 5 if real == 8 else 4


def _power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _even(total: int, most: int) -> int:
    """Size of equal parts of at most `most` (the last one may be smaller)."""
    return -(-total // -(-total // max(1, most)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def merge_threads(parts: int) -> tuple[int, int]:
    """Threads of a block that merges groups of `parts` parts, and of the team that merges one."""
    team = min(MOST_THREADS // 2, _power_of_two(max(1, parts)))
    return max(128, team), team


def row_threads(rows: int, channels: int) -> tuple[int, int]:
    """Blocks, and threads of one, that add up `rows` rows of sums of channels: 8 channels a block, 8 rows a thread."""
    return -(-channels // 8), 8 * max(4, min(128, _power_of_two(-(-rows // 8))))


def merge_label_threads(channels: int, groups: int) -> tuple[int, int]:
    """Threads of a block that merges the moments of channels by labels, and of the team that merges one group."""
    return LABEL_THREADS, min(LABEL_THREADS, _power_of_two(max(1, channels // groups // 2)))


def merge_channel_threads(channels: int, parts: int, labelled: bool = False) -> tuple[int, int]:
    """Threads of a block that merges the `parts` parts of some channels, and of the team that merges one channel.

    Labelled groups have any number of channels.
    """
    team = min(32, _power_of_two(max(1, parts // 4)))
    return min(256, max(LABEL_THREADS if labelled else 32, _power_of_two(team * channels))), team
