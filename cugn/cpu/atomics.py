"""What threads need of memory, for Numba: int64 words that all see change in one order, a fence and a pause."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import I64, pointer
from .simd import call_intrinsic


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, seen by all threads in one order; what was there before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, with everything that was written before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the int64 at an address, after everything that was written before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def claim(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace the int64 at an address if it is the expected one; whether it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where = pointer(builder, args[0], I64)
        return builder.extract_value(builder.cmpxchg(where, args[1], args[2], "seq_cst", "monotonic"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


def _host_call(intrinsics: dict[str, str]) -> Any:
    @intrinsic
    def instruction(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            name = intrinsics.get(builder.module.triple.split("-")[0])
            if name is not None:
                call_intrinsic(builder, name, ir.VoidType(), [])
            return context.get_dummy_value()

        return types.none(), codegen

    return instruction


pause = _host_call({"x86_64": "llvm.x86.sse2.pause"})
store_fence = _host_call({"x86_64": "llvm.x86.sse.sfence"})
