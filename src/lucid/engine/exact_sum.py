"""The exact sum of the squares of gradients, the same for any order and any division of the elements.

A square is g·g in float64, rounded once; that of a float32, bfloat16 or float16 number is exact. Squares are added
exactly, as whole multiples of 2⁻¹⁰⁷⁴, the smallest float64. An engine keeps the sum as `WORDS` int64 words of 32 bits,
the lowest first; the upper half of a word holds carries until they are moved up. Elements that have no finite square
are not added but counted (`Count`), beside the words. So the sums and counts of rows, batches, devices and processes
are added word by word, in any order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

WORDS = 67  # 2,144 bits: 2,098 of a finite float64, and 46 for carries, of which the last word has room for 31 more
WORD_BITS = 32
LOWEST = -1074  # the exponent of the sum's last bit


class Count(IntEnum):
    """The words after the sum: how many elements, or processes, have each fault."""

    NAN = 67  # elements that are NaN
    INFINITE = 68  # elements that are infinite, or whose float64 square is
    LARGE = 69  # finite elements, unscaled, whose square is infinite in the type that the step computes in
    BAD = 70  # processes with another reason to skip, such as GradScaler's found_inf
    FAILED = 71  # processes that cannot step
    BEGUN = 72  # processes whose step is not one by which torch creates state: they have state, or a gradient but zero


TOTAL_WORDS = 73

# From this |g| on, g² overflows, in the two types that steps compute in.
LIMITS = {torch.float32: 2.0**64, torch.float64: 2.0**512}


def blank(kinds: Sequence[int] | None) -> list[int]:
    """Return zero words for each kind of row; ``kinds``: the kind of each row, or None if there is only one."""
    return [0] * TOTAL_WORDS * (1 if kinds is None else 1 + max(kinds))


def add(words: list[int], gradient: Tensor, scale: float, kind: int = 0) -> None:
    """Add the squares of a real tensor in the compute type to the words of a kind. ``scale``: that of the gradient."""
    first = TOTAL_WORDS * kind
    total = whole(words[first : first + TOTAL_WORDS])
    for part in torch.split(gradient.reshape(-1), 2**20):
        wide = part.cpu().double()
        square = wide * wide
        words[first + Count.NAN] += int(wide.isnan().sum())
        words[first + Count.INFINITE] += int(square.isinf().sum())
        large = wide.isfinite() & (wide.abs() >= LIMITS[gradient.dtype] * scale)
        words[first + Count.LARGE] += int(large.sum())
        bits = square[square.isfinite()].view(torch.int64)
        exponent = bits >> 52
        significand = (bits & (2**52 - 1)) | ((exponent > 0).long() << 52)
        place = exponent.clamp(min=1) - 1  # the square is significand · 2^(place + LOWEST)
        for shift, piece in ((0, significand & (2**32 - 1)), (32, significand >> 32)):
            sums = torch.zeros(2047, dtype=torch.int64).index_add_(0, place, piece)
            total += sum(sums[k].item() << (k + shift) for k in sums.nonzero().flatten().tolist())
    words[first : first + WORDS] = words_of(total)


def whole(words: Sequence[int]) -> int:
    """Return the sum in multiples of 2⁻¹⁰⁷⁴, from its words; carries may not have been moved up."""
    try:
        return int.from_bytes(array("I", words[:WORDS]), "little")
    except OverflowError:  # they have not
        return sum(word << (WORD_BITS * place) for place, word in enumerate(words[:WORDS]))


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


def norm_in(words: Sequence[int], scale: float) -> float:
    """Return the norm of gradients with this scale, from their words."""
    if words[Count.NAN]:
        return math.nan
    return math.inf if words[Count.INFINITE] else root(whole(words)) / scale
