"""From an operation to its kernels: what a call allocates and launches, worked out once for all calls alike.

`run` is one call. Everything but the addresses (boxes, threads, shared memory, functions, scalar arguments) depends on
the plan, the device, and the dtypes, strides and alignment of the arrays alone: a `Program`, built by `_Builder` at the
first call of its kind and kept. A call then looks it up, allocates, fills in the arrays and launches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..plan import Plan
from . import config
from .compile import Specialisation, device_properties, kernel
from .config import Box, Problem
from .strided import DTYPES, contiguous, dtype_of, grouping, like, mask_of, name_of

__all__ = ["added_rows", "program", "run"]

Array = Any

LARGE = {
    "forward": ("x",),
    "normalize": ("x",),
    "moments": ("x",),
    "backward": ("x", "v"),
    "backward_of_piece": ("x", "v"),
    "jvp": ("x", "v"),
    "double_backward": ("x", "u", "v"),
    "double_backward_of_piece": ("x", "u", "v"),
}
"""Inputs of x's shape of each operation, in the order of the layout's strides; `v` is dy or the tangent, `u` is ddx."""

PARAMETERS = ("weight", "bias", "tweight", "tbias", "ddweight", "ddbias")

CURVED = ("silu", "gelu", "gelu_tanh")
"""Activations with a second derivative."""


class New(NamedTuple):
    """An array that a call allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...] | None = None
    """In bytes; None for C order."""


class Launch:
    """One kernel launch without its arrays: these are known by name."""

    __slots__ = ("_arguments", "_arrays", "_block", "_function", "_grid", "_shared")

    def __init__(self, function: Any, blocks: int, threads: int, arguments: tuple[Any, ...], shared: int = 0) -> None:
        self._function, self._shared = function, shared
        self._grid, self._block = (blocks,), (threads,)
        self._arguments = list(arguments)
        self._arrays = [(at, name) for at, name in enumerate(arguments) if isinstance(name, str)]

    def __call__(self, arrays: dict[str, Array]) -> None:
        """Launch on the current stream with these arrays."""
        arguments = self._arguments.copy()
        for at, name in self._arrays:
            arguments[at] = arrays[name]
        self._function(self._grid, self._block, tuple(arguments), shared_mem=self._shared)


class Program(NamedTuple):
    """What calls alike do. It holds no array."""

    copied: tuple[str, ...]
    """Weights and the like that the kernels need in one stretch."""
    new: tuple[New, ...]
    launches: tuple[Launch, ...]


class Given(NamedTuple):
    """What a program depends on of an array that is given."""

    dtype: Any
    strides: tuple[int, ...]
    aligned: bool
    """Whether it begins at a multiple of 16 bytes."""


def run(operation: str, plan: Plan, arrays: dict[str, Array], where: Array = None) -> dict[str, Array]:
    """Run an operation on the current device, which is that of x; its results are added to `arrays`.

    Parameters
    ----------
    operation : str
        A key of `LARGE`, and a method of `_Builder`.
    plan : Plan
        Of a dense layout and not empty.
    arrays : dict
        By name, None for what is not given. Where `y` is, it receives the result.
    where : array, optional
        The mask.
    """
    import cupy

    mask = None
    if where is not None:
        arrays["where"], mask = mask_of(where, plan)
    given = tuple([(name, a.dtype, a.strides, a.data.ptr % 16 == 0) for name, a in arrays.items() if a is not None])
    made = program(operation, plan, arrays["x"].data.device_id, mask, given)
    for name in made.copied:
        arrays[name] = contiguous(arrays[name])
    for name, shape, dtype, strides in made.new:
        if strides is None:
            arrays[name] = cupy.ndarray(shape, dtype)
        else:
            memory = cupy.cuda.alloc(math.prod(shape) * dtype.itemsize)
            arrays[name] = cupy.ndarray(shape, dtype, memory, strides)
    if plan.labels is not None:
        arrays["labels"], arrays["order"], arrays["bounds"] = grouping(plan)
    for launch in made.launches:
        launch(arrays)
    return arrays


