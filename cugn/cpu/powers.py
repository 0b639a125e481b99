"""Lanes and powers of two: exponents as integers, and what lies between two powers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .memory import I64
from .simd import F64, LANES, call_intrinsic, constant, cpu_has, vector_of

ROUNDER = {"float32": 1.5 * 2.0**23, "float64": 1.5 * 2.0**52}
"""Adding it rounds a number to an integer, which then is in the last bits of the sum."""


@intrinsic
def times_power_of_two(typingctx: Any, value: Any, power: Any) -> Any:
    """value * 2**k where power is k + ROUNDER, for results in the range of normal numbers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number, power = args
        double = str(power.type.element) == "double"
        lane = ir.IntType(64 if double else 32)
        exponent = builder.shl(builder.bitcast(power, vector_of(lane)), constant(lane, 52 if double else 23))
        return builder.bitcast(builder.add(builder.bitcast(number, vector_of(lane)), exponent), number.type)

    return value(value, power), codegen


def scales_any_power() -> bool:
    """Whether the CPU takes a number's fraction, and multiplies by a power of two, for all numbers there are."""
    return cpu_has("avx512dq")


def _of_registers(builder: Any, name: str, vectors: Any, *constants: Any) -> Any:
    """An AVX-512 intrinsic of 16 lanes: one register of float32, two of float64."""
    lane = vectors[0].type.element
    double = str(lane) == "double"
    width, bits = (8, 8) if double else (16, 16)
    index, mask = ir.IntType(32), ir.Constant(ir.IntType(bits), -1)
    kind = ir.VectorType(lane, width)
    full = f"llvm.x86.avx512.mask.{name}.{'pd' if double else 'ps'}.512"
    parts = []
    for start in range(0, LANES, width):
        picked = ir.Constant(ir.VectorType(index, width), list(range(start, start + width)))
        here = [builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), picked) for v in vectors]
        last = [ir.Constant(index, 4)]  # rounding as the thread has it
        parts.append(call_intrinsic(builder, full, kind, [*here, *constants, ir.Constant(kind, None), mask, *last]))
    if len(parts) == 1:
        return parts[0]
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(index, LANES), list(range(LANES))))


@intrinsic
def above_floor(typingctx: Any, value: Any) -> Any:
    """value - floor(value), exactly; 0 of infinities."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _of_registers(builder, "reduce", args, ir.Constant(ir.IntType(32), 1))

    return value(value), codegen


@intrinsic
def times_power_of_floor(typingctx: Any, value: Any, power: Any) -> Any:
    """value * 2**floor(power), rounded once where it is subnormal, 0 or infinity beyond."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _of_registers(builder, "scalef", args)

    return value(value, power), codegen


@intrinsic
def power_below(typingctx: Any, value: Any) -> Any:
    """2^floor(log2 |value|) of float64 lanes, their exponents: 0 for 0 and subnormal numbers, infinity for NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], vector_of(I64))
        return builder.bitcast(builder.and_(bits, constant(I64, 0x7FF << 52)), args[0].type)

    return F64(F64), codegen


@intrinsic
def inverse_of_power(typingctx: Any, value: Any) -> Any:
    """1/value of powers of two from 2^-1022 to 2^1022, by their exponents."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], vector_of(I64))
        return builder.bitcast(builder.sub(constant(I64, 0x7FE << 52), bits), args[0].type)

    return F64(F64), codegen
