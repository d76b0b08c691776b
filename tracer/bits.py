"""Operations on bits that kernels compiled with njit do in one instruction."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


def _count_bits(typing_context, word):
    """Bits set in a uint64, a uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


def _lowest_bit(typing_context, word):
    """Place of the lowest bit set in a uint64, a uint64; 64 where none is."""

    def generate(context, builder, signature, arguments):
        # The second argument: 0 has an answer too.
        return builder.cttz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), generate


popcount: Any = intrinsic(_count_bits)
lowest_bit: Any = intrinsic(_lowest_bit)
