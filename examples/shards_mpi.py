"""Group norm of an array that lies in slabs, one a process: forward and backward, as in spatially split training.

    mpirun -n 2 python examples/shards_mpi.py

Each process holds some rows of every image. Statistics of whole images take one exchange of a few numbers a group, and
so do the sums of the backward; x, y and the gradients stay where they are. The exchanged values are merged in the order
of the ranks, so that all processes have the same bits.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import numpy as np

import cugn

Array = np.ndarray[Any, Any]


class Saved(NamedTuple):
    """What the forward keeps for the backward."""

    count: Array
    mean: Array
    rstd: Array


def gathered(comm: Any, values: tuple[Array, ...]) -> list[list[Array]]:
    """The arrays of all ranks, in one exchange."""
    mine = np.concatenate([np.ravel(v).astype(np.float64) for v in values])
    everyones = np.empty((comm.size, mine.size))
    comm.Allgather(mine, everyones)
    ends = np.cumsum([np.size(v) for v in values])[:-1]
    shapes = [np.shape(v) for v in values]
    return [[part.reshape(s) for part, s in zip(np.split(row, ends), shapes, strict=True)] for row in everyones]


def forward(comm: Any, x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> tuple[Array, Saved]:
    """y of this process's slab, and the statistics of whole images."""
    moments = gathered(comm, cugn.moments(x, groups))
    whole = reduce(cugn.Moments.merge, (cugn.Moments(*fields) for fields in moments))
    saved = Saved(whole.count, whole.mean, whole.rstd(eps))
    return cugn.normalize(x, saved.mean, saved.rstd, groups, weight, bias), saved


def backward(comm: Any, dy: Array, x: Array, groups: int, weight: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dx of this process's slab, and dweight and dbias of whole images."""
    mine = cugn.backward_sums(dy, x, saved.mean, saved.rstd, groups, weight)
    whole = reduce(cugn.BackwardSums.merge, (cugn.BackwardSums(*fields) for fields in gathered(comm, mine)))
    means = whole.sum_wdy / saved.count, whole.sum_wdy_xhat / saved.count
    dx = cugn.backward_apply(dy, x, saved.mean, saved.rstd, *means, groups, weight)
    return dx, whole.dweight, whole.dbias


def main() -> None:
    """Split images between the processes and compare with the whole."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(0)  # the same in all processes: this is a demonstration
    x = rng.normal(1e4, 1, (2, 8, 30, 40)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    weight, bias = rng.normal(1, 0.1, (2, 8))

    rows = np.array_split(np.arange(x.shape[2]), comm.size)[comm.rank]
    slab, dy_slab = (np.ascontiguousarray(array[:, :, rows]) for array in (x, dy))
    y, saved = forward(comm, slab, 4, weight, bias)
    dx, dweight, dbias = backward(comm, dy_slab, slab, 4, weight, saved)

    whole = cugn.group_norm_backward(dy, x, 4, weight)
    errors = {
        "y": np.abs(y - cugn.group_norm(x, 4, weight, bias)[:, :, rows]).max() / np.abs(y).max(),
        "dx": np.abs(dx - whole.dx[:, :, rows]).max() / np.abs(dx).max(),
        "dweight": np.abs(dweight - whole.dweight).max() / np.abs(dweight).max(),
        "dbias": np.abs(dbias - whole.dbias).max() / np.abs(dbias).max(),
    }
    for name, error in errors.items():
        worst = comm.allreduce(error, op=MPI.MAX)
        if comm.rank == 0:
            print(f"{comm.size} processes, {name}: {worst:.1e} of its largest value off the whole array's")
        # float32 results of statistics that agree to 1e-10: some units in the last place
        assert worst < 1e-6


if __name__ == "__main__":
    main()
