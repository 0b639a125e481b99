"""The CUDA engine: CuPy arrays through hand-written kernels, on the current stream of x's device.

Nothing here waits for the device or reads its memory, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plan import Plan
from . import config
from .compile import Specialisation, device_properties, kernel
from .config import Box, Problem
from .strided import DTYPES, contiguous, dense_strides, dtype_of, float64, grouping, mask_arguments, name_of

__all__ = ["backward", "forward", "jvp", "moments", "normalize", "serves"]

Array = Any


def serves(plan: Plan, operation: str) -> bool:
    """What the kernels do; the reference does the rest."""
    return (
        operation in ("forward", "backward", "jvp", "moments", "normalize")
        and plan.layout is not None
        and plan.layout.kind == "dense"
    )


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output and statistics of each group."""
    with x.device:
        call = _Call.of(plan, {"x": x}, out, where)
        mean, rstd = call.empty_statistics(), call.empty_statistics()
        box = call.resident_box()
        if box is not None:
            y = call.array("y")
            call.launch(
                "forward",
                "forward",
                box,
                (*_ints(box.group_team), *call.array("x"), *call.parameter(weight), *call.parameter(bias)),
                (np.float64(plan.eps), *y, mean, rstd, *call.where),
                config.forward_bytes(box, call.problem),
            )
        else:
            low, elements = call.empty_statistics(), call.empty_statistics()
            box = call.merged_moments(mean, low=low, rstd=rstd, elements=elements)
            call.apply(box, mean, low, rstd, weight, bias)
        return call.out, mean.reshape(plan.stats_shape), rstd.reshape(plan.stats_shape)


def backward(
    plan: Plan,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    mean: Array,
    rstd: Array,
    where: Array,
    out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x, weight and bias."""
    with x.device:
        call = _Call.of(plan, {"x": x, "v": dy}, out, where)
        dweight, dbias = call.differentiated(weight, bias, None, None, mean, rstd)
        return call.out, dweight, dbias


def jvp(
    plan: Plan,
    tx: Array,
    x: Array,
    weight: Array,
    bias: Array,
    tweight: Array,
    tbias: Array,
    where: Array,
    out: Array,
) -> Array:
    """Tangent of the output along tangents of x, weight and bias."""
    with x.device:
        exact = any(t is not None and t.dtype == np.float64 for t in (tweight, tbias))
        call = _Call.of(plan, {"x": x, "v": tx}, out, where, exact=exact, tangent=True)
        call.differentiated(weight, bias, tweight, tbias, None, None)
        return call.out


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group."""
    import cupy

    with x.device:
        call = _Call.of(plan, {"x": x}, None, where, exact=True, written=False)
        mean, m2 = call.empty_statistics(), call.empty_statistics()
        count = cupy.empty(mean.shape, np.int64)
        call.merged_moments(mean, m2=m2, count=count)
        return tuple(a.reshape(plan.stats_shape) for a in (count, mean, m2))


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    with x.device:
        call = _Call.of(plan, {"x": x}, out, None)
        call.apply(
            config.split_box(call.problem, call.device),
            call.statistics(mean),
            None,
            call.statistics(rstd),
            weight,
            bias,
        )
        return call.out


@dataclass
class _Call:
    """One call: its arrays as the kernels see them."""

    plan: Plan
    arrays: dict[str, tuple[Array, int, int]]
    """x, dy and y as (array, sn, so)."""
    out: Array
    where: tuple[Any, ...]
    problem: Problem
    device: config.Device

    @classmethod
    def of(
        cls,
        plan: Plan,
        inputs: dict[str, Array],
        out: Array,
        where: Array,
        *,
        exact: bool = False,
        tangent: bool = False,
        written: bool = True,
    ) -> _Call:
        import cupy

        layout = plan.layout
        assert layout is not None  # serves() said so
        arrays = {name: (array, *pair) for (name, array), pair in zip(inputs.items(), layout.strides, strict=False)}
        x = inputs["x"]
        if written:
            if out is None:
                out = cupy.empty_like(x, dtype=dtype_of(plan.y_dtype))
                arrays["y"] = (out, *dense_strides(out, layout))
            else:
                arrays["y"] = (out, *layout.strides[len(inputs)])
        row, sample = layout.C * layout.inner, layout.outer * layout.C * layout.inner
        itemsize = config.ITEMSIZE[plan.x_dtype]
        problem = Problem(
            N=layout.N,
            outer=layout.outer,
            C=layout.C,
            inner=layout.inner,
            D=1 if plan.labels is not None else layout.C // plan.G,
            itemsize=itemsize,
            real=8 if exact or "float64" in (plan.x_dtype, plan.y_dtype, plan.weight_dtype, plan.bias_dtype) else 4,
            tangent=tangent,
            arrays=len(inputs),
            masked=plan.masked,
            contiguous_rows=all(so == row or layout.outer == 1 for _, _, so in arrays.values()),
            contiguous_samples=all(sn == sample or layout.N == 1 for _, sn, _ in arrays.values()),
            aligned_rows=all(
                (so * a.itemsize % config.SECTOR == 0 or layout.outer == 1)
                and (sn * a.itemsize % config.SECTOR == 0 or layout.N == 1)
                for a, sn, so in arrays.values()
            ),
        )
        mask = mask_arguments(where, plan) if where is not None else ()
        return cls(plan, arrays, out, mask, problem, device_properties(x.device.id))

    def resident_box(self) -> Box | None:
        """Box of whole groups, if they fit in shared memory; labelled groups are put together from their channels."""
        return None if self.plan.labels is not None else config.resident_box(self.problem, self.device)

    def labels(self) -> tuple[Any, ...]:
        """Arguments (labels, labelled)."""
        if self.plan.labels is None:
            return (self.arrays["x"][0].view(np.int8), np.int32(0))
        return (grouping(self.plan)[0], np.int32(1))

    def grouping(self) -> tuple[Any, ...]:
        """Arguments (order, bounds)."""
        placeholder = self.arrays["x"][0].view(np.int8)
        return (placeholder, placeholder) if self.plan.labels is None else grouping(self.plan)[1:]

    def array(self, name: str) -> tuple[Any, ...]:
        """Arguments of an array."""
        array, sn, so = self.arrays[name]
        return (array, np.int64(sn), np.int64(so))

    def parameter(self, parameter: Array) -> tuple[Any, ...]:
        """Arguments of a weight or bias; the pointer of an absent one is not read."""
        if parameter is None:
            return (self.arrays["x"][0], np.int32(-1))
        return (contiguous(parameter), np.int32(DTYPES[name_of(parameter.dtype)]))

    def empty_statistics(self) -> Array:
        """(N, G) float64."""
        import cupy

        return cupy.empty((self.plan.N, self.plan.G), np.float64)

    def statistics(self, given: Array) -> Array:
        """(N, G) float64 of statistics that the caller supplies."""
        import cupy

        return float64(cupy.broadcast_to(given, self.plan.stats_shape)).reshape(self.plan.N, self.plan.G)

    def same_channel(self) -> bool:
        """Whether every aligned 16-byte vector of y lies in one channel."""
        y, sn, so = self.arrays["y"] if "y" in self.arrays else self.arrays["x"]
        vector = 16 // y.itemsize
        return bool(self.problem.inner % vector == sn % vector == so % vector == 0 == y.data.ptr % 16)

    def box_arguments(self, box: Box) -> tuple[Any, ...]:
        """BOX_PARAMETERS of kernels/box.cuh."""
        p = self.problem
        return (
            *(np.int64(p.N), np.int64(p.outer), np.int32(p.C), np.int64(p.inner), np.int32(p.D)),
            *_ints(box.samples, box.rows, box.channels, box.columns),
            *_ints(box.row_tiles, box.channel_tiles, box.column_tiles, box.pitch, box.flat),
        )

    def specialisation(self, file: str) -> Specialisation:
        """Options of the kernels of this call."""
        plan = self.plan
        return Specialisation(
            file,
            plan.x_dtype,
            plan.y_dtype,
            plan.activation,
            plan.masked,
            self.same_channel(),
            self.problem.tangent,
            self.problem.real == 8,
        )

    def launch(
        self,
        file: str,
        name: str,
        box: Box,
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        shared: int,
        blocks: int | None = None,
    ) -> None:
        """One block for each box, unless `blocks` says otherwise."""
        kernel(self.specialisation(file), name, shared)(
            (box.tiles if blocks is None else blocks,),
            (box.threads,),
            (*self.box_arguments(box), *before, *after),
            shared_mem=shared,
        )

    def differentiated(
        self, weight: Array, bias: Array, tweight: Array, tbias: Array, mean: Array, rstd: Array
    ) -> tuple[Array, Array]:
        """dx to `out`, and dweight and dbias."""
        import cupy

        plan, p = self.plan, self.problem
        parameters = (*self.parameter(weight), *self.parameter(bias))
        tangents = (*self.parameter(tweight), *self.parameter(tbias))
        arrays = (*self.array("x"), *self.array("v"))
        given = self.statistics(rstd) if rstd is not None else None
        box = self.resident_box()
        if box is not None:
            sums = config.channel_sums(p, box)
            partial = cupy.empty((sums.rows, p.C, 2), np.float64 if p.real == 8 else np.float32)
            self.launch(
                "backward",
                "backward",
                box,
                (*_ints(sums.repeat, box.group_team, box.channel_team), *arrays, *parameters, *tangents),
                (
                    *(
                        np.float64(plan.eps),
                        partial.view(np.float64) if given is None else given,
                        np.int32(given is not None),
                    ),
                    *(*self.array("y"), partial, *self.where),
                ),
                config.backward_bytes(box, p),
                sums.rows * box.channel_tiles,
            )
        else:
            partial = self.differentiated_in_parts(arrays, parameters, tangents, weight, mean, given)
        if p.tangent:
            return None, None
        dtype = plan.weight_dtype
        dweight, dbias = (cupy.empty(p.C, dtype_of(dtype)) for _ in range(2))
        kernel(self.specialisation("backward"), "parameter_gradients", 0)(
            (-(-p.C // 32),),
            (256,),
            (
                *(partial, np.int32(partial.dtype == np.float64), *_ints(partial.shape[0], p.C)),
                *(dweight, dbias, np.int32(DTYPES[dtype])),
            ),
            shared_mem=16 * 256,
        )
        return dweight, dbias

    def differentiated_in_parts(
        self,
        arrays: tuple[Any, ...],
        parameters: tuple[Any, ...],
        tangents: tuple[Any, ...],
        weight: Array,
        mean: Array,
        rstd: Array,
    ) -> Array:
        """As `differentiated`, each group split over blocks; returns the sums of each channel, (N, C, 2)."""
        import cupy

        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        means, lows, rstds, along, offset, count = (self.empty_statistics() for _ in range(6))
        # An activation's slope needs x_hat, and so the statistics, before the sums. So does the dweight of a channel of
        # few elements, whose mean may be far nearer to them than the box's is.
        known = (
            plan.labels is not None
            or (plan.activation is not None and not p.tangent)
            or box.rows * box.columns < config.FEW_OF_CHANNEL
        )
        if known:
            self.merged_moments(means, low=lows, rstd=rstds, elements=count)
            if rstd is not None:
                rstds = rstd
        moments = cupy.empty((p.N, box.parts, p.G, 4), np.float64)
        sums = cupy.empty((p.N, box.spatial_parts, p.C, 2), np.float64)
        self.launch(
            "backward",
            "backward_sums",
            box,
            (*_ints(box.group_team, box.channel_team), *arrays, *parameters),
            (means, lows, rstds, np.int32(known), np.int32(plan.G), *self.labels(), moments, sums, *self.where),
            config.backward_bytes(box, p),
        )
        channel_sums = cupy.empty((p.N, p.C, 2), np.float64)
        threads, team = config.merge_channel_threads(p.D, box.spatial_parts)
        kernel(self.specialisation("backward"), "merge_backward", 0)(
            (p.N * plan.G,),
            (threads,),
            (
                *(*_ints(p.C, p.D, plan.G), *self.grouping(), *_ints(plan.labels is not None)),
                *_ints(box.channels, box.parts, box.spatial_parts, team),
                *(moments, sums, *self.parameter(weight), np.float64(plan.eps)),
                *(rstds if rstd is None else rstd, *_ints(rstd is not None, known)),
                *(means, lows, rstds, along, offset, count, channel_sums),
            ),
            shared_mem=8 * config.SCRATCH_DOUBLES,
        )
        self.launch(
            "backward",
            "backward_apply",
            box,
            (*arrays, *parameters, *tangents),
            (
                *(means, lows, rstds, along, offset, count, np.int32(plan.G), *self.labels()),
                *(*self.array("y"), *self.where),
            ),
            config.backward_apply_bytes(box, p),
        )
        return channel_sums

    def merged_moments(
        self,
        mean: Array,
        *,
        low: Array = None,
        rstd: Array = None,
        elements: Array = None,
        m2: Array = None,
        count: Array = None,
    ) -> Box:
        """Moments of the parts of each group, merged: (mean, low, rstd, elements), or (mean, m2, count)."""
        import cupy

        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        partial = cupy.empty((p.N, box.parts, p.G, 4), np.float64)
        shared = config.moments_bytes(box, p)
        self.launch("forward", "moments", box, _ints(box.group_team), (*self.array("x"), partial, *self.where), shared)
        threads, team = config.merge_threads(box.parts)
        groups = p.N * p.G
        results = [a if a is not None else partial for a in (mean, low, rstd, elements, m2)]
        results.append(count if count is not None else partial.view(np.int64))
        what = 1 if rstd is None else 0
        channels = cupy.empty((p.N, p.C, 4), np.float64) if plan.labels is not None else None
        kernel(self.specialisation("forward"), "merge_moments", 0)(
            (-(-groups * team // threads),),
            (threads,),
            (
                *(partial, np.int64(groups), *_ints(p.G, box.parts, team), np.float64(plan.eps)),
                *(_ints(what) if channels is None else _ints(2)),
                *(results if channels is None else [channels, *results[1:]]),
            ),
            shared_mem=8 * config.SCRATCH_DOUBLES,
        )
        if channels is not None:
            kernel(self.specialisation("forward"), "merge_labels", 0)(
                (p.N * plan.G,),
                (config.LABEL_THREADS,),
                (channels, *_ints(p.C, plan.G), *self.grouping(), np.float64(plan.eps), *_ints(what), *results),
                shared_mem=8 * config.SCRATCH_DOUBLES,
            )
        return box

    def apply(self, box: Box, mean: Array, low: Array, rstd: Array, weight: Array, bias: Array) -> None:
        """y under the given statistics."""
        self.launch(
            "forward",
            "apply_statistics",
            box,
            (*self.array("x"), mean, mean if low is None else low, *_ints(low is not None), rstd),
            (
                *(np.int32(self.plan.G), *self.labels()),
                *(*self.parameter(weight), *self.parameter(bias), *self.array("y")),
            ),
            config.apply_bytes(box, self.problem),
        )


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)
