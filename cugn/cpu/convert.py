"""Memory of every dtype to and from float32 or float64 lanes.

float16 goes through the CPU's own conversion where it has one (F16C: 11 Gelem/s) and through integer arithmetic
elsewhere: LLVM would call a library function that is not there, and abort. bfloat16 is shifts with round to nearest
even. CUGN_F16C=0 forces the arithmetic, which is how the tests reach it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from .compile import inner
from .memory import I16, I64, pointer
from .simd import (
    F32,
    F64,
    LANES,
    call_intrinsic,
    constant,
    cpu_has,
    lanes_below,
    narrow_scalar,
    splat,
    suffix,
    vector_of,
)

_I32 = ir.IntType(32)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_STORAGE = {
    "float16": I16,
    "bfloat16": I16,
    "float32": _FLOAT,
    "float64": _DOUBLE,
    "int8": ir.IntType(8),
    "uint8": ir.IntType(8),
    "int16": I16,
    "uint16": I16,
    "bool": ir.IntType(8),
}
_ITEMSIZE = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float32": 4, "float64": 8}
COMPUTE = {"float32": F32, "float64": F64}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return _ITEMSIZE[dtype]


@cache
def has_half() -> bool:
    """Whether the CPU that is compiled for converts float16 itself; if not, the conversion would be a missing call."""
    if os.environ.get("CUGN_F16C", "1") == "0":
        return False
    return binding.get_default_triple().startswith(("aarch64", "arm64")) or cpu_has("f16c")


def _half_to_float(builder: Any, half: Any) -> Any:
    """<16 x i16> float16 bits -> <16 x float>."""
    if has_half():
        return builder.fpext(builder.bitcast(half, vector_of(ir.HalfType())), vector_of(_FLOAT))
    wide = builder.zext(half, vector_of(_I32))
    sign = builder.shl(builder.and_(wide, constant(_I32, 0x8000)), constant(_I32, 16))
    magnitude = builder.shl(builder.and_(wide, constant(_I32, 0x7FFF)), constant(_I32, 13))
    # times 2^112 moves the exponent's bias from 15 to 127, and makes normal numbers of subnormal ones, exactly
    value = builder.fmul(builder.bitcast(magnitude, vector_of(_FLOAT)), constant(_FLOAT, 2.0**112))
    bits = builder.bitcast(value, vector_of(_I32))
    special = builder.icmp_unsigned(">=", magnitude, constant(_I32, 0x0F800000))
    bits = builder.select(special, builder.or_(magnitude, constant(_I32, 0x7F800000)), bits)
    return builder.bitcast(builder.or_(bits, sign), vector_of(_FLOAT))


def _float_to_half(builder: Any, value: Any) -> Any:
    """<16 x float> -> <16 x i16> float16 bits, to nearest even."""
    if has_half():
        return builder.bitcast(builder.fptrunc(value, vector_of(ir.HalfType())), vector_of(I16))
    bits = builder.bitcast(value, vector_of(_I32))
    magnitude = builder.and_(bits, constant(_I32, 0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, constant(_I32, 0x80000000)), constant(_I32, 16))
    odd = builder.and_(builder.lshr(magnitude, constant(_I32, 13)), constant(_I32, 1))
    normal = builder.add(builder.add(magnitude, constant(_I32, (15 - 127) * 2**23 + 0xFFF)), odd)
    normal = builder.lshr(normal, constant(_I32, 13))
    # adding 0.5 leaves the subnormal's digits, rounded, at the end of the significand
    shifted = builder.fadd(builder.bitcast(magnitude, vector_of(_FLOAT)), constant(_FLOAT, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, vector_of(_I32)), constant(_I32, 0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, constant(_I32, 0x38800000)), subnormal, normal)
    result = builder.select(
        builder.icmp_unsigned(">=", magnitude, constant(_I32, 0x47800000)), constant(_I32, 0x7C00), result
    )
    result = builder.select(
        builder.icmp_unsigned(">", magnitude, constant(_I32, 0x7F800000)), constant(_I32, 0x7E00), result
    )
    return builder.trunc(builder.or_(result, sign), vector_of(I16))


def _bfloat_to_float(builder: Any, bits: Any) -> Any:
    """<16 x i16> bfloat16 bits -> <16 x float>."""
    wide = builder.shl(builder.zext(bits, vector_of(_I32)), constant(_I32, 16))
    return builder.bitcast(wide, vector_of(_FLOAT))


def _float_to_bfloat(builder: Any, value: Any) -> Any:
    """<16 x float> -> <16 x i16> bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = builder.bitcast(value, vector_of(_I32))
    odd = builder.and_(builder.lshr(bits, constant(_I32, 16)), constant(_I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, constant(_I32, 0x7FFF)), odd), constant(_I32, 16))
    quiet = builder.or_(builder.lshr(bits, constant(_I32, 16)), constant(_I32, 0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), vector_of(I16))


def _to_lanes(builder: Any, dtype: str, compute: str, raw: Any) -> Any:
    """Stored lanes as float32 or float64 ones."""
    target = vector_of(_FLOAT if compute == "float32" else _DOUBLE)
    if dtype == "float64":
        return raw
    if dtype.startswith("uint"):
        return builder.uitofp(raw, target)
    if dtype.startswith("int"):
        return builder.sitofp(raw, target)
    single = {"float16": _half_to_float, "bfloat16": _bfloat_to_float}.get(dtype, lambda builder, raw: raw)(
        builder, raw
    )
    return single if compute == "float32" else builder.fpext(single, target)


def _from_lanes(builder: Any, dtype: str, value: Any) -> Any:
    """float32 or float64 lanes as they are stored."""
    if dtype == "float64":
        return value
    # by way of float32 from float64 to 16 bits: x86 has no direct instruction, and the second rounding adds 2^-14 ulp
    single = value if value.type == vector_of(_FLOAT) else builder.fptrunc(value, vector_of(_FLOAT))
    return {"float16": _float_to_half, "bfloat16": _float_to_bfloat}.get(dtype, lambda builder, v: v)(builder, single)


@cache
def to_compute(compute: str) -> Any:
    """lanes(value): a float64 in all lanes of the compute dtype."""
    if compute == "float64":
        return splat

    @inner
    def lanes(value: float) -> Any:
        return splat(narrow_scalar(value))

    return lanes


@cache
def loader(dtype: str, compute: str) -> tuple[Any, Any]:
    """load(address) of 16 values, and load_part(address, count) of the first count, zeros after."""
    storage, lanes = _STORAGE[dtype], COMPUTE[compute]

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = builder.load(pointer(builder, args[0], vector_of(storage)), align=1)
            return _to_lanes(builder, dtype, compute, raw)

        return lanes(types.int64), codegen

    @intrinsic
    def load_part(typingctx: Any, address: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = _load_part(builder, storage, args[0], args[1])
            return _to_lanes(builder, dtype, compute, raw)

        return lanes(types.int64, types.int64), codegen

    return load, load_part


def _load_part(builder: Any, storage: ir.Type, address: Any, count: Any) -> Any:
    """The first count lanes at an address, zeros after; nothing beyond them is touched."""
    kind = vector_of(storage)
    if cpu_has("avx512bw") or (cpu_has("avx2") and storage in (_FLOAT, _DOUBLE)):
        args = [
            pointer(builder, address, kind),
            ir.Constant(_I32, 1),
            lanes_below(builder, count),
            constant(storage, 0),
        ]
        return call_intrinsic(builder, f"llvm.masked.load.{suffix(storage)}.p0", kind, args)
    value = constant(storage, 0)
    for width, has, place in _pieces(builder, storage, address, count, (1, 2, 4, 8)):
        before = builder.basic_block
        with builder.if_then(has):
            piece = builder.load(pointer(builder, place, ir.VectorType(storage, width)), align=1)
            wide = _lanes_of(builder, piece, range(width))
            moved = builder.shuffle_vector(wide, value, _order([*range(width), *range(LANES, 2 * LANES - width)]))
            inside = builder.basic_block
        value = _either(builder, (value, before), (moved, inside))
    before = builder.basic_block
    with builder.if_then(_is_whole(builder, count)):
        whole = builder.load(pointer(builder, address, kind), align=1)
        inside = builder.basic_block
    return _either(builder, (value, before), (whole, inside))


def _store_part(builder: Any, storage: ir.Type, address: Any, value: Any, count: Any) -> None:
    """The first count lanes to an address; nothing beyond them is touched."""
    kind = vector_of(storage)
    if cpu_has("avx512bw"):
        args = [value, pointer(builder, address, kind), ir.Constant(_I32, 1), lanes_below(builder, count)]
        call_intrinsic(builder, f"llvm.masked.store.{suffix(storage)}.p0", ir.VoidType(), args)
        return
    with builder.if_then(_is_whole(builder, count)):
        builder.store(value, pointer(builder, address, kind), align=1)
    left = builder.select(_is_whole(builder, count), ir.Constant(I64, 0), count)
    for width, has, place in _pieces(builder, storage, address, left, (8, 4, 2, 1)):
        before = builder.basic_block
        with builder.if_then(has):
            piece = builder.shuffle_vector(value, value, _order(range(width)))
            builder.store(piece, pointer(builder, place, piece.type), align=1)
            moved = _lanes_of(builder, value, range(width, LANES))
            inside = builder.basic_block
        value = _either(builder, (value, before), (moved, inside))


# Without masks for elements of this size, LLVM would test and move them one by one: 45 cycles for 16 bytes, with which
# a mask of positions cost three times the call. In pieces of 8, 4, 2, 1 elements it takes four tests.


def _pieces(builder: Any, storage: ir.Type, address: Any, count: Any, widths: tuple[int, ...]) -> Iterator[Any]:
    """Width, whether count has such a piece, and its address: after those that are wider."""
    size = {"i8": 1, "i16": 2, "float": 4, "double": 8}[str(storage)]
    for width in widths:
        has = builder.icmp_signed("!=", builder.and_(count, ir.Constant(I64, width)), ir.Constant(I64, 0))
        wider = builder.and_(count, ir.Constant(I64, -2 * width))
        yield width, has, builder.add(address, builder.mul(wider, ir.Constant(I64, size)))


def _is_whole(builder: Any, count: Any) -> Any:
    return builder.icmp_signed(">=", count, ir.Constant(I64, LANES))


def _either(builder: Any, *values: tuple[Any, Any]) -> Any:
    """The value of the block that was come from."""
    phi = builder.phi(values[0][0].type)
    for value, block in values:
        phi.add_incoming(value, block)
    return phi


def _lanes_of(builder: Any, value: Any, lanes: Iterable[int]) -> Any:
    """16 lanes, the first of which are these ones of a vector."""
    places = list(lanes)
    return builder.shuffle_vector(value, value, _order(places + places[:1] * (LANES - len(places))))


def _order(lanes: Iterable[int]) -> Any:
    places = list(lanes)
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


LINE = 64


def line_elements(dtype: str) -> int:
    """Elements of whole vectors that are whole cache lines.

    Only such are streamed: a line that is stored to in both ways is brought back from memory for the other. 51 MB of
    float16, channels-last, of which a vector is half a line, took 4.4 times as long.
    """
    return max(LANES, LINE // itemsize(dtype))


@cache
def storer(dtype: str, compute: str) -> tuple[Any, Any, Any]:
    """store(address, lanes), store_part(address, lanes, count), and store_stream past the cache (16-byte aligned)."""
    storage, lanes = _STORAGE[dtype], COMPUTE[compute]

    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(_from_lanes(builder, dtype, args[1]), pointer(builder, args[0], vector_of(storage)), align=1)
            return context.get_dummy_value()

        return types.none(types.int64, lanes), codegen

    @intrinsic
    def store_part(typingctx: Any, address: Any, value: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            _store_part(builder, storage, args[0], _from_lanes(builder, dtype, args[1]), args[2])
            return context.get_dummy_value()

        return types.none(types.int64, lanes, types.int64), codegen

    @intrinsic
    def store_stream(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            target = pointer(builder, args[0], vector_of(storage))
            written = builder.store(_from_lanes(builder, dtype, args[1]), target, align=_stream_alignment(storage))
            written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
            return context.get_dummy_value()

        return types.none(types.int64, lanes), codegen

    return store, store_part, store_stream


@cache
def loader_up_to(dtype: str, compute: str) -> Any:
    """load(address, left) of 16 values, or of the first `left` where there are fewer, zeros after."""
    whole, part = loader(dtype, compute)

    @inner
    def load(address: int, left: int) -> Any:
        if left >= LANES:
            return whole(address)
        return part(address, left)

    return load


def _stream_alignment(storage: ir.Type) -> int:
    """Bytes of alignment that a streaming store of 16 lanes asks for: a cache line, or all of a shorter vector."""
    return min(64, LANES * {"i8": 1, "i16": 2, "float": 4, "double": 8}[str(storage)])


@cache
def mask_loader() -> tuple[Any, Any]:
    """load(address) of 16 booleans as a mask, and load_part(address, count): False after count."""
    from .simd import MASK

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = builder.load(pointer(builder, args[0], vector_of(_STORAGE["bool"])), align=1)
            return builder.icmp_unsigned("!=", raw, constant(_STORAGE["bool"], 0))

        return MASK(types.int64), codegen

    @intrinsic
    def load_part(typingctx: Any, address: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            raw = _load_part(builder, _STORAGE["bool"], args[0], args[1])
            return builder.icmp_unsigned("!=", raw, constant(_STORAGE["bool"], 0))

        return MASK(types.int64, types.int64), codegen

    return load, load_part
