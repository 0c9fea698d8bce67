"""The exact sum of the squares of gradients, the same for any order and any division of the elements.

A square is g·g in float64, rounded once; that of a float32, bfloat16 or float16 number is exact. Squares are added
exactly, as whole multiples of 2⁻¹⁰⁷⁴, the smallest float64. An engine keeps the sum as `WORDS` int64 words of 32 bits,
the lowest first; the upper half of a word holds carries until they are moved up. Elements that have no finite square
are not added but counted (`Count`), beside the words. So the sums and counts of rows, batches, devices and processes
are added word by word, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

WORDS = 68  # 2,176 bits: those of a finite float64, and carries of 2⁷⁸ additions
WORD_BITS = 32
LOWEST = -1074  # the exponent of the sum's last bit


class Count(IntEnum):
    """The words after the sum: how many elements, or processes, have each fault."""

    NAN = 68  # elements that are NaN
    INFINITE = 69  # elements that are infinite, or whose square is
    LARGE = 70  # finite elements, unscaled, whose square is infinite in the type that the step computes in
    FAILED = 71  # processes that cannot step


TOTAL_WORDS = 72


def whole(words: Sequence[int]) -> int:
    """Return the sum in multiples of 2⁻¹⁰⁷⁴, from its words; carries may not have been moved up."""
    return sum(int(word) << (WORD_BITS * place) for place, word in enumerate(words[:WORDS]))


def words_of(total: int) -> list[int]:
    """Return the words of a sum of multiples of 2⁻¹⁰⁷⁴, the carries moved up."""
    return [(total >> (WORD_BITS * place)) & (2**WORD_BITS - 1) for place in range(WORDS)]


def root(total: int) -> float:
    """Return the square root of a sum of multiples of 2⁻¹⁰⁷⁴: the sum is rounded once to 53 bits, and its root once.

    It is finite, because the sum may be larger than any float64.
    """
    shift = max(0, total.bit_length() - 53)
    kept, rest = total >> shift, total & ((1 << shift) - 1)
    half = 1 << shift >> 1
    if rest > half or (rest == half and shift and kept & 1):
        kept += 1
    if shift & 1:  # an even exponent, whose half is whole
        kept, shift = 2 * kept, shift - 1
    return math.ldexp(math.sqrt(kept), (shift + LOWEST) // 2)
