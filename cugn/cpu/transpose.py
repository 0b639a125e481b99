"""Sixteen rows of sixteen into columns: how samples of a table come to lie in lanes, and go back."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import I8, I64, pointer
from .simd import LANES

_QUARTER = ir.VectorType(ir.FloatType(), 4)
_HALF = ir.VectorType(ir.DoubleType(), 2)


def _shuffled(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(a, b, order)


def _at(builder: Any, base: Any, step: Any, index: int, more: int) -> Any:
    here = builder.add(base, builder.mul(step, ir.Constant(I64, index)))
    return builder.add(here, ir.Constant(I64, more))


@intrinsic
def transpose_floats(typingctx: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """16 rows of 16 float32, `source_step` bytes apart, into as many that are `target_step` bytes apart.

    Four by four within halves of AVX registers: rows k and k+4 come into one by their loads, so that two shuffles for
    each eight elements are left of three.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, source_step, target, target_step = args

        def load(row: int, column: int) -> Any:
            where = _at(builder, source, source_step, row, 4 * column)
            return builder.load(pointer(builder, where, _QUARTER), align=1)

        for column in range(0, LANES, 4):
            for row in range(0, LANES, 8):
                a, b, c, d = (
                    _shuffled(builder, load(row + k, column), load(row + k + 4, column), list(range(8)))
                    for k in range(4)
                )
                low_ab, high_ab, low_cd, high_cd = (
                    _shuffled(builder, one, other, places)
                    for one, other in ((a, b), (c, d))
                    for places in ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15])
                )
                columns = [
                    _shuffled(builder, one, other, places)
                    for one, other in ((low_ab, low_cd), (high_ab, high_cd))
                    for places in ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
                ]
                for k, value in enumerate(columns):
                    where = _at(builder, target, target_step, column + k, 4 * row)
                    builder.store(value, pointer(builder, where, value.type), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def transpose_doubles(typingctx: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """The same of float64: one shuffle for each four."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, source_step, target, target_step = args

        def load(row: int, column: int) -> Any:
            where = _at(builder, source, source_step, row, 8 * column)
            return builder.load(pointer(builder, where, _HALF), align=1)

        for column in range(0, LANES, 2):
            for row in range(0, LANES, 4):
                a, b = (
                    _shuffled(builder, load(row + k, column), load(row + k + 2, column), list(range(4)))
                    for k in range(2)
                )
                for k, places in enumerate(([0, 4, 2, 6], [1, 5, 3, 7])):
                    value = _shuffled(builder, a, b, places)
                    where = _at(builder, target, target_step, column + k, 8 * row)
                    builder.store(value, pointer(builder, where, value.type), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def transpose_bytes(typingctx: Any, source: Any, source_step: Any, target: Any) -> Any:
    """16 rows of 16 bytes, `source_step` bytes apart, into 16 one after another."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, source_step, target = args
        kind = ir.VectorType(I8, LANES)
        rows = [
            builder.load(pointer(builder, _at(builder, source, source_step, k, 0), kind), align=1) for k in range(LANES)
        ]
        for _ in range(4):  # each step moves one bit of an element's column into its row
            rows = [
                _shuffled(builder, rows[k], rows[k + 8], [half + lane // 2 + LANES * (lane % 2) for lane in range(16)])
                for k in range(8)
                for half in (0, 8)
            ]
        for k, value in enumerate(rows):
            where = builder.add(target, ir.Constant(I64, LANES * k))
            builder.store(value, pointer(builder, where, kind), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen
