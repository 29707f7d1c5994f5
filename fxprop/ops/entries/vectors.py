"""The innermost loop, in vector registers: what numba makes of it is two to three times slower."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# bytes of the widest registers there are; where they are narrower LLVM takes several
VECTOR = 64

_int32, _int64 = ir.IntType(32), ir.IntType(64)


def _side_by_side(vectors: int) -> Any:
    """The loop for so many vectors that lie one behind the other."""

    @intrinsic
    def add_products(
        typing: Any, out: Any, at: Any, source: Any, rows: Any, stride: Any, offset: Any, values: Any,
        first: Any, last: Any,
    ) -> Any:  # fmt: skip
        """out[at:] += values[q] * source[rows[q] * stride + offset:] for q from first to last, in order."""
        signature = types.void(out, at, source, rows, stride, offset, values, first, last)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            into, read, at_rows, factors = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 3, 6)
            )
            at, stride, offset, first, last = (args[i] for i in (1, 4, 5, 7, 8))
            size = signature.args[0].dtype.bitwidth // 8
            lanes = VECTOR // size
            vector = ir.VectorType(context.get_value_type(signature.args[0].dtype), lanes)
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f{8 * size}"
            )

            def pointers(array: Any, index: Any) -> list[Any]:
                steps = [ir.Constant(_int64, lanes * of) for of in range(vectors)]
                found = [builder.gep(array, [builder.add(index, step)]) for step in steps]
                return [builder.bitcast(pointer, vector.as_pointer()) for pointer in found]

            targets = pointers(into, at)
            sums = [cgutils.alloca_once_value(builder, builder.load(t, align=size)) for t in targets]
            with cgutils.for_range_slice(builder, first, last, ir.Constant(_int64, 1)) as (q, _):
                row = builder.zext(builder.load(builder.gep(at_rows, [q])), _int64)
                factor = builder.load(builder.gep(factors, [q]))
                one = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), factor, ir.Constant(_int32, 0)
                )
                lanes_of_one = ir.Constant(ir.VectorType(_int32, lanes), [0] * lanes)
                spread = builder.shuffle_vector(one, one, lanes_of_one)
                places = pointers(read, builder.add(builder.mul(row, stride), offset))
                for place, total in zip(places, sums, strict=True):
                    terms = (spread, builder.load(place, align=size), builder.load(total))
                    builder.store(builder.call(multiply_add, terms), total)
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=size)
            return context.get_dummy_value()

        return signature, generate

    return add_products


add_8_vectors, add_4_vectors, add_1_vector = (_side_by_side(vectors) for vectors in (8, 4, 1))

# entries that `mask_larger` looks at: a bit of its result for each
MASKED = 64


@intrinsic
def mask_larger(typing: Any, bits: Any, at: Any, magnitude: Any, least: Any) -> Any:
    """The bits of an unsigned number: whether bits[at + i] & magnitude > least, for i from 0 to 63."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        of = signature.args[0]
        number = context.get_value_type(of.dtype)
        vector = ir.VectorType(number, MASKED)

        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_int32, 0))
            return builder.shuffle_vector(
                one, one, ir.Constant(ir.VectorType(_int32, MASKED), [0] * MASKED)
            )

        data = context.make_array(of)(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        found = builder.load(place, align=of.dtype.bitwidth // 8)
        larger = builder.icmp_unsigned(">", builder.and_(found, spread(args[2])), spread(args[3]))
        return builder.bitcast(larger, _int64)

    return types.uint64(bits, types.uint64, bits.dtype, bits.dtype), generate


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set; there is one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate
