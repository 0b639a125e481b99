"""Scalars in memory, for Numba: loads and stores by address, and the bits of a float64.

Addresses are plain int64: no array is boxed, counted or bounds-checked inside a kernel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I8, I16, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)


def pointer(builder: Any, address: Any, target: ir.Type) -> Any:
    """An int64 address as a pointer to target."""
    return builder.inttoptr(address, ir.PointerType(target))


def _scalar_access(numba_type: Any, llvm_type: ir.Type) -> tuple[Any, Any]:
    size = {"i8": 1, "i16": 2, "i32": 4, "float": 4}.get(str(llvm_type), 8)

    @intrinsic
    def load(typingctx: Any, base: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = builder.add(args[0], builder.mul(args[1], ir.Constant(I64, size)))
            return builder.load(pointer(builder, where, llvm_type), align=1)

        return numba_type(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            where = builder.add(args[0], builder.mul(args[1], ir.Constant(I64, size)))
            builder.store(args[2], pointer(builder, where, llvm_type), align=1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, numba_type), codegen

    return load, store


load_i64, store_i64 = _scalar_access(types.int64, I64)
load_f64, store_f64 = _scalar_access(types.float64, ir.DoubleType())
load_i32, store_i32 = _scalar_access(types.int32, ir.IntType(32))
load_u16, store_u16 = _scalar_access(types.uint16, I16)
load_u8, store_u8 = _scalar_access(types.uint8, I8)


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """A float64's bits as int64."""
    return types.int64(types.float64), lambda context, builder, sig, args: builder.bitcast(args[0], I64)


@intrinsic
def bits_float(typingctx: Any, value: Any) -> Any:
    """The float64 with these bits."""
    return types.float64(types.int64), lambda context, builder, sig, args: builder.bitcast(args[0], ir.DoubleType())
