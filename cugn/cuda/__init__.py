"""The CUDA engine: CuPy arrays through hand-written kernels, on the current stream of x's device.

Nothing here waits for the device or reads its memory, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plan import FLOATS, Plan
from . import config
from .compile import Specialisation, device_properties, kernel
from .config import Box, Problem
from .strided import (
    DTYPES,
    contiguous,
    copy,
    dtype_of,
    float64,
    grouping,
    like,
    mask_arguments,
    name_of,
    pieces,
)

__all__ = ["backward", "double_backward", "forward", "jvp", "moments", "normalize", "serves"]

Array = Any

CURVED = ("silu", "gelu", "gelu_tanh")
"""Activations with a second derivative."""


def serves(plan: Plan, operation: str) -> bool:
    """Everything: CuPy's arrays tell their strides."""
    return plan.layout is not None


def forward(plan: Plan, x: Array, weight: Array, bias: Array, where: Array, out: Array) -> tuple[Array, Array, Array]:
    """Output and statistics of each group."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out), *(_constant(plan.stats_shape, math.nan) for _ in range(2))
        if not _dense(plan):
            out, (mean, rstd) = _out(plan, x, out), _empty_statistics(plan, 2)
            for piece in pieces(plan, {"x": x}, where):
                w, b = piece.of(weight), piece.of(bias)
                y, *statistics = forward(piece.plan, piece.arrays["x"], w, b, piece.where, None)
                piece.store(y, out, plan)
                for part, whole in zip(statistics, (mean, rstd), strict=True):
                    copy(part, whole[piece.samples, piece.groups])
            return out, mean.reshape(plan.stats_shape), rstd.reshape(plan.stats_shape)
        call = _Call.of(plan, {"x": x}, out, where)
        mean, rstd = _empty_statistics(plan, 2)
        box = call.resident_box()
        if box is not None:
            call.launch(
                "forward",
                box,
                (*_ints(box.group_team), *call.array("x"), *call.parameter(weight), *call.parameter(bias)),
                (np.float64(plan.eps), *call.array("y"), mean, rstd, *call.where),
                config.forward_bytes(box, call.problem),
            )
        else:
            planes = call.empty_planes()
            call.merged_moments(mean, rstd, planes)
            call.apply(mean, rstd, planes, weight, bias)
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
    """Gradients with respect to x, weight and bias. The mean is taken anew: with x at hand that is free, and exact."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out), *_zero_gradients(plan)
        given = None if rstd is None else _statistics(plan, rstd)
        if _dense_floats(plan):
            call = _Call.of(plan, {"x": x, "v": dy}, out, where)
            return call.out, *_parameter_gradients(plan, [call.differentiated(weight, bias, None, None, given)])
        out = _out(plan, x, out)
        sums: dict[tuple[int, int], list[Array]] = {}
        for piece in pieces(plan, {"x": x, "v": dy}, where):
            call = _Call.of(piece.plan, piece.arrays, piece.arrays["v"], piece.where)
            rstd = None if given is None else contiguous(given[piece.samples, piece.groups])
            partial = call.differentiated(piece.of(weight), piece.of(bias), None, None, rstd)
            piece.store(call.out, out, plan)
            sums.setdefault((piece.channels.start, piece.channels.stop), []).append(_added(piece.plan, partial))
        return out, *_gradients_of_pieces(plan, sums)


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
        if plan.size == 0:
            return _out(plan, x, out)
        if not _dense_floats(plan):
            out = _out(plan, x, out)
            for piece in pieces(plan, {"x": x, "v": tx}, where):
                w, b, tw, tb = (piece.of(p) for p in (weight, bias, tweight, tbias))
                ty = jvp(piece.plan, piece.arrays["v"], piece.arrays["x"], w, b, tw, tb, piece.where, None)
                piece.store(ty, out, plan)
            return out
        exact = any(t is not None and t.dtype == np.float64 for t in (tweight, tbias))
        call = _Call.of(plan, {"x": x, "v": tx}, out, where, exact=exact, tangent=True)
        call.differentiated(weight, bias, tweight, tbias, None)
        return call.out


def double_backward(
    plan: Plan,
    ddx: Array,
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array,
    ddweight: Array,
    ddbias: Array,
    where: Array,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias> with respect to dy, x, weight and bias."""
    with x.device:
        parameters = (weight, bias, ddweight, ddbias)
        if plan.size == 0:
            return _out(plan, x, None), _out(plan, x, None), *_zero_gradients(plan)
        if _dense_floats(plan):
            call = _Call.of(plan, {"x": x, "u": ddx, "v": dy}, None, where, exact=True, tangent=True)
            gx, partial = call.differentiated_twice(*parameters)
            return call.out, gx, *_parameter_gradients(plan, [partial])
        gdy, gx = _out(plan, x, None), _out(plan, x, None)
        sums: dict[tuple[int, int], list[Array]] = {}
        for piece in pieces(plan, {"x": x, "u": ddx, "v": dy}, where):
            call = _Call.of(piece.plan, piece.arrays, None, piece.where, exact=True, tangent=True)
            of_x, partial = call.differentiated_twice(*(piece.of(p) for p in parameters))
            piece.store(call.out, gdy, plan)
            piece.store(of_x, gx, plan)
            sums.setdefault((piece.channels.start, piece.channels.stop), []).append(_added(piece.plan, partial))
        return gdy, gx, *_gradients_of_pieces(plan, sums)


def moments(plan: Plan, x: Array, where: Array) -> tuple[Array, Array, Array]:
    """Count, mean and sum of squared deviations of each group, in float64 throughout."""
    import cupy

    with x.device:
        if plan.size == 0:
            count, m2 = (_constant(plan.stats_shape, 0, dtype) for dtype in (np.int64, np.float64))
            return count, _constant(plan.stats_shape, math.nan), m2
        mean, m2 = _empty_statistics(plan, 2)
        count = cupy.empty(mean.shape, np.int64)
        if _dense(plan):
            call = _Call.of(plan, {"x": x}, None, where, exact=True, written=False)
            call.merged_moments(mean, m2=m2, count=count)
        else:
            for piece in pieces(plan, {"x": x}, where):
                parts = moments(piece.plan, piece.arrays["x"], piece.where)
                for part, whole in zip(parts, (count, mean, m2), strict=True):
                    copy(part, whole[piece.samples, piece.groups])
        return count.reshape(plan.stats_shape), mean.reshape(plan.stats_shape), m2.reshape(plan.stats_shape)


def normalize(plan: Plan, x: Array, mean: Array, rstd: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Output under statistics that the caller supplies."""
    with x.device:
        if plan.size == 0:
            return _out(plan, x, out)
        mean, rstd = _statistics(plan, mean), _statistics(plan, rstd)
        if not _dense(plan):
            out = _out(plan, x, out)
            for piece in pieces(plan, {"x": x}, None):
                m, r = (statistics[piece.samples, piece.groups] for statistics in (mean, rstd))
                y = normalize(piece.plan, piece.arrays["x"], m, r, piece.of(weight), piece.of(bias), None)
                piece.store(y, out, plan)
            return out
        call = _Call.of(plan, {"x": x}, out, None)
        call.apply(mean, rstd, None, weight, bias)
        return call.out


def _dense(plan: Plan) -> bool:
    return plan.layout is not None and plan.layout.kind == "dense"


def _dense_floats(plan: Plan) -> bool:
    """Whether the kernels of the gradients take the arrays as they are: x has the dtype of its gradient."""
    return _dense(plan) and plan.x_dtype in FLOATS


def _constant(shape: tuple[int, ...], value: float, dtype: Any = np.float64) -> Array:
    """A new array of one value."""
    import cupy

    array = cupy.empty(shape, dtype)
    array.fill(value)
    return array


def _zero_gradients(plan: Plan) -> tuple[Array, Array]:
    """dweight and dbias of no elements."""
    dtype = dtype_of(plan.weight_dtype)
    return _constant((plan.C,), 0, dtype), _constant((plan.C,), 0, dtype)


def _out(plan: Plan, x: Array, out: Array) -> Array:
    """`out`, or a new array in x's memory order."""
    import cupy

    return cupy.empty_like(x, dtype=dtype_of(plan.y_dtype)) if out is None else out


def _empty_statistics(plan: Plan, count: int) -> list[Array]:
    """`count` arrays (N, G) of float64."""
    import cupy

    return [cupy.empty((plan.N, plan.G), np.float64) for _ in range(count)]


def _statistics(plan: Plan, given: Array) -> Array:
    """(N, G) float64 of statistics that the caller supplies."""
    import cupy

    return float64(cupy.broadcast_to(given, plan.stats_shape)).reshape(plan.N, plan.G)


def _parameter_gradients(plan: Plan, partials: list[Array]) -> tuple[Array, Array]:
    """dweight and dbias from sums of (rows, channels, 2), of the pieces of the samples if there are several."""
    import cupy

    partial = partials[0]
    if len(partials) > 1:
        partial = cupy.empty((len(partials), *partial.shape[1:]), np.float64)
        for piece, row in zip(partials, partial, strict=True):
            copy(piece[0], row)
    dtype = plan.weight_dtype
    dweight, dbias = (cupy.empty(partial.shape[1], dtype_of(dtype)) for _ in range(2))
    _add_rows(plan, partial, dweight, dbias, DTYPES[dtype], 1)
    return dweight, dbias


def _gradients_of_pieces(plan: Plan, sums: dict[tuple[int, int], list[Array]]) -> tuple[Array, Array]:
    """dweight and dbias from the sums of the pieces, by the channels that they hold."""
    import cupy

    dweight, dbias = (cupy.empty(plan.C, dtype_of(plan.weight_dtype)) for _ in range(2))
    for (start, stop), partials in sums.items():
        parts = _parameter_gradients(plan, partials)
        copy(parts[0], dweight[start:stop])
        copy(parts[1], dbias[start:stop])
    return dweight, dbias


def _added(plan: Plan, partial: Array) -> Array:
    """The sum of all rows, (1, channels, 2) in float64."""
    import cupy

    added = cupy.empty((1, *partial.shape[1:]), np.float64)
    _add_rows(plan, partial, added[0, :, 1], added[0, :, 0], DTYPES["float64"], 2)
    return added


def _add_rows(plan: Plan, partial: Array, dweight: Array, dbias: Array, dtype: int, step: int) -> None:
    rows, channels = partial.shape[:2]
    threads = 32 * min(8, -(-rows // 8))
    kernel(Specialisation.of("parameter_gradients"), 0)(
        (-(-channels // 32),),
        (threads,),
        (partial, *_ints(partial.dtype == np.float64, rows, channels), dweight, dbias, *_ints(dtype, step)),
        shared_mem=16 * threads,
    )


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
        layout = plan.layout
        assert layout is not None  # serves() said so
        arrays = {name: (array, *pair) for (name, array), pair in zip(inputs.items(), layout.strides, strict=False)}
        x = inputs["x"]
        if written:
            if out is None:
                arrays["y"] = like(x, dtype_of(plan.y_dtype), layout)
                out = arrays["y"][0]
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
            aligned=all(a.data.ptr % 16 == 0 for a, _, _ in arrays.values()),
        )
        mask = mask_arguments(where, plan) if where is not None else ()
        return cls(plan, arrays, out, mask, problem, device_properties(x.device.id))

    def resident_box(self) -> Box | None:
        """Box of whole groups, if they fit in shared memory; labelled groups are put together from their channels."""
        return None if self.plan.labels is not None else config.resident_box(self.problem, self.device)

    def labels(self) -> tuple[Any, ...]:
        """Arguments (labels, labelled)."""
        if self.plan.labels is None:
            return (self.arrays["x"][0], np.int32(0))
        return (grouping(self.plan)[0], np.int32(1))

    def grouping(self) -> tuple[Any, ...]:
        """Arguments (order, bounds)."""
        placeholder = self.arrays["x"][0]
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

    def vector_channels(self) -> int:
        """Channels that an aligned 16-byte vector of y lies in at most: 1, 2, or 16 for any number."""
        y, sn, so = self.arrays["y"] if "y" in self.arrays else self.arrays["x"]
        vector = 16 // y.itemsize
        if self.problem.inner % vector == sn % vector == so % vector == 0 == y.data.ptr % 16:
            return 1
        return 2 if self.problem.inner >= vector else 16

    def box_arguments(self, box: Box) -> tuple[Any, ...]:
        """BOX_PARAMETERS of kernels/box.cuh."""
        p = self.problem
        return (
            *(np.int64(p.N), np.int64(p.outer), np.int32(p.C), np.int64(p.inner), np.int32(p.D)),
            *_ints(box.samples, box.rows, box.channels, box.columns),
            *_ints(box.row_tiles, box.channel_tiles, box.column_tiles, box.pitch, box.flat),
        )

    def kernel(self, name: str, shared: int = 0) -> Any:
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
            tangent=self.problem.tangent,
            double=self.problem.real == 8,
        )
        return kernel(specialisation, shared)

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
        self.kernel(name, shared)(
            (box.tiles if blocks is None else blocks,),
            (box.threads,),
            (*self.box_arguments(box), *before, *after),
            shared_mem=shared,
        )

    def differentiated(self, weight: Array, bias: Array, tweight: Array, tbias: Array, rstd: Array) -> Array:
        """dx (or the tangent of y) to `out`; returns sums of v and v x_hat of each channel, (rows, C, 2)."""
        import cupy

        plan, p = self.plan, self.problem
        parameters = (*self.parameter(weight), *self.parameter(bias))
        tangents = (*self.parameter(tweight), *self.parameter(tbias))
        arrays = (*self.array("x"), *self.array("v"))
        box = self.resident_box()
        if box is None:
            return self.differentiated_in_parts(arrays, parameters, tangents, weight, rstd)
        sums = config.channel_sums(p, box)
        partial = cupy.empty((sums.rows, p.C, 2), np.float64 if p.real == 8 else np.float32)
        self.launch(
            "backward",
            box,
            (*_ints(sums.repeat, box.group_team, box.channel_team), *arrays, *parameters, *tangents),
            (
                *(np.float64(plan.eps), partial if rstd is None else rstd, *_ints(rstd is not None)),
                *(*self.array("y"), partial, *self.where),
            ),
            config.backward_bytes(box, p),
            sums.rows * box.channel_tiles,
        )
        return partial

    def differentiated_in_parts(
        self,
        arrays: tuple[Any, ...],
        parameters: tuple[Any, ...],
        tangents: tuple[Any, ...],
        weight: Array,
        rstd: Array,
    ) -> Array:
        """As `differentiated`, each group split over blocks; returns the sums of each channel, (N, C, 2)."""
        import cupy

        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        planes = self.empty_planes()
        # An activation's slope needs x_hat, and so the statistics, before the sums. So does the dweight of a channel of
        # few elements, whose mean may be far nearer to them than the box's is.
        bent = plan.activation is not None and not p.tangent
        known = plan.labels is not None or bent or box.rows * box.columns < config.FEW_OF_CHANNEL
        if known:
            self.merged_moments(planes[0], planes[2], planes, rstd_given=rstd)
        moments = cupy.empty((p.N, box.parts, p.G, config.part_values(p.real)), np.float64)
        sums = cupy.empty((p.N, box.spatial_parts, p.C, 2), np.float64)
        self.launch(
            "backward_sums",
            box,
            (*_ints(box.group_team, box.channel_team), *arrays, *parameters),
            (planes, np.int32(known), np.int32(plan.G), *self.labels(), moments, sums, *self.where),
            config.backward_sums_bytes(box, p),
        )
        channel_sums = cupy.empty((p.N, p.C, 2), np.float64)
        threads, team = config.merge_channel_threads(p.D, box.spatial_parts, plan.labels is not None)
        self.kernel("merge_backward")(
            (p.N * plan.G,),
            (threads,),
            (
                *(*_ints(p.C, p.D, plan.G), *self.grouping(), *_ints(plan.labels is not None)),
                *_ints(box.channels, box.parts, box.spatial_parts, team),
                *(moments, sums, *self.parameter(weight), np.float64(plan.eps)),
                *(planes if rstd is None else rstd, *_ints(rstd is not None, known), planes, channel_sums),
            ),
            shared_mem=8 * config.SCRATCH_DOUBLES,
        )
        box = config.apply_box(p, box)
        self.launch(
            "backward_apply",
            box,
            (*arrays, *parameters, *tangents),
            (planes, np.int32(plan.G), *self.labels(), *self.array("y"), *self.where),
            config.backward_apply_bytes(box, p),
        )
        return channel_sums

    def empty_planes(self) -> Array:
        """Place for what the kernels hand on of each group, (values, N, G)."""
        import cupy

        return cupy.empty((config.PLANES, self.plan.N, self.plan.G), np.float64)

    def differentiated_twice(self, weight: Array, bias: Array, ddweight: Array, ddbias: Array) -> tuple[Array, Array]:
        """Gradient of dy to `out`; returns that of x, and what gweight and gbias are sums of, (N, C, 2)."""
        import cupy

        plan, p = self.plan, self.problem
        assert plan.layout is not None
        box = config.split_box(p, self.device)
        gx = like(self.arrays["x"][0], dtype_of(plan.y_dtype), plan.layout)
        planes = self.empty_planes()
        self.merged_moments(planes[0], planes[2], planes)
        parameters = tuple(value for a in (weight, bias, ddweight, ddbias) for value in self.parameter(a))
        arrays = tuple(value for name in ("x", "v", "u") for value in self.array(name))
        sums_of_channel = 10 if plan.activation in CURVED else 5
        sums = cupy.empty((p.N, box.spatial_parts, p.C, sums_of_channel), np.float64)
        shared = config.second_bytes(box, p)
        of_groups = (planes, np.int32(plan.G), *self.labels())
        before = (*arrays, *parameters, *of_groups)
        self.launch("second_sums", box, (*_ints(box.channel_team), *before), (sums, *self.where), shared)
        channel_sums = cupy.empty((p.N, p.C, sums_of_channel), np.float64)
        partial = cupy.empty((p.N, p.C, 2), np.float64)
        threads, team = config.merge_channel_threads(p.D, box.spatial_parts, plan.labels is not None)
        self.kernel("merge_second")(
            (p.N * plan.G,),
            (threads,),
            (
                *(*_ints(p.C, p.D, plan.G), *self.grouping(), *_ints(plan.labels is not None)),
                *(*_ints(box.spatial_parts, team), sums, *parameters, planes, channel_sums, partial),
            ),
            shared_mem=8 * config.SCRATCH_DOUBLES,
        )
        outputs = (*self.array("y"), gx[0], np.int64(gx[1]), np.int64(gx[2]))
        self.launch("second_apply", box, before, (*outputs, *self.where), shared)
        return gx[0], partial

    def merged_moments(
        self,
        mean: Array,
        rstd: Array = None,
        planes: Array = None,
        *,
        rstd_given: Array = None,
        m2: Array = None,
        count: Array = None,
    ) -> None:
        """Moments of the parts of each group, merged: mean, rstd, and what other kernels read; or mean, m2, count."""
        import cupy

        plan, p = self.plan, self.problem
        box = config.split_box(p, self.device)
        part = config.part_values(p.real)
        partial = cupy.empty((p.N, box.parts, p.G, part), np.float64)
        shared = config.moments_bytes(box, p)
        self.launch("moments", box, _ints(box.group_team), (*self.array("x"), partial, *self.where), shared)
        threads, team = config.merge_threads(box.parts)
        groups = p.N * p.G
        results = (
            *(np.float64(plan.eps), np.int32(m2 is not None)),
            *(partial if rstd_given is None else rstd_given, np.int32(rstd_given is not None)),
            *(partial if a is None else a for a in (mean, rstd, m2, count, planes)),
        )
        channels = cupy.empty((p.N, p.C, part), np.float64) if plan.labels is not None else None
        self.kernel("merge_moments")(
            (-(-groups * team // threads),),
            (threads,),
            (
                *(partial, np.int64(groups), *_ints(p.G, box.parts, team)),
                *(partial if channels is None else channels, np.int32(channels is not None), *results),
            ),
            shared_mem=8 * config.SCRATCH_DOUBLES,
        )
        if channels is not None:
            self.kernel("merge_labels")(
                (p.N * plan.G,),
                (config.LABEL_THREADS,),
                (channels, *_ints(p.C, plan.G), *self.grouping(), *results),
                shared_mem=8 * config.SCRATCH_DOUBLES,
            )

    def apply(self, mean: Array, rstd: Array, planes: Array, weight: Array, bias: Array) -> None:
        """y under the statistics in `planes`, or under a mean and rstd that the caller gave."""
        box = config.apply_box(self.problem, config.split_box(self.problem, self.device))
        self.launch(
            "apply_statistics",
            box,
            (*self.array("x"), mean, rstd, mean if planes is None else planes, *_ints(planes is not None)),
            (
                *(np.int32(self.plan.G), *self.labels()),
                *(*self.parameter(weight), *self.parameter(bias), *self.array("y")),
            ),
            config.apply_bytes(box, self.problem),
        )


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)
