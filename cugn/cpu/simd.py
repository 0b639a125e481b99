"""Explicit 16-lane vectors for Numba: a value type, and its arithmetic.

A kernel written with these does the same operations on the same lanes in the body of a loop and in its masked tail,
so that an element's bits never depend on where in a run it lies; nothing is left to the auto-vectorizer, and no
fast-math flag is needed. LLVM splits 16 lanes over as many registers as the CPU needs: one AVX-512 register for
float32, two AVX2 ones, four of NEON.
"""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import Any

import numba
from llvmlite import binding, ir
from numba.core import types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from .memory import I8, I64, pointer
from .words import FOLDED

LANES = 16


class Vector(types.Type):
    """16 lanes of float32, float64, uint8, int64 or bool."""

    def __init__(self, lane: types.Type) -> None:
        self.lane = lane
        super().__init__(name=f"vector{LANES}({lane})")


F32 = Vector(types.float32)
F64 = Vector(types.float64)
BYTES = Vector(types.uint8)
UNITS = Vector(types.int64)
MASK = Vector(types.boolean)

_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint8: I8,
    types.int64: ir.IntType(64),
    types.boolean: ir.IntType(1),
}


def vector_of(lane: ir.Type) -> ir.VectorType:
    """LLVM's vector of 16 lanes."""
    return ir.VectorType(lane, LANES)


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, vector_of(_LLVM[fe_type.lane]))


