"""Float64 lanes as integers, units of the last digit of a larger number: their sums have no order."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import I64
from .simd import F64, UNITS, call_intrinsic, constant, splat_value, suffix, vector_of


@intrinsic
def in_units(typingctx: Any, value: Any, large: Any) -> Any:
    """Lanes rounded to the last digit of `large`, as that many units of it: integers, whose sum has no order.

    `large` is 1.5 * 2^k and |value| at most 2^(k-1), so that value + large has large's exponent. What `large` itself is
    comes with each of them (`from_units`).
    """
    lane = vector_of(I64)
    return UNITS(F64, F64), lambda c, builder, sig, args: builder.bitcast(builder.fadd(*args), lane)


@intrinsic
def product_in_units(typingctx: Any, a: Any, b: Any, large: Any) -> Any:
    """The same of a*b, rounded once."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        product = call_intrinsic(builder, f"llvm.fma.{suffix(ir.DoubleType())}", args[0].type, args)
        return builder.bitcast(product, vector_of(I64))

    return UNITS(F64, F64, F64), codegen


@intrinsic
def no_units(typingctx: Any) -> Any:
    """int64 lanes of 0."""
    return UNITS(), lambda context, builder, sig, args: constant(I64, 0)


@intrinsic
def from_units(typingctx: Any, total: Any, count: Any, large: Any) -> Any:
    """The sum of `count` values that `in_units` gave; NaN if `large` is not finite."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, count, large = args
        bits = builder.bitcast(large, vector_of(I64))
        units = builder.sub(total, builder.mul(bits, splat_value(builder, count)))
        exponent = builder.bitcast(builder.and_(bits, constant(I64, 0x7FF << 52)), large.type)
        unit = builder.fmul(exponent, constant(ir.DoubleType(), 2.0**-52))
        spoiled = builder.fsub(large, large)
        return builder.fadd(builder.fmul(builder.sitofp(units, large.type), unit), spoiled)

    return F64(UNITS, types.int64, F64), codegen