@lru_cache(maxsize=1024)
def program(
    operation: str,
    plan: Plan,
    device: int,
    mask: tuple[int, ...] | None,
    given: tuple[tuple[str, Any, tuple[int, ...], bool], ...],
) -> Program:
    """Work a program out; `mask` holds the strides of a mask, `given` the name and the `Given` of each array."""
    builder = _Builder(operation, plan, device_properties(device), mask, {name: Given(*rest) for name, *rest in given})
    getattr(builder, operation)()
    copied = [name for name in PARAMETERS if plan.C > 1 and name in builder.given and not builder.in_one_stretch(name)]
    return Program(tuple(copied), tuple(builder.new.values()), tuple(builder.launches))


def added_rows(rows: int, channels: int, dtype: Any, result: str) -> Launch:
    """`dweight` and `dbias`, of the dtype `result`, from the sums `partial` of shape (rows, channels, 2)."""
    blocks, threads = config.row_threads(rows, channels)
    return Launch(
        kernel(Specialisation.of("parameter_gradients"), 0),
        blocks,
        threads,
        (
            *("partial", *_ints(dtype == np.float64, rows, channels)),
            *("dweight", "dbias", *_ints(DTYPES[result], 1)),
        ),
        16 * threads,
    )


class _Builder:
    """Puts a program together. An array stands in the arguments of a kernel as its name."""

    def __init__(
        self,
        operation: str,
        plan: Plan,
        device: config.Device,
        mask: tuple[int, ...] | None,
        given: dict[str, Given],
    ) -> None:
        self.plan, self.device, self.given = plan, device, given
        self.new: dict[str, New] = {}
        self.launches: list[Launch] = []
        self.mask = () if mask is None else ("where", *(np.int64(stride) for stride in mask))
        self.gradients = "float64" if operation.endswith("_of_piece") else plan.weight_dtype
        layout = plan.layout
        assert layout is not None  # serves() said so
        large = LARGE[operation]
        self.strides = dict(zip((*large, "y"), layout.strides, strict=False))
        """(sn, so) of the arrays of x's shape, in elements."""
        if operation == "moments":
            self.strides.pop("y", None)
        elif "y" not in given:
            self.output("y")
        row, sample = layout.C * layout.inner, layout.outer * layout.C * layout.inner
        itemsize = {name: config.ITEMSIZE[plan.y_dtype if name == "y" else plan.x_dtype] for name in self.strides}
        doubles = operation.startswith(("moments", "double_backward")) or "float64" in (
            *(plan.x_dtype, plan.y_dtype, plan.weight_dtype, plan.bias_dtype),
            *(name_of(given[name].dtype) for name in ("tweight", "tbias") if name in given),
        )
        self.problem = Problem(
            N=layout.N,
            outer=layout.outer,
            C=layout.C,
            inner=layout.inner,
            unit=1 if plan.labels is not None else layout.C // plan.G,
            itemsize=config.ITEMSIZE[plan.x_dtype],
            real=8 if doubles else 4,
            tangent=operation.startswith(("jvp", "double_backward")),
            arrays=len(large),
            masked=plan.masked,
            heavy=plan.activation in CURVED and config.ITEMSIZE[plan.x_dtype] == 2,
            contiguous_rows=all(so == row or layout.outer == 1 for _, so in self.strides.values()),
            contiguous_samples=all(sn == sample or layout.N == 1 for sn, _ in self.strides.values()),
            aligned_rows=all(
                (so * itemsize[name] % config.SECTOR == 0 or layout.outer == 1)
                and (sn * itemsize[name] % config.SECTOR == 0 or layout.N == 1)
                for name, (sn, so) in self.strides.items()
            ),
            aligned=all(self.aligned(name) for name in self.strides),
        )

    # ------------------------------------------------------------ operations

    def forward(self) -> None:
        """`y`, and `mean` and `rstd` of the plan's statistics."""
        mean, rstd = (self.empty(name, self.plan.stats_shape) for name in ("mean", "rstd"))
        box = self.resident_box()
        if box is None:
            planes = self.planes()
            self.merged_moments(mean, rstd, planes)
            self.apply(mean, rstd, planes)
            return
        self.launch(
            "forward",
            box,
            (*_ints(box.group_team), *self.array("x"), *self.parameters("weight", "bias")),
            (np.float64(self.plan.eps), *self.array("y"), mean, rstd, *self.mask, *self.label_groups()),
            config.forward_bytes(box, self.problem),
        )

    def normalize(self) -> None:
        """`y` under the caller's `mean` and `rstd`."""
        self.apply("mean", "rstd", None)

    def moments(self) -> None:
        """`count`, `mean` and `m2`."""
        mean, m2 = (self.empty(name, self.plan.stats_shape) for name in ("mean", "m2"))
        count = self.empty("count", self.plan.stats_shape, np.int64)
        self.merged_moments(mean, m2=m2, count=count)

    def backward(self) -> None:
        """`y`, which is dx, `dweight` and `dbias`; with the caller's `rstd` if there is one."""
        self.differentiated()
        self.parameter_gradients()

    backward_of_piece = backward

    def jvp(self) -> None:
        """`y`, which is the tangent of the output."""
        self.differentiated()

    def double_backward(self) -> None:
        """`y`, which is the gradient of dy, `gx`, `dweight` and `dbias`."""
        plan, p = self.plan, self.problem
        gx = self.output("gx")
        box = config.split_box(p, self.device)
        planes = self.planes()
        self.merged_moments(planes, planes, planes)
        parameters = self.parameters("weight", "bias", "ddweight", "ddbias")
        arrays = (*self.array("x"), *self.array("v"), *self.array("u"))
        sums_of_channel = 10 if plan.activation in CURVED else 5
        sums = self.empty("sums", (p.N, box.spatial_parts, p.C, sums_of_channel))
        shared = config.second_bytes(box, p)
        before = (*arrays, *parameters, planes, np.int32(plan.G), *self.labels())
        self.launch("second_sums", box, (*_ints(box.channel_team), *before), (sums, *self.mask), shared)
        channel_sums = self.empty("channel_sums", (p.N, p.C, sums_of_channel))
        partial = self.empty("partial", (p.N, p.C, 2))
        threads, team = config.merge_channel_threads(p.unit, box.spatial_parts, plan.labels is not None)
        self.merge(
            "merge_second",
            p.N * plan.G,
            threads,
            *(*_ints(p.C, p.unit, plan.G), *self.grouping(), *_ints(plan.labels is not None)),
            *(*_ints(box.spatial_parts, team), sums, *parameters, planes, channel_sums, partial),
        )
        self.launch("second_apply", box, before, (*self.array("y"), *self.array(gx), *self.mask), shared)
        self.parameter_gradients()

    double_backward_of_piece = double_backward

    # ------------------------------------------------------------ steps of them

    def differentiated(self) -> None:
        """dx (or the tangent of y) to `y`, and sums of v and v x_hat of each channel to `partial`, (rows, C, 2)."""
        box = self.resident_box()
        if box is None:
            self.differentiated_in_parts()
            return
        p = self.problem
        sums = config.channel_sums(p, box)
        partial = self.empty("partial", (sums.rows, p.C, 2), np.float64 if p.real == 8 else np.float32)
        parameters = self.parameters("weight", "bias", "tweight", "tbias")
        self.launch(
            "backward",
            box,
            (
                *_ints(sums.repeat, box.group_team, box.channel_team),
                *(*self.array("x"), *self.array("v"), *parameters),
            ),
            (
                *(np.float64(self.plan.eps), *self.given_rstd(partial)),
                *(*self.array("y"), partial, *self.mask, *self.label_groups()),
            ),
            config.backward_bytes(box, p),
            sums.rows * box.channel_tiles,
        )

    def differentiated_in_parts(self) -> None:
        """As `differentiated`, each group split over blocks; the sums of each channel are (N, C, 2)."""
        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        planes = self.planes()
        arrays = (*self.array("x"), *self.array("v"))
        parameters, tangents = self.parameters("weight", "bias"), self.parameters("tweight", "tbias")
        # An activation's slope needs x_hat, and so the statistics, before the sums. So does the dweight of a channel of
        # few elements, whose mean may be far nearer to them than the box's is.
        bent = plan.activation is not None and not p.tangent
        known = plan.labels is not None or bent or box.rows * box.columns < config.FEW_OF_CHANNEL
        if known:
            self.merged_moments(planes, planes, planes)
        moments = self.empty("moments", (p.N, box.parts, p.units, config.part_values(p.real)))
        sums = self.empty("sums", (p.N, box.spatial_parts, p.C, 2))
        self.launch(
            "backward_sums",
            box,
            (*_ints(box.group_team, box.channel_team), *arrays, *parameters),
            (
                *(planes, np.int32(known), np.int32(plan.G), *self.labels(), *self.given_rstd(planes)),
                *(moments, sums, *self.mask),
            ),
            config.backward_sums_bytes(box, p),
        )
        partial = self.empty("partial", (p.N, p.C, 2))
        threads, team = config.merge_channel_threads(p.unit, box.spatial_parts, plan.labels is not None)
        self.merge(
            "merge_backward",
            p.N * plan.G,
            threads,
            *(*_ints(p.C, p.unit, plan.G), *self.grouping(), *_ints(plan.labels is not None)),
            *_ints(box.channels, box.parts, box.spatial_parts, team),
            *(moments, sums, *self.parameters("weight"), np.float64(plan.eps)),
            *(*self.given_rstd(planes), np.int32(known), planes, partial),
        )
        box = config.apply_box(p, box)
        self.launch(
            "backward_apply",
            box,
            (*arrays, *parameters, *tangents),
            (planes, np.int32(plan.G), *self.labels(), *self.array("y"), *self.mask),
            config.backward_apply_bytes(box, p),
        )

    def parameter_gradients(self) -> None:
        """`dweight` and `dbias` from `partial`."""
        for name in ("dweight", "dbias"):
            self.empty(name, (self.plan.C,), dtype_of(self.gradients))
        rows, channels, _ = self.new["partial"].shape
        self.launches.append(added_rows(rows, channels, self.new["partial"].dtype, self.gradients))

    def merged_moments(
        self,
        mean: str,
        rstd: str | None = None,
        planes: str | None = None,
        m2: str | None = None,
        count: str | None = None,
    ) -> None:
        """Moments of the parts of each group, merged: mean, rstd, and what other kernels read; or mean, m2, count.

        What is written to `planes` comes last: it may be given as mean and rstd, too.
        """
        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        part = config.part_values(p.real)
        parts = self.empty("parts", (p.N, box.parts, p.units, part))
        shared = config.moments_bytes(box, p)
        self.launch("moments", box, _ints(box.group_team), (*self.array("x"), parts, *self.mask), shared)
        threads, team = config.merge_threads(box.parts)
        groups = p.N * p.units
        results = (
            *(np.float64(plan.eps), np.int32(m2 is not None), *self.given_rstd(parts)),
            *(parts if name is None else name for name in (mean, rstd, m2, count, planes)),
        )
        labelled = plan.labels is not None
        channels = self.empty("channels", (p.N, p.C, part)) if labelled else parts
        self.merge(
            "merge_moments",
            -(-groups * team // threads),
            threads,
            *(parts, np.int64(groups), *_ints(p.units, box.parts, team)),
            *(channels, np.int32(labelled), *results),
        )
        if labelled:
            groups = p.N * plan.G
            threads, team = config.merge_label_threads(p.C, plan.G)
            self.merge(
                "merge_labels",
                -(-groups * team // threads),
                threads,
                *(channels, np.int64(groups), *_ints(p.C, plan.G, team), *self.grouping(), *results),
            )

    def apply(self, mean: str, rstd: str, planes: str | None) -> None:
        """`y` under the statistics in `planes`, or under a mean and rstd that the caller gave."""
        box = config.apply_box(self.problem, config.split_box(self.problem, self.device))
        self.launch(
            "apply_statistics",
            box,
            (*self.array("x"), mean, rstd, planes or mean, *_ints(planes is not None)),
            (np.int32(self.plan.G), *self.labels(), *self.parameters("weight", "bias"), *self.array("y")),
            config.apply_bytes(box, self.problem),
        )

    # ------------------------------------------------------------ launches

    def launch(
        self,
        name: str,
        box: Box,
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        shared: int,
        blocks: int | None = None,
    ) -> None:
        """One block for each box, unless `blocks` says otherwise."""
        p = self.problem
        parameters = (  # BOX_PARAMETERS of kernels/box.cuh
            *(np.int64(p.N), np.int64(p.outer), np.int32(p.C), np.int64(p.inner), np.int32(p.unit)),
            *_ints(box.samples, box.rows, box.channels, box.columns),
            *_ints(box.row_tiles, box.channel_tiles, box.column_tiles, box.pitch, box.flat),
        )
        function = self.kernel(name, shared)
        arguments = (*parameters, *before, *after)
        self.launches.append(Launch(function, box.tiles if blocks is None else blocks, box.threads, arguments, shared))

    def merge(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """A kernel that merges what others have left of each group."""
        shared = 8 * config.SCRATCH_DOUBLES
        self.launches.append(Launch(self.kernel(name, shared), blocks, threads, arguments, shared))

    def kernel(self, name: str, shared: int) -> Any:
        """A kernel under the options of this call."""
        plan = self.plan
        specialisation = Specialisation.of(
            name,
            x_dtype=plan.x_dtype,
            y_dtype=plan.y_dtype,
            activation=plan.activation,
            masked=plan.masked,
            vector_channels=self.vector_channels(),
            single=self.problem.single,
            labelled=self.problem.labels > 0,
            tangent=self.problem.tangent,
            double=self.problem.real == 8,
        )
        return kernel(specialisation, shared)

    def vector_channels(self) -> int:
        """Channels that an aligned 16-byte vector of y lies in at most: 1, 2, or 16 for any number."""
        name, dtype = ("y", self.plan.y_dtype) if "y" in self.strides else ("x", self.plan.x_dtype)
        sn, so = self.strides[name]
        vector = 16 // config.ITEMSIZE[dtype]
        if self.problem.inner % vector == sn % vector == so % vector == 0 and self.aligned(name):
            return 1
        return 2 if self.problem.inner >= vector else 16

    def resident_box(self) -> Box | None:
        """Box of whole groups, if they fit in shared memory.

        Label groups are put together from their channels, unless these are single elements: then the problem becomes
        one of boxes of whole samples, if they fit.
        """
        if self.plan.labels is None:
            return config.resident_box(self.problem, self.device)
        if not self.problem.single:
            return None
        whole = replace(self.problem, unit=self.problem.C, labels=self.plan.G)
        box = config.resident_box(whole, self.device)
        if box is not None:
            self.problem = whole
        return box

    # ------------------------------------------------------------ arrays and arguments

    def empty(self, name: str, shape: tuple[int, ...], dtype: Any = np.float64) -> str:
        """A new array, by its name."""
        self.new[name] = New(name, shape, np.dtype(dtype))
        return name

    def output(self, name: str) -> str:
        """A new array in x's memory order."""
        plan = self.plan
        assert plan.layout is not None
        dtype = dtype_of(plan.y_dtype)
        x, itemsize = self.given["x"], config.ITEMSIZE[plan.x_dtype]
        strides, self.strides[name] = like(plan.shape, x.strides, itemsize, dtype, plan.layout)
        self.new[name] = New(name, plan.shape, dtype, strides)
        return name

    def planes(self) -> str:
        """Place for what the kernels hand on of each group, (values, N, G)."""
        return self.empty("planes", (config.PLANES, self.plan.N, self.plan.G))

    def aligned(self, name: str) -> bool:
        """Whether an array begins at a multiple of 16 bytes, as a new one does."""
        return name not in self.given or self.given[name].aligned

    def in_one_stretch(self, name: str) -> bool:
        """Whether the channels of a weight or bias follow each other in memory."""
        return self.given[name].strides == (self.given[name].dtype.itemsize,)

    def array(self, name: str) -> tuple[Any, ...]:
        """Arguments of an array of x's shape."""
        sn, so = self.strides[name]
        return (name, np.int64(sn), np.int64(so))

    def parameters(self, *names: str) -> tuple[Any, ...]:
        """Arguments of weights or biases; the pointer of an absent one is not read."""
        arguments: list[Any] = []
        for name in names:
            given = self.given.get(name)
            arguments += ("x", np.int32(-1)) if given is None else (name, np.int32(DTYPES[name_of(given.dtype)]))
        return tuple(arguments)

    def given_rstd(self, placeholder: str) -> tuple[Any, ...]:
        """Arguments (rstd, have_rstd)."""
        have = "rstd" in self.given
        return ("rstd" if have else placeholder, np.int32(have))

    def labels(self) -> tuple[Any, ...]:
        """Arguments (labels, labelled)."""
        return ("x", np.int32(0)) if self.plan.labels is None else ("labels", np.int32(1))

    def label_groups(self) -> tuple[Any, ...]:
        """LABEL_PARAMETERS of kernels/box.cuh."""
        return (np.int32(self.plan.G), "labels", "order", "bounds") if self.problem.labels else ()

    def grouping(self) -> tuple[str, str]:
        """Arguments (order, bounds)."""
        return ("x", "x") if self.plan.labels is None else ("order", "bounds")


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)