def splat_value(builder: Any, value: Any) -> Any:
    """All lanes equal to an LLVM scalar."""
    vec = vector_of(value.type)
    first = builder.insert_element(ir.Constant(vec, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        first, ir.Constant(vec, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    )


def constant(lane: ir.Type, value: float) -> ir.Constant:
    """All lanes equal to a Python number."""
    return ir.Constant(vector_of(lane), [value] * LANES)


def _binary(op: Any, float_method: str, int_method: str | None = None) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    for vec in (F32, F64) if int_method is None else (F32, F64, UNITS):

        def lower(context: Any, builder: Any, sig: Any, args: Any, vec: Vector = vec) -> Any:
            method = int_method if vec is UNITS and int_method is not None else float_method
            return getattr(builder, method)(*args)

        lower_builtin(op, vec, vec)(lower)


_binary(operator.add, "fadd", "add")
_binary(operator.sub, "fsub", "sub")
_binary(operator.mul, "fmul", "mul")
_binary(operator.truediv, "fdiv")
_binary(operator.iadd, "fadd", "add")


def call_intrinsic(builder: Any, name: str, result: ir.Type, args: Any) -> Any:
    """Call an LLVM intrinsic that is declared on the way."""
    from numba.core import cgutils

    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def suffix(lane: ir.Type) -> str:
    """A lane type in the name of an LLVM intrinsic: v16f32."""
    kinds = {"float": "f32", "double": "f64"}
    return f"v{LANES}{kinds.get(str(lane), str(lane))}"


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once, on vectors or scalars."""
    if not (a == b == c):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        name = suffix(kind.element) if isinstance(kind, ir.VectorType) else {"float": "f32", "double": "f64"}[str(kind)]
        return call_intrinsic(builder, f"llvm.fma.{name}", kind, args)

    return a(a, b, c), codegen


@cache
def cpu_has(feature: str) -> bool:
    """Whether the x86 CPU that is compiled for has a feature; by Numba's settings it may be another one than this."""
    if not binding.get_default_triple().startswith(("x86_64", "i686")):
        return False
    if numba.config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES
        return f"+{feature}" in numba.config.CPU_FEATURES.split(",")
    if feature.startswith("avx") and not numba.config.ENABLE_AVX:
        return False
    return bool(binding.get_host_cpu_features().get(feature, False))


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A scalar in all lanes."""
    return Vector(value)(value), lambda context, builder, sig, args: splat_value(builder, args[0])


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """float32 lanes as float64 ones; float64 lanes as they are."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0] if sig.args[0] == F64 else builder.fpext(args[0], vector_of(ir.DoubleType()))

    return F64(value), codegen


@intrinsic
def narrow(typingctx: Any, value: Any) -> Any:
    """float64 lanes rounded to float32."""
    return F32(F64), lambda c, builder, sig, args: builder.fptrunc(args[0], vector_of(ir.FloatType()))


@intrinsic
def narrow_scalar(typingctx: Any, value: Any) -> Any:
    """A float64 rounded to float32."""
    return types.float32(types.float64), lambda c, builder, sig, args: builder.fptrunc(args[0], ir.FloatType())


@intrinsic
def widen_scalar(typingctx: Any, value: Any) -> Any:
    """A float32 as float64."""
    return types.float64(types.float32), lambda c, builder, sig, args: builder.fpext(args[0], ir.DoubleType())


@intrinsic
def reduce_add(typingctx: Any, value: Any) -> Any:
    """Sum of the lanes, by halves: always the same tree."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vec = args[0]
        width = LANES
        i32 = ir.IntType(32)
        while width > 1:
            width //= 2
            undefined = ir.Constant(vec.type, ir.Undefined)
            low = builder.shuffle_vector(vec, undefined, ir.Constant(ir.VectorType(i32, width), list(range(width))))
            high = builder.shuffle_vector(
                vec, undefined, ir.Constant(ir.VectorType(i32, width), list(range(width, 2 * width)))
            )
            vec = builder.fadd(low, high)
        return builder.extract_element(vec, ir.Constant(i32, 0))

    return value.lane(value), codegen


@intrinsic
def store_folded(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the sums of the lanes k and k + 8: what `folded_sums` begins with."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, vec = args
        half = ir.VectorType(ir.IntType(32), LANES // 2)
        undefined = ir.Constant(vec.type, ir.Undefined)
        low = builder.shuffle_vector(vec, undefined, ir.Constant(half, list(range(LANES // 2))))
        high = builder.shuffle_vector(vec, undefined, ir.Constant(half, list(range(LANES // 2, LANES))))
        folded = builder.fadd(low, high)
        builder.store(folded, pointer(builder, address, folded.type), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, F64), codegen


@intrinsic
def folded_sums(typingctx: Any, address: Any) -> Any:
    """Sums of the lanes of 16 vectors that `store_folded` left one after another: the same tree as `reduce_add`.

    Three operations for two vectors at each step, where one by one they take seven each.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = LANES // 2
        kind = ir.VectorType(ir.DoubleType(), half)
        indices = ir.VectorType(ir.IntType(32), half)

        def row(k: int) -> Any:
            where = builder.add(args[0], ir.Constant(I64, FOLDED * k))
            return builder.load(pointer(builder, where, kind), align=1)

        rows = [row(k) for k in range(LANES)]
        width = half  # lanes that belong to one of the vectors, all of which lie side by side
        while width > 1:
            width //= 2
            low = [lane for start in range(0, 2 * half, 2 * width) for lane in range(start, start + width)]
            high = [lane + width for lane in low]
            rows = [
                builder.fadd(
                    builder.shuffle_vector(a, b, ir.Constant(indices, low)),
                    builder.shuffle_vector(a, b, ir.Constant(indices, high)),
                )
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        return builder.shuffle_vector(*rows, ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES))))

    return F64(types.int64), codegen


@intrinsic
def first_lane(typingctx: Any, value: Any) -> Any:
    """The first lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return value.lane(value), codegen


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


@intrinsic
def reduce_max(typingctx: Any, value: Any) -> Any:
    """Largest lane; NaN lanes are passed over, which LLVM's own reduction does at each step (27 operations, not 9)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (vec,) = args
        none = constant(vec.type.element, -math.inf)
        vec = builder.select(builder.fcmp_ordered("==", vec, vec), vec, none)
        width = LANES
        i32 = ir.IntType(32)
        while width > 1:
            width //= 2
            undefined = ir.Constant(vec.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(
                    vec, undefined, ir.Constant(ir.VectorType(i32, width), list(range(start, start + width)))
                )
                for start in (0, width)
            )
            vec = _larger(builder, low, high)
        return builder.extract_element(vec, ir.Constant(i32, 0))

    return value.lane(value), codegen


