"""Rows in the order of memory, before a kernel goes over them column by column.

A CPU brings what it will need if addresses follow one another. Those of eight rows at a time do not, where several of
them lie in one page: 1 KB rows came at 11 GB/s, and come at 25 GB/s if each cache line is touched, row by row, before
(Zen 4, one thread, from main memory; rows with pages of their own are faster without).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .compile import inner
from .memory import I8, I64, pointer
from .simd import call_intrinsic

_PAGE = 4096
_LINE = 64


@intrinsic
def _touch(typingctx: Any, address: Any) -> Any:
    """Load the aligned word that a byte is in; atomic, so that the compiler leaves it, though nothing is made of it.

    Not the byte alone: x86 would put that into a part of a register, after all loads before it.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        aligned = builder.and_(args[0], ir.Constant(I64, -4))
        builder.load_atomic(pointer(builder, aligned, ir.IntType(32)), "monotonic", 4)
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@inner
def touch_rows(p: int, step: int, rows: int, width: int, most: int) -> None:
    """Touch rows of `width` bytes, unless they are more than `most` or have pages of their own."""
    if step < _PAGE and rows * width <= most:
        for r in range(rows):
            for line in range(0, width, _LINE):
                _touch(p + r * step + line)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the line that a byte is in; wherever that is, nothing comes of it but a line in L1."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = pointer(builder, args[0], I8)
        read, keep, data = (ir.Constant(ir.IntType(32), k) for k in (0, 3, 1))
        call_intrinsic(builder, "llvm.prefetch.p0i8", ir.VoidType(), [where, read, keep, data])
        return context.get_dummy_value()

    return types.none(types.int64), codegen
