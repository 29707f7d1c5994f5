"""The innermost loop, in vector registers: what numba makes of it is two to three times slower."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# bytes of the widest registers there are; where they are narrower LLVM takes several
VECTOR = 32

_int32, _int64 = ir.IntType(32), ir.IntType(64)


class _Vectors:
    """What the loops over kept entries have in common, while one of them is generated."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.builder = builder
        into, read, self._rows, self._factors = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 4, 7)
        )
        out = signature.args[0].dtype
        self.size = out.bitwidth // 8
        self.lanes = VECTOR // self.size
        self.vector = ir.VectorType(context.get_value_type(out), self.lanes)
        name = f"llvm.fmuladd.v{self.lanes}f{out.bitwidth}"
        of_three = ir.FunctionType(self.vector, [self.vector] * 3)
        self._multiply_add = cgutils.get_or_insert_function(builder.module, of_three, name)
        self.target = builder.gep(into, [args[1]])
        self._source, self._stride, self._offset = read, args[5], args[6]

    def entry(self, q: Any) -> tuple[Any, Any]:
        """The factor of an entry, in all lanes, and where its row begins."""
        build = self.builder
        factor = build.load(build.gep(self._factors, [q]))
        row = build.zext(build.load(build.gep(self._rows, [q])), _int64)
        start = build.gep(self._source, [build.add(build.mul(row, self._stride), self._offset)])
        return _spread(build, factor, self.lanes), start

    def load(self, pointer: Any, index: Any) -> Any:
        return self.builder.load(self._place(pointer, index), align=self.size)

    def store(self, vector: Any, pointer: Any, index: Any) -> None:
        self.builder.store(vector, self._place(pointer, index), align=self.size)

    def multiply_add(self, factor: Any, vector: Any, total: Any) -> Any:
        return self.builder.call(self._multiply_add, (factor, vector, total))

    def _place(self, pointer: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector.as_pointer())


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_int32, 0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_int32, lanes), [0] * lanes))


def _of_entries(entries: int) -> Any:
    """The loop for so many entries at once."""

    @intrinsic
    def add_rows(
        typing: Any, out: Any, at: Any, length: Any, source: Any, rows: Any, stride: Any, offset: Any,
        values: Any, first: Any,
    ) -> Any:  # fmt: skip
        """out[at:] += values[q] * source[rows[q] * stride + offset:] for q from `first` on, in order.

        `length` numbers, which are whole vectors.
        """
        signature = types.void(out, at, length, source, rows, stride, offset, values, first)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            on, first = _Vectors(context, builder, signature, args), args[8]
            begun = [on.entry(builder.add(first, ir.Constant(_int64, entry))) for entry in range(entries)]
            zero, step = ir.Constant(_int64, 0), ir.Constant(_int64, on.lanes)
            with cgutils.for_range_slice(builder, zero, args[2], step) as (i, _):
                total = on.load(on.target, i)
                for factor, start in begun:
                    total = on.multiply_add(factor, on.load(start, i), total)
                on.store(total, on.target, i)
            return context.get_dummy_value()

        return signature, generate

    return add_rows


# each row of `out` is read and written once for so many entries, and theirs are read from end to end, which
# is as fast as they can be fetched from wherever they are
add_8_rows, add_4_rows, add_2_rows, add_1_row = (_of_entries(entries) for entries in (8, 4, 2, 1))


@intrinsic
def add_short_rows(
    typing: Any, out: Any, at: Any, length: Any, source: Any, rows: Any, stride: Any, offset: Any,
    values: Any, first: Any, last: Any,
) -> Any:  # fmt: skip
    """As `add_8_rows` for q from first to last and fewer numbers than a vector has, though all are read."""
    signature = types.void(out, at, length, source, rows, stride, offset, values, first, last)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        on, (first, last) = _Vectors(context, builder, signature, args), args[8:]
        zero, one = ir.Constant(_int64, 0), ir.Constant(_int64, 1)
        total = cgutils.alloca_once_value(builder, on.load(on.target, zero))
        with cgutils.for_range_slice(builder, first, last, one) as (q, _):
            factor, start = on.entry(q)
            builder.store(on.multiply_add(factor, on.load(start, zero), builder.load(total)), total)
        with cgutils.for_range(builder, args[2]) as loop:
            number = builder.extract_element(builder.load(total), loop.index)
            builder.store(number, builder.gep(on.target, [loop.index]))
        return context.get_dummy_value()

    return signature, generate


# entries that `mask_larger` looks at: a bit of its result for each
MASKED = 64


@intrinsic
def mask_larger(typing: Any, bits: Any, at: Any, magnitude: Any, least: Any) -> Any:
    """The bits of an unsigned number: whether bits[at + i] & magnitude > least, for i from 0 to 63."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        of = signature.args[0]
        vector = ir.VectorType(context.get_value_type(of.dtype), MASKED)
        data = context.make_array(of)(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        found = builder.load(place, align=of.dtype.bitwidth // 8)
        magnitude, least = (_spread(builder, args[i], MASKED) for i in (2, 3))
        larger = builder.icmp_unsigned(">", builder.and_(found, magnitude), least)
        return builder.bitcast(larger, _int64)

    return types.uint64(bits, types.uint64, bits.dtype, bits.dtype), generate


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set; there is one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate
