"""Sixteen rows of sixteen into columns: how samples of a table come to lie in lanes, and go back."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import I8, I64, pointer
from .simd import LANES


def _shuffled(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(a, b, order)


def _at(builder: Any, base: Any, step: Any, index: int, more: int) -> Any:
    here = builder.add(base, builder.mul(step, ir.Constant(I64, index)))
    return builder.add(here, ir.Constant(I64, more))


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Columns of two or four rows whose halves, of as many elements, are turned each by itself."""
    width = len(rows)
    steps = {2: [([0, 4, 2, 6], [1, 5, 3, 7])], 4: [
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    ]}[width]  # fmt: skip
    rows = [_shuffled(builder, a, b, p) for a, b in zip(rows[::2], rows[1::2], strict=True) for p in steps[0]]
    if width == 4:
        rows = [_shuffled(builder, rows[k], rows[k + 2], p) for k in range(2) for p in steps[1]]
    return rows


def _transposer(lane: ir.Type, width: int) -> Any:
    """transpose(source, source_step, target, target_step): 16 rows of 16, a step in bytes apart, into as many.

    In squares of `width`, 16 bytes, two of them in an AVX register: rows k and k + width come into one by their loads,
    so that for eight float32 two shuffles are left of three, for four float64 one.
    """
    size = 16 // width
    piece = ir.VectorType(lane, width)

    @intrinsic
    def transpose(typingctx: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, source_step, target, target_step = args

            def load(row: int, column: int) -> Any:
                where = _at(builder, source, source_step, row, size * column)
                return builder.load(pointer(builder, where, piece), align=1)

            for column in range(0, LANES, width):
                for row in range(0, LANES, 2 * width):
                    pairs = [(load(row + k, column), load(row + k + width, column)) for k in range(width)]
                    rows = [_shuffled(builder, a, b, list(range(2 * width))) for a, b in pairs]
                    for k, value in enumerate(_turned(builder, rows)):
                        where = _at(builder, target, target_step, column + k, size * row)
                        builder.store(value, pointer(builder, where, value.type), align=1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64, types.int64), codegen

    return transpose


transpose_floats = _transposer(ir.FloatType(), 4)
transpose_doubles = _transposer(ir.DoubleType(), 2)


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
