"""From a plan to the words that a kernel runs by: how the arrays are cut into tasks, chunks and tickets.

A *task* is one sample's bundle of groups: one group where channels are runs, as many groups as fill a few cache
lines of a row in channels-last. A task is cut into *chunks* (rows x channels x part of a channel) by the sizes of
the group alone, so that every sum is added in the same order whatever N, the threads or the alignment. Tickets give
work to threads:

- whole: a ticket is some tasks; all phases of a task by one thread, while its elements are in that thread's cache;
- split: a ticket is one chunk in one phase; the last thread to finish a task's phase merges its chunks. Tasks go in
  waves that fit in the shared cache, so that the second reading of x comes from there.

Both add the same sums in the same order: the choice may go by N and by the number of threads, the result does not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..layout import Layout
from ..plan import Plan
from . import words as w
from .words import FOLDED, FOLDED_SUM, SHORT_ROWS, SUMS

ITEMSIZE = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
LANES = 16
TABLE_CHANNELS = 1 << 14
"""Channels up to which a sample of a table is done at once."""
LANES_TO = 32
"""Channels of a table's group up to which sixteen samples are done at a time."""
PART_BYTES = 256 << 10
"""Bytes of the samples whose dweight and dbias are added up by one thread."""
OWN_CACHE = 1 << 20
"""Bytes of a task that one thread keeps to itself: its L2 on the CPUs of today."""
SHARED_CACHE = 8 << 20
"""Bytes of a wave of tasks that all threads work on together: what L3 keeps beside others' data."""
STREAM_FROM = 32 << 20
"""Bytes of all arrays from which the output is written past the caches, which do not hold them from call to call.

By the output alone, a backward of 38 MB took 1.2 to 1.6 times as long, and a forward of 25 MB, streamed, 1.1 to 1.4.
"""
STREAM_CHUNK_FROM = 8 << 20
"""The same where other threads write chunks of their own: of 8 MB 0.77 of the time, forward and backward."""
THREADED_FROM = 128 << 10
"""Bytes of all arrays below which the calling thread works alone: waking another costs more."""
TOUCHED_FROM = 24 << 20
"""Bytes of all arrays from which rows are touched before they are used: what L3 holds takes up to 1.4 of the time."""
TOUCHED = 18 << 10
"""Bytes of rows that L1 holds beside coefficients and sums: with 20 KB of x and dy a backward took 1.1 of the time."""
RUNS_FROM = 16
"""Elements of a channel from which it is a run of its own; shorter ones are parts of a row."""


@dataclass(frozen=True)
class Geometry:
    """The words, the memory that they need, and whether other threads are worth waking."""

    words: np.ndarray[Any, np.dtype[np.int64]]
    address: int
    work_bytes: int
    threads: int
    by_rows: bool
    dense: bool
    table: bool
    lanes: bool
    axes: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    """Memory that the words point to."""


def of(
    plan: Plan,
    arrays: list[Any],
    setting: int,
    *,
    compute: str,
    where: Any = None,
    phases: int,
    sums: int = 0,
    gradients: int = 0,
    weight_kind: int = 0,
    bias_kind: int = 0,
    writes: int = 1,
    vectors: int = 2,
    coefficients: int = 8,
    in_lanes: bool = False,
    keeps: bool = False,
) -> Geometry:
    """Geometry of a call.

    Parameters
    ----------
    arrays : list of numpy.ndarray
        All arrays of x's shape that the kernel reads or writes, x first.
    setting : int
        `threads.setting`.
    where : numpy.ndarray, optional
        The mask, as the caller gave it.
    phases : int
        How many there are.
    sums : int
        Sums that are kept for each channel and layer of chunks.
    gradients : int
        Sums over the samples that are kept for each channel.
    writes : int
        How many of the arrays, the last ones, are written.
    vectors : int
        Vectors over the channels that a participant holds as float64: weight, bias and their tangents.
    coefficients : int
        Coefficients that are expanded element by element.
    in_lanes : bool
        Whether the operation has a kernel for sixteen samples of a table at a time.
    keeps : bool
        Whether float32 values of a task may be kept between two phases.
    """
    layout = Layout.of(
        plan.shape,
        plan.batch_axes,
        plan.channel_axis,
        [[s // a.itemsize for s in a.strides] for a in arrays],
    )
    aligned = all(s % a.itemsize == 0 for a in arrays for s in a.strides)
    dense = layout.kind != "strided" and aligned
    N, outer, C, inner = layout.N, layout.outer, layout.C, layout.inner
    itemsize = arrays[0].itemsize
    G = plan.G
    D = C // G
    labelled = plan.labels is not None

    by_rows = inner == 1 or (inner < RUNS_FROM and outer >= 8)
    if by_rows and not labelled:
        # bundles of at least 4 cache lines and at most 1024 elements of a row
        together = max(1, 1024 // (D * inner)) if outer > 1 else G
        while G % together:
            together -= 1
        bundles = G // together
    else:
        together, bundles = (G, 1) if labelled else (1, G)
    width = C // bundles
    segments = C if labelled else together
    # one row a sample, and few enough elements that the whole sample is in L1 or nearly
    table = outer == inner == 1 and dense and C <= TABLE_CHANNELS
    lanes = table and in_lanes and (labelled or where is not None or D <= LANES_TO)
    table = table and not lanes and not labelled and where is None
    if lanes:  # a task is a block of samples
        N, samples = -(-N // LANES), LANES
    else:
        samples = 1
    by_columns = by_rows and (outer >= 8 or labelled) and (width // segments) * inner < 1024

    # chunks: about 1/32 of a task, 8192 to 65536 elements
    elements = outer * width * inner * samples
    most = 65536 if dense else 16384
    # rows: coefficients and sums of each column are made once for a chunk, so it is as large as it may be: with half of
    # that, (2, 8, 8, 1280) in 32 groups took 1.3 times as long, forward and backward
    target = most if by_rows else min(max(1 << max(elements // 32, 1).bit_length(), 8192), most)
    if inner > target and not by_rows:
        rows, channels, part = 1, 1, target
    else:
        part = inner
        channels = width if segments > 1 and not labelled else min(max(target // inner, 1), width)
        if by_columns:
            channels = width
        rows = 1
        if channels == width:
            rows = max(target // (width * inner), 1)
            if by_columns:
                # sums of each column are kept for each chunk: enough rows that they are < 1 % of x, but not so
                # many that float64 loses bits by adding one after another (12u over 6000 rows)
                limit = 512 if compute == "float64" else 2048
                rows = min(max(rows, min(outer // 16, limit)), limit)
            rows = min(rows, outer)
            if by_rows and rows < outer:
                # chunks of one size, and a multiple of four of them: no thread waits for another's last one; but two
                # with labels, where a column's moments are kept for each chunk
                count = -(-outer // rows)
                rows = -(-outer // (count if labelled and count == 2 else count + 3 & ~3))
    if table or lanes:
        rows, channels, part = 1, width, 1
    row_chunks, channel_chunks, parts = -(-outer // rows), -(-width // channels), -(-inner // part)
    chunks = row_chunks * channel_chunks * parts
    layers = row_chunks * parts

    # schedule
    threads = max(setting, 1)
    tasks = N * bundles
    task_bytes = elements * sum(a.itemsize for a in arrays)
    total = tasks * task_bytes
    if total < THREADED_FROM:
        threads = 1
    read_bytes = elements * sum(a.itemsize for a in arrays[: len(arrays) - writes])
    part_samples = max(-(-N // 64), 1)
    if gradients:
        limit = max(layout.N * plan.S * itemsize // 100, (8 << 20) // max(C, 1)) // (16 * gradients)
        part_samples = max(part_samples, -(-N // max(limit, 1)))
        # parts cost memory and merging: each for a good piece of work, where there is one
        part_samples = max(part_samples, min(-(-PART_BYTES // (task_bytes * bundles)), -(-N // 8)))
    split = not (table or lanes) and (read_bytes > OWN_CACHE or (threads > 1 and tasks < 8 * threads))
    ticket_samples, ticket_bundles = 1, bundles
    if gradients:
        ticket_samples = part_samples
    gradient_parts = -(-N // part_samples)
    if not split:
        grain = max(64 << 10, total // (threads * 64)) if threads > 1 else total
        if not gradients:
            ticket_samples = min(max(grain // (task_bytes * bundles), 1), N)
        ticket_bundles = min(max(grain // (task_bytes * ticket_samples), 1), bundles)
    bundle_tickets = -(-bundles // ticket_bundles)
    wave_tasks = min(max(SHARED_CACHE // max(read_bytes, 1), 1), tasks)
    tickets = phases * tasks * chunks if split else -(-N // ticket_samples) * bundle_tickets
    slots = max(min(threads, tickets), 1)

    # memory
    records = together * w.RECORD_BYTES
    partials = chunks * w.PARTIAL_BYTES if segments == 1 else layers * segments * w.PARTIAL_BYTES
    if labelled:
        partials = layers * w.PARTIAL_BYTES * _padded(C)
    partials_at = records
    sums_at = partials_at + partials
    totals_at = sums_at + 8 * sums * layers * _padded(width)
    store = _line(totals_at + 8 * sums * _padded(width))
    columns = _padded(channels * part)
    if by_rows and channels * part < LANES:  # as many rows as fill vectors, and those that are left (`rows_together`)
        columns = _padded(3 * (SHORT_ROWS + LANES))
    weight_at = w.CALL_BYTES
    bias_at = weight_at + 8 * _padded(C)
    own_records_at = _line(weight_at + 8 * vectors * _padded(C))
    own_store_at = own_records_at + (records * (2 if table else 1) if sums else 0)  # of a table, two samples'
    blocks_at = own_store_at + (0 if split else store) + 64  # one partial before the blocks
    span = (width // segments if segments > 1 else channels) * part
    block = 2048 if compute == "float64" else 4096
    blocks = rows * -(-span // block) if span >= block else -(-rows // max(block // span, 1))
    room = max(blocks * w.PARTIAL_BYTES, 2 * 8 * LANES * sums, SUMS * FOLDED_SUM if sums else 0, 64)
    if by_columns or (by_rows and sums):
        room = max(room, 8 * max(6, 2 + 2 * sums) * columns)
    if labelled:  # fields of a chunk's channels; partials of all channels, merged, then sorted by group
        room = max(
            room, 8 * 4 * _padded(channels) + 2 * FOLDED_SUM + 2 * 8 * LANES, 64 + 2 * w.PARTIAL_BYTES * _padded(C)
        )
    real = 8 if "float64" in (plan.x_dtype, plan.y_dtype) else 4
    turned_bytes = LANES * real * _padded(C)
    statistics_at = turned_at = turned_mask_at = 0
    if lanes:  # before them a tile of 16 x 16 and addresses
        statistics_at = _line(blocks_at + LANES * (LANES * real + 8))
        turned_at = statistics_at + 2 * 8 * LANES * G
        turned_mask_at = turned_at + (2 * turned_bytes + 2 * FOLDED * _padded(C) if sums else turned_bytes)
        room = turned_mask_at + (0 if where is None else 2 * LANES * _padded(C)) - blocks_at
    coefficients_at = _line(blocks_at + room)
    coefficient_bytes = _line((columns + LANES) * ITEMSIZE[compute])  # by a vector they go on after their end
    pieces_at = coefficients_at + (coefficients * coefficient_bytes if by_rows else 0)
    piece_bytes = 0 if dense else _line(rows * channels * part * 8 + 128)
    mask_piece_at = pieces_at + piece_bytes * len(arrays)
    kept_at = _line(mask_piece_at + (0 if where is None else rows * channels * part + 128))
    kept = 4 * chunks * rows * channels * part
    keeps = keeps and not (split or by_rows) and read_bytes + kept <= OWN_CACHE * 3 // 2
    if lanes and sums and plan.activation is not None:  # of one group, in float64
        keeps, kept = True, 8 * LANES * int(np.diff(plan.group_bounds).max())
    scratch = _line(kept_at + (kept if keeps else 0))
    rounds = phases * -(-tasks // wave_tasks) if split else 1
    progress_at = w.HEADER_BYTES + 64 * rounds * slots
    header = progress_at + (16 * tasks if split else 0)
    gradient_bytes = 8 * gradients * 2 * _padded(C)
    gradients_at = _line(header)
    scratch_at = _line(gradients_at + gradient_parts * gradient_bytes)
    store_at = scratch_at + slots * scratch
    work_bytes = store_at + (tasks * store if split else 0)

    strides = [a.strides for a in arrays]
    mask_dense = False
    if where is not None:
        strides.append(np.broadcast_to(where, plan.shape).strides)
        both = [[s // arrays[0].itemsize for s in strides[0]], strides[-1]]
        shared = Layout.of(plan.shape, plan.batch_axes, plan.channel_axis, both)
        mask_dense = shared.kind == "dense" and shared.axes == layout.axes and shared.inner == inner
    axes = tuple(_axes(plan, layout, s) for s in strides)
    words = np.zeros(w.WORDS, np.int64)
    together_bytes = sum(a.nbytes for a in arrays)
    stream_from = STREAM_FROM if setting else STREAM_CHUNK_FROM
    values = {
        w.N: N, w.OUTER: outer, w.C: C, w.INNER: inner, w.BUNDLES: bundles, w.BUNDLE_CHANNELS: width,
        w.GROUPS: together, w.SEGMENTS: segments, w.ALL_GROUPS: G, w.GROUP_CHANNELS: 0 if labelled else D,
        w.ROWS: rows, w.CHANNELS: channels, w.PART: part,
        w.ROW_CHUNKS: row_chunks, w.CHANNEL_CHUNKS: channel_chunks, w.PARTS: parts, w.CHUNKS: chunks, w.LAYERS: layers,
        w.BY_COLUMNS: by_columns, w.BY_ROWS: by_rows, w.SPLIT: split,
        w.TICKETS: tickets, w.TICKET_SAMPLES: ticket_samples, w.TICKET_BUNDLES: ticket_bundles,
        w.BUNDLE_TICKETS: bundle_tickets, w.WAVE_TASKS: wave_tasks,
        w.SLOTS: slots, w.SCRATCH_AT: scratch_at, w.SCRATCH_BYTES: scratch, w.STORE_AT: store_at, w.STORE_BYTES: store,
        w.PROGRESS_AT: progress_at, w.GRADIENTS_AT: gradients_at, w.GRADIENT_BYTES: gradient_bytes,
        w.PARTIALS_AT: partials_at, w.SUMS_AT: sums_at, w.TOTALS_AT: totals_at,
        w.WEIGHT_AT: weight_at, w.BIAS_AT: bias_at, w.OWN_STORE_AT: own_store_at, w.BLOCKS_AT: blocks_at,
        w.COEFFICIENTS_AT: coefficients_at, w.COEFFICIENT_BYTES: coefficient_bytes,
        w.PIECES_AT: pieces_at, w.PIECE_BYTES: piece_bytes,
        w.STREAM: dense and together_bytes >= stream_from and (by_rows or inner * arrays[-1].itemsize >= 2048),
        w.EPS: struct.unpack("q", struct.pack("d", plan.eps))[0],
        w.WEIGHT_KIND: weight_kind, w.BIAS_KIND: bias_kind,
        w.LABELS: 0 if plan.labels is None else _address(plan.labels),
        w.ORDER: _address(plan.channel_order), w.BOUNDS: _address(plan.group_bounds),
        w.CLEARED: 0 if slots == 1 and not split and not gradients else gradients_at + gradient_parts * gradient_bytes,
        w.MASK_PIECE_AT: mask_piece_at, w.OWN_RECORDS_AT: own_records_at, w.PADDED_WIDTH: _padded(width),
        w.SAMPLES: layout.N, w.LANE_STATISTICS_AT: statistics_at,
        w.TURNED_AT: turned_at, w.TURNED_BYTES: turned_bytes, w.TURNED_MASK_AT: turned_mask_at,
        w.KEPT_AT: kept_at if keeps else 0, w.TOUCHED: TOUCHED if together_bytes >= TOUCHED_FROM else 0,
        w.PHASES: phases, w.PART_SAMPLES: part_samples, w.GRADIENT_PARTS: gradient_parts,
    }  # fmt: skip
    for name, value in values.items():
        words[name] = value
    for k, array in enumerate(arrays):
        at = w.ARRAYS + k * w.ARRAY_WORDS
        sn, so = layout.strides[k] if dense else (0, 0)
        words[at : at + 6] = (
            *(not dense, sn * array.itemsize, so * array.itemsize, array.itemsize, _address(axes[k])),
            axes[k][1] > 1,
        )
    if where is not None:
        sn, so = shared.strides[1] if mask_dense else (0, 0)
        at = w.ARRAYS + w.MASK * w.ARRAY_WORDS
        words[at : at + 5] = (not mask_dense, sn, so, 1, _address(axes[-1]))
    return Geometry(
        words,
        _address(words),
        work_bytes,
        slots,
        by_rows,
        dense,
        table,
        lanes,
        axes,
    )


def _padded(count: int) -> int:
    """Elements of an array that is read and written 16 lanes at a time."""
    return -(-count // LANES) * LANES + LANES


def _line(count: int) -> int:
    """Bytes to the end of the cache line."""
    return -(-count // 64) * 64


def _address(array: np.ndarray[Any, Any]) -> int:
    """Address of an array's first element."""
    return int(array.__array_interface__["data"][0])


def _axes(plan: Plan, layout: Layout, strides: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Channel stride, numbers of batch, outer and inner axes, and (size, stride) of each, in bytes, merged."""
    position = layout.axes.index(plan.channel_axis)
    batch = len(plan.batch_axes)
    groups = []
    for axes in (layout.axes[:batch], layout.axes[batch:position], layout.axes[position + 1 :]):
        pairs: list[tuple[int, int]] = []
        for axis in axes:
            size, stride = plan.shape[axis], strides[axis]
            if size == 1:
                continue
            if pairs and pairs[-1][1] == size * stride:
                pairs[-1] = (pairs[-1][0] * size, stride)
            else:
                pairs.append((size, stride))
        groups.append(pairs)
    flat = [value for pairs in groups for pair in pairs for value in pair]
    return np.array([strides[plan.channel_axis], *map(len, groups), *flat], dtype=np.int64)


__all__ = ["SUMS", "Geometry", "of"]
