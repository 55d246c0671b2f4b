"""Sixteen floats at a time in compiled kernels: loads, stores and arithmetic on vectors, for numba.

A kernel written so does not depend on what a compiler makes of a loop: every lane is rounded as IEEE 754 says, on any
instruction set, and the speed does not hang on an optimiser's mood.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
Compiled = TypeVar("Compiled", bound=Callable[..., Any])

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


def kernel(function: Compiled) -> Compiled:
    """Compile at the first call, and keep the result beside the source, or in the user's cache, where one is writable.

    No fast mathematics: results are the same to the bit wherever they are computed.
    """
    compile_: Any = partial(numba.njit, error_model="numpy", nogil=True)
    try:
        compiled: Compiled = compile_(cache=True)(function)
    except RuntimeError:  # nowhere to keep it
        compiled = compile_()(function)
    return compiled


def inlined(function: Compiled) -> Compiled:
    """A part of kernels, written into each that calls it: vectors stay in registers."""
    compile_: Any = partial(numba.njit, error_model="numpy", nogil=True, forceinline=True)
    compiled: Compiled = compile_()(function)
    return compiled


def _instruction(typing: Callable[..., Any]) -> Any:
    """Make a function for kernels of one that tells its signature and how to generate its code."""
    return intrinsic(typing)


class _Vector(types.Type):
    """Sixteen values in one register, or in as many as the machine needs for them."""

    def __init__(self, name: str, representation: ir.VectorType) -> None:
        self.representation = representation
        super().__init__(name=name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.representation)  # type: ignore[no-untyped-call]


FLOATS = _Vector("Floats", _FLOATS)
INTS = _Vector("Ints", _INTS)


def _spread(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    nothing = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * LANES))


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer())


def _library(name: str, arguments: int) -> Callable[..., Any]:
    """A function of LLVM's on floats."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * arguments)
        insert: Any = cgutils.get_or_insert_function
        return builder.call(insert(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)

    return generate


def _chosen(comparison: str) -> Callable[..., Any]:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(comparison, *args), *args)

    return generate


@_instruction
def load(_typing: Any, plane: Any, _index: Any) -> Any:
    """Sixteen floats of a flat float32 array from an index on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature, args), align=4)

    return FLOATS(plane, types.intp), generate


@_instruction
def store(_typing: Any, plane: Any, _index: Any, _value: Any) -> Any:
    """Write sixteen floats to a flat float32 array from an index on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature, args), align=4)

    return types.void(plane, types.intp, FLOATS), generate


@_instruction
def spread(_typing: Any, _value: Any) -> Any:
    """One float32 in all lanes."""
    return FLOATS(types.float32), lambda _context, builder, _signature, args: _spread(builder, args[0], _FLOATS)


@_instruction
def numbered(_typing: Any) -> Any:
    """The lanes' numbers, 0 to 15, as floats."""
    return FLOATS(), lambda *_: ir.Constant(_FLOATS, [float(lane) for lane in range(LANES)])


@_instruction
def smaller(_typing: Any, _one: Any, _other: Any) -> Any:
    """The smaller of two, lane by lane."""
    return FLOATS(FLOATS, FLOATS), _chosen("<")


@_instruction
def larger(_typing: Any, _one: Any, _other: Any) -> Any:
    """The larger of two, lane by lane."""
    return FLOATS(FLOATS, FLOATS), _chosen(">")


@_instruction
def root(_typing: Any, _value: Any) -> Any:
    """Square root."""
    return FLOATS(FLOATS), _library("sqrt", 1)


@_instruction
def floor(_typing: Any, _value: Any) -> Any:
    """The next whole number below."""
    return FLOATS(FLOATS), _library("floor", 1)


@_instruction
def fused(_typing: Any, _one: Any, _other: Any, _more: Any) -> Any:
    """one·other + more, rounded once."""
    return FLOATS(FLOATS, FLOATS, FLOATS), _library("fma", 3)


@_instruction
def where_above(_typing: Any, _value: Any, _limit: Any, _result: Any) -> Any:
    """The result where the value is above the limit, else 0."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], ir.Constant(_FLOATS, None))

    return FLOATS(FLOATS, FLOATS, FLOATS), generate


@_instruction
def lowest(_typing: Any, _value: Any) -> Any:
    """The smallest of the lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        insert: Any = cgutils.get_or_insert_function
        kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
        return builder.call(insert(builder.module, kind, f"llvm.vector.reduce.fmin.v{LANES}f32"), args)

    return types.float32(FLOATS), generate


@_instruction
def lanes_at(_typing: Any, _value: Any, _number: Any) -> Any:
    """The lanes that are equal to a number, as bits of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        equal = builder.fcmp_ordered("==", args[0], _spread(builder, args[1], _FLOATS))
        return builder.zext(builder.bitcast(equal, ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(FLOATS, types.float32), generate


@_instruction
def whole(_typing: Any, _value: Any) -> Any:
    """Floats as 32-bit integers, cut towards zero."""
    return INTS(FLOATS), lambda _context, builder, _signature, args: builder.fptosi(args[0], _INTS)


@_instruction
def first_of(_typing: Any, _ints: Any, _lanes: Any) -> Any:
    """The integer in the first of the lanes whose bits are set in a uint32, of which one is."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.cttz(args[1], ir.Constant(ir.IntType(1), 0)))

    return types.int32(INTS, types.uint32), generate


@_instruction
def lanes_with(_typing: Any, _ints: Any, _value: Any) -> Any:
    """The lanes that hold a value, as bits of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        equal = builder.icmp_signed("==", args[0], _spread(builder, args[1], _INTS))
        return builder.zext(builder.bitcast(equal, ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(INTS, types.int32), generate


@_instruction
def blend(_typing: Any, _lanes: Any, _inside: Any, _outside: Any) -> Any:
    """One vector in the lanes whose bits are set, another in the rest."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.bitcast(builder.trunc(args[0], ir.IntType(LANES)), _BITS), args[1], args[2])

    return FLOATS(types.uint32, FLOATS, FLOATS), generate


def _arithmetic(instruction: str, symbol: Callable[..., Any]) -> None:
    @_instruction
    def compute(_typing: Any, _one: Any, _other: Any) -> Any:
        return FLOATS(FLOATS, FLOATS), lambda _context, builder, _signature, args: getattr(builder, instruction)(*args)

    def on_floats(one: Any, other: Any) -> Any:
        return compute(one, other)

    @overload(symbol)
    def choose(one: Any, other: Any) -> Any:
        return on_floats if one is FLOATS and other is FLOATS else None


_arithmetic("fadd", operator.add)
_arithmetic("fsub", operator.sub)
_arithmetic("fmul", operator.mul)
_arithmetic("fdiv", operator.truediv)
