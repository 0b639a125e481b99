"""Calls of native functions by their addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .memory import I64

MOST_ARGUMENTS = 24
"""Of an operation's entry. A helper passes as many, whatever the entry takes: in C's calling conventions it does not
see those beyond its own.
"""


def _call(context: Any, builder: Any, function: Any, arguments: list[Any]) -> Any:
    """Call a function that Numba compiled for int64 arguments; what it returns is dropped."""
    result = cgutils.alloca_once(builder, I64)
    nothing = ir.PointerType(ir.PointerType(ir.IntType(8)))
    kind = ir.FunctionType(ir.IntType(32), [ir.PointerType(I64), nothing, *[I64] * len(arguments)])
    target = builder.inttoptr(function, ir.PointerType(kind))
    builder.call(target, [result, ir.Constant(nothing, None), *arguments])
    return context.get_dummy_value()


@intrinsic
def call_entry(typingctx: Any, function: Any, role: Any, block: Any) -> Any:
    """Call the entry of an operation as a helper."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rest = [ir.Constant(I64, 0)] * (MOST_ARGUMENTS - 2)
        return _call(context, builder, args[0], [args[1], args[2], *rest])

    return types.none(types.int64, types.int64, types.int64), codegen


@intrinsic
def call_kernel(
    typingctx: Any, function: Any, geometry: Any, call: Any, task: Any, chunk: Any, store: Any, scratch: Any
) -> Any:
    """Call a kernel of a phase."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(context, builder, args[0], args[1:])

    return types.none(*[types.int64] * 7), codegen
