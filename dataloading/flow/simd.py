"""SIMD vectors of sixteen floats for compiled numba kernels: loads, stores, arithmetic and masks.

Explicit vectors make a kernel independent of the compiler's loop vectoriser: every element is rounded as IEEE 754
specifies on any instruction set, and the speed is predictable.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

SIMD_WIDTH = 16
Compiled = TypeVar("Compiled", bound=Callable[..., Any])

_FLOATS = ir.VectorType(ir.FloatType(), SIMD_WIDTH)
_INTS = ir.VectorType(ir.IntType(32), SIMD_WIDTH)
_BITS = ir.VectorType(ir.IntType(1), SIMD_WIDTH)


def kernel(function: Compiled) -> Compiled:
    """Compile a function at its first call; cache the result beside the source or in the user's cache, if writable.

    No fast mathematics: results are the same to the bit on any machine.
    """
    compile_: Any = partial(numba.njit, error_model="numpy", nogil=True)
    try:
        compiled: Compiled = compile_(cache=True)(function)
    except RuntimeError:  # no writable cache
        compiled = compile_()(function)
    return compiled


def inlined(function: Compiled) -> Compiled:
    """Compile a function into each kernel that calls it, so that vectors stay in registers."""
    compile_: Any = partial(numba.njit, error_model="numpy", nogil=True, forceinline=True)
    compiled: Compiled = compile_()(function)
    return compiled


def _instruction(typing: Callable[..., Any]) -> Any:
    """An instruction for kernels, from a function that returns its signature and its code generator."""
    return intrinsic(typing)


class _Vector(types.Type):
    """Sixteen values in one register, or in several if the machine's are smaller."""

    def __init__(self, name: str, representation: ir.VectorType) -> None:
        self.representation = representation
        super().__init__(name=name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.representation)  # type: ignore[no-untyped-call]


FLOATS = _Vector("Floats", _FLOATS)
INTS = _Vector("Ints", _INTS)


def _broadcast(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * SIMD_WIDTH))


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer())


def _llvm_function(name: str, arguments: int) -> Callable[..., Any]:
    """An LLVM intrinsic on float vectors."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * arguments)
        insert: Any = cgutils.get_or_insert_function
        return builder.call(insert(builder.module, kind, f"llvm.{name}.v{SIMD_WIDTH}f32"), args)

    return generate


def _select(comparison: str) -> Callable[..., Any]:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(comparison, *args), *args)

    return generate


@_instruction
def load(_typing: Any, image: Any, _index: Any) -> Any:
    """Sixteen floats of a flat float32 array, from an index on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature, args), align=4)

    return FLOATS(image, types.intp), generate


@_instruction
def store(_typing: Any, image: Any, _index: Any, _value: Any) -> Any:
    """Write sixteen floats to a flat float32 array, from an index on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature, args), align=4)

    return types.void(image, types.intp, FLOATS), generate


@_instruction
def broadcast(_typing: Any, _value: Any) -> Any:
    """A vector with one float32 in all elements."""
    return FLOATS(types.float32), lambda _context, builder, _signature, args: _broadcast(builder, args[0], _FLOATS)


@_instruction
def element_indices(_typing: Any) -> Any:
    """The indices of the elements, 0 to 15, as floats."""
    return FLOATS(), lambda *_: ir.Constant(_FLOATS, [float(index) for index in range(SIMD_WIDTH)])


@_instruction
def minimum(_typing: Any, _one: Any, _other: Any) -> Any:
    """Elementwise minimum."""
    return FLOATS(FLOATS, FLOATS), _select("<")


@_instruction
def maximum(_typing: Any, _one: Any, _other: Any) -> Any:
    """Elementwise maximum."""
    return FLOATS(FLOATS, FLOATS), _select(">")


@_instruction
def sqrt(_typing: Any, _value: Any) -> Any:
    """Square root."""
    return FLOATS(FLOATS), _llvm_function("sqrt", 1)


@_instruction
def floor(_typing: Any, _value: Any) -> Any:
    """Largest integer not above the value, as a float."""
    return FLOATS(FLOATS), _llvm_function("floor", 1)


@_instruction
def fma(_typing: Any, _one: Any, _other: Any, _addend: Any) -> Any:
    """one·other + addend, rounded once."""
    return FLOATS(FLOATS, FLOATS, FLOATS), _llvm_function("fma", 3)


@_instruction
def select_above(_typing: Any, _value: Any, _limit: Any, _result: Any) -> Any:
    """The result in elements whose value is above the limit, else 0."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], ir.Constant(_FLOATS, None))

    return FLOATS(FLOATS, FLOATS, FLOATS), generate


@_instruction
def reduce_min(_typing: Any, _value: Any) -> Any:
    """The smallest element."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        insert: Any = cgutils.get_or_insert_function
        kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
        return builder.call(insert(builder.module, kind, f"llvm.vector.reduce.fmin.v{SIMD_WIDTH}f32"), args)

    return types.float32(FLOATS), generate


@_instruction
def mask_equal(_typing: Any, _value: Any, _number: Any) -> Any:
    """Mask of the elements that equal a float, as bits of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        equal = builder.fcmp_ordered("==", args[0], _broadcast(builder, args[1], _FLOATS))
        return builder.zext(builder.bitcast(equal, ir.IntType(SIMD_WIDTH)), ir.IntType(32))

    return types.uint32(FLOATS, types.float32), generate


@_instruction
def to_int(_typing: Any, _value: Any) -> Any:
    """Floats as 32-bit integers, truncated towards zero."""
    return INTS(FLOATS), lambda _context, builder, _signature, args: builder.fptosi(args[0], _INTS)


@_instruction
def first_selected(_typing: Any, _ints: Any, _mask: Any) -> Any:
    """The first element whose bit is set in a mask, a uint32 other than 0."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.cttz(args[1], ir.Constant(ir.IntType(1), 0)))

    return types.int32(INTS, types.uint32), generate


@_instruction
def mask_equal_int(_typing: Any, _ints: Any, _value: Any) -> Any:
    """Mask of the elements that equal an integer, as bits of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        equal = builder.icmp_signed("==", args[0], _broadcast(builder, args[1], _INTS))
        return builder.zext(builder.bitcast(equal, ir.IntType(SIMD_WIDTH)), ir.IntType(32))

    return types.uint32(INTS, types.int32), generate


@_instruction
def blend(_typing: Any, _mask: Any, _inside: Any, _outside: Any) -> Any:
    """Elements of the second argument where the mask's bits are set, of the third elsewhere."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.bitcast(builder.trunc(args[0], ir.IntType(SIMD_WIDTH)), _BITS), args[1], args[2])

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