@intrinsic
def vector_abs(typingctx: Any, value: Any) -> Any:
    """|value| lane by lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_intrinsic(builder, f"llvm.fabs.{suffix(args[0].type.element)}", args[0].type, args)

    return value(value), codegen


@intrinsic
def vector_sqrt(typingctx: Any, value: Any) -> Any:
    """Square root lane by lane, correctly rounded."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_intrinsic(builder, f"llvm.sqrt.{suffix(args[0].type.element)}", args[0].type, args)

    return value(value), codegen


@intrinsic
def vector_max(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of the two, lane by lane; a where b is NaN."""
    return a(a, b), lambda context, builder, sig, args: _larger(builder, *args)


@intrinsic
def rounding(typingctx: Any, a: Any, b: Any, total: Any) -> Any:
    """What total = a + b lost, exactly (two-sum), lane by lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b, total = args
        kept = builder.fsub(total, a)
        return builder.fadd(builder.fsub(a, builder.fsub(total, kept)), builder.fsub(b, kept))

    return a(a, a, a), codegen


def lanes_below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose index is below count (an int64)."""
    index = ir.Constant(vector_of(ir.IntType(32)), list(range(LANES)))
    return builder.icmp_signed("<", index, splat_value(builder, builder.trunc(count, ir.IntType(32))))


@intrinsic
def first_lanes(typingctx: Any, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    return MASK(types.int64), lambda context, builder, sig, args: lanes_below(builder, args[0])


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is true, else b."""
    return a(MASK, a, b), lambda context, builder, sig, args: builder.select(*args)


def _compare(symbol: str) -> Any:
    @intrinsic
    def compare(typingctx: Any, a: Any, b: Any) -> Any:
        return MASK(a, b), lambda context, builder, sig, args: builder.fcmp_ordered(symbol, *args)

    return compare


equal = _compare("==")
less = _compare("<")
less_equal = _compare("<=")


@intrinsic
def both(typingctx: Any, a: Any, b: Any) -> Any:
    """Lanes that are true in both masks."""
    return MASK(MASK, MASK), lambda context, builder, sig, args: builder.and_(*args)


@intrinsic
def either(typingctx: Any, a: Any, b: Any) -> Any:
    """Lanes that are true in one of the masks."""
    return MASK(MASK, MASK), lambda context, builder, sig, args: builder.or_(*args)


@intrinsic
def without(typingctx: Any, a: Any, b: Any) -> Any:
    """Lanes that are true in a and not in b."""
    return MASK(MASK, MASK), lambda context, builder, sig, args: builder.and_(args[0], builder.not_(args[1]))


@intrinsic
def count_lanes(typingctx: Any, mask: Any) -> Any:
    """Number of lanes that are true."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), I64)
        return call_intrinsic(builder, "llvm.ctpop.i64", I64, [bits])

    return types.int64(MASK), codegen


@intrinsic
def add_bytes(typingctx: Any, count: Any, mask: Any) -> Any:
    """Byte lanes, one more where the mask is true: up to 255."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.add(args[0], builder.zext(args[1], args[0].type))

    return BYTES(BYTES, MASK), codegen


@intrinsic
def no_bytes(typingctx: Any) -> Any:
    """Byte lanes of 0."""
    return BYTES(), lambda context, builder, sig, args: constant(I8, 0)


@intrinsic
def as_float64(typingctx: Any, count: Any) -> Any:
    """Byte lanes as float64 ones."""
    return F64(BYTES), lambda context, builder, sig, args: builder.uitofp(args[0], vector_of(ir.DoubleType()))


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy 16 bytes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = vector_of(I8)
        value = builder.load(pointer(builder, args[1], kind), align=1)
        builder.store(value, pointer(builder, args[0], kind), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def fill_bytes(typingctx: Any, target: Any, value: Any) -> Any:
    """Store a byte 16 times."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = splat_value(builder, builder.trunc(args[1], I8))
        builder.store(value, pointer(builder, args[0], value.type), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen
