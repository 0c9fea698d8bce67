"""The exact sum of the squares of gradients (`lucid.engine.exact_sum`) in Triton, in integers alone.

A square of a float32 g is (m·2ᵏ)² at the place of the smallest exponent that occurs, with m the 24 bits of g's
significand. m·2ᵏ is cut into two halves, so a square is three products of 48 bits, each of which is added to its own
int64. This holds for exponents up to 23 apart. If there are others, the elements are read window by window of 24
exponents. A square of a float64 is rounded first, and its 53 bits are cut into three parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lucid.engine import exact_sum, numbers
from lucid.engine.numbers import Told

from .formats import FLOAT64, bits_of
from .kernels import COLUMNS, ELEMENTS, LAYOUT, load_gradient, number_at

SETS = tl.constexpr(int(Told.SETS))
SCALE = tl.constexpr(int(Told.SCALE))
SCALE_AT = tl.constexpr(int(Told.SCALE_AT))
SCALE_DOUBLE = tl.constexpr(int(Told.SCALE_DOUBLE))
FOUND_INF_AT = tl.constexpr(int(Told.FOUND_INF_AT))

WORDS = tl.constexpr(exact_sum.WORDS)
TOTAL_WORDS = tl.constexpr(exact_sum.TOTAL_WORDS)
NAN = tl.constexpr(int(exact_sum.Count.NAN))
INFINITE = tl.constexpr(int(exact_sum.Count.INFINITE))
LARGE = tl.constexpr(int(exact_sum.Count.LARGE))
BAD = tl.constexpr(int(exact_sum.Count.BAD))
FAILED = tl.constexpr(int(exact_sum.Count.FAILED))
BEGUN = tl.constexpr(int(exact_sum.Count.BEGUN))
COPIES = tl.constexpr(numbers.COPIES)
PADDED = tl.constexpr(numbers.PADDED)

LOWEST = tl.constexpr(exact_sum.LOWEST)

_LOW_32 = tl.constexpr(0xFFFFFFFF)
_LOW_24 = tl.constexpr(0xFFFFFF)


@triton.jit
def scale_of(config):
    """Return GradScaler's scale of the gradients, float64. ``config``: the words of `Told`."""
    scale = tl.load(config.to(tl.pointer_type(tl.float64)) + SCALE)
    scale_at = tl.load(config + SCALE_AT)
    if scale_at != 0:
        scale = number_at(scale_at, tl.load(config + SCALE_DOUBLE))
    return scale


@triton.jit
def cut(value, place, word):
    """Return the 32 bits of value · 2^place that belong to a word; `value`: int64 >= 0, `word`: int64[words]."""
    shift = 32 * word - place
    right = tl.where(shift < 64, value >> tl.minimum(tl.maximum(shift, 0), 63), 0)
    left = tl.where(shift > -32, value << tl.minimum(tl.maximum(-shift, 0), 31), 0)
    return tl.where(shift >= 0, right, left) & _LOW_32


@triton.jit
def add(sums, place, first, second, third, to_second: tl.constexpr, to_third: tl.constexpr):
    """Add (first + second · 2^to_second + third · 2^to_third) · 2^place to a sum; the three are int64 >= 0."""
    word = tl.arange(0, 8).to(tl.int64)
    within = place & 31
    found = cut(first, within, word) + cut(second, within + to_second, word) + cut(third, within + to_third, word)
    tl.atomic_add(sums + (place >> 5) + word, found, mask=found != 0, sem="relaxed")


@triton.jit
def bits_to_add(x):
    """Return the bits of |x| of float32 elements, or of the square of float64 elements."""
    if x.dtype == tl.float64:
        return (x * x).to(tl.uint64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return bits_of(x) & 0x7FFFFFFF


@triton.jit
def pieces(x, base, width):
    """Return the three numbers to add for each element whose exponent is `base` or up to `width` - 1 above it."""
    bits = bits_to_add(x)
    if x.dtype == tl.float64:
        shift = (tl.maximum((bits >> 52).to(tl.int32), 1) - base).to(tl.uint32)  # very large below the base
        m = (bits & 0xFFFFFFFFFFFFF) | tl.where(bits < 0x10000000000000, 0, 0x10000000000000)
        m = tl.where(shift < width, m, 0)
        shift = (shift & 63).to(tl.uint64)  # defined for the others too
        lower = m << shift
        return (lower & _LOW_32).to(tl.int64), (lower >> 32).to(tl.int64), ((m >> 1) >> (63 - shift)).to(tl.int64)
    else:
        shift = (tl.maximum((bits >> 23).to(tl.int32), 1) - base).to(tl.uint32)
        m = (bits & 0x7FFFFF) | tl.where(bits < 0x800000, 0, 0x800000)
        m = tl.where(shift < width, m, 0)
        low = ((m << (shift & 31)) & _LOW_24).to(tl.uint64)
        high = (m >> ((24 - shift) & 31)).to(tl.uint64)
        return (low * low).to(tl.int64), (high * low).to(tl.int64), (high * high).to(tl.int64)


@triton.jit
def extremes(
    address, begin, lane, layout, own, whole, has_rest,
    gradient: tl.constexpr, compute: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr, unsigned: tl.constexpr,
):  # fmt: skip
    """Return the largest of the bits to add, and the smallest but zeros."""
    most = tl.zeros(lane.shape, unsigned)
    least = most - 1  # less 1, so that zeros become the largest
    for turn in range(0, whole):
        start = begin + turn * lane.shape[0]
        bits = bits_to_add(load_gradient(address, start, lane, layout, own, gradient, compute, dims, wide, False))
        most, least = tl.maximum(most, bits), tl.minimum(least, bits - 1)
    if has_rest:
        start = begin + whole * lane.shape[0]
        bits = bits_to_add(load_gradient(address, start, lane, layout, own, gradient, compute, dims, wide, True))
        most, least = tl.maximum(most, bits), tl.minimum(least, bits - 1)
    return tl.max(most, axis=0), tl.min(least, axis=0) + 1


@triton.jit
def add_window(
    address, begin, lane, layout, own, whole, has_rest, base, width, sums,
    gradient: tl.constexpr, compute: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Add the squares whose exponent is in a window (see `pieces`) to a sum."""
    low = tl.zeros(lane.shape, tl.int64)
    middle = low
    high = low
    for turn in range(0, whole):
        start = begin + turn * lane.shape[0]
        x = load_gradient(address, start, lane, layout, own, gradient, compute, dims, wide, False)
        one, two, three = pieces(x, base, width)
        low, middle, high = low + one, middle + two, high + three
    if has_rest:
        start = begin + whole * lane.shape[0]
        x = load_gradient(address, start, lane, layout, own, gradient, compute, dims, wide, True)
        one, two, three = pieces(x, base, width)
        low, middle, high = low + one, middle + two, high + three
    sum1, sum2, sum3 = tl.sum(low, axis=0), tl.sum(middle, axis=0), tl.sum(high, axis=0)
    if compute == FLOAT64:
        add(sums, (base - 1).to(tl.int64), sum1, sum2, sum3, 32, 64)
    else:
        add(sums, (2 * base + 774).to(tl.int64), sum1, sum2, sum3, 25, 48)  # (high 2^24 + low)^2


@triton.jit
def add_counts(x, limit, sums):
    """Count elements that are NaN, elements without a finite square, and finite elements that are not below a limit."""
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    large = (size >= limit) & (size < float("inf"))
    tl.atomic_add(sums + NAN, tl.sum((x != x).to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(sums + INFINITE, tl.sum((wide * wide == float("inf")).to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(sums + LARGE, tl.sum(large.to(tl.int64), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["row_count"])
def squares(
    rows, step, programs, layouts, config, sums, row_count,
    gradient: tl.constexpr, compute: tl.constexpr, dims: tl.constexpr, wide: tl.constexpr,
    tile: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """Add the squares of a part of a gradient to a sum, and count the elements that have a fault.

    ``rows``, ``step``, ``programs``, ``layouts``: as in `update`; a part is `tiles` tiles, up to 2^15 elements.
    ``config``: the words of `Told`. ``sums``: int64[COPIES, PADDED], in each copy the words of
    `lucid.engine.exact_sum`. The part is read once to find its exponents, and then, from a cache, to add.
    """
    program = tl.load(programs + tl.program_id(0))
    number = program & _LOW_32
    address = tl.load(step + number)
    if address == 0:
        return
    row = rows + number * COLUMNS
    elements = tl.load(row + ELEMENTS)
    layout = layouts + tl.load(row + LAYOUT)
    sums += tl.program_id(0) % COPIES * PADDED
    begin = (program >> 32) * (tile * tiles)
    lane = tl.arange(0, tile)
    whole = tl.minimum((elements - begin) // tile, tiles).to(tl.int32)  # tiles that are full
    own = begin + whole * tile + lane < elements
    has_rest = (whole < tiles) & (begin + whole * tile < elements)
    limit = scale_of(config)
    if compute == FLOAT64:
        most, least = extremes(
            address, begin, lane, layout, own, whole, has_rest, gradient, compute, dims, wide, tl.uint64
        )
        first, last = tl.maximum((least >> 52).to(tl.int32), 1), tl.maximum((most >> 52).to(tl.int32), 1)
        window, finite = 43, 2046
        limit *= 1.3407807929942597e154  # 2^512
        fine = most.to(tl.float64, bitcast=True) < limit * limit * 0.5
    else:
        most, least = extremes(
            address, begin, lane, layout, own, whole, has_rest, gradient, compute, dims, wide, tl.uint32
        )
        first, last = tl.maximum((least >> 23).to(tl.int32), 1), tl.maximum((most >> 23).to(tl.int32), 1)
        window, finite = 24, 254
        limit *= 18446744073709551616.0  # 2^64
        fine = most.to(tl.float32, bitcast=True) < limit.to(tl.float32) * 0.5
    windows = tl.where(most == 0, 0, (tl.minimum(last, finite) - first + window) // window)
    for number_of_window in range(0, windows):
        base = first + number_of_window * window
        width = tl.minimum(window, finite + 1 - base).to(tl.uint32)
        add_window(address, begin, lane, layout, own, whole, has_rest, base, width, sums, gradient, compute, dims, wide)
    if fine == 0:  # or nearly, or NaN
        for turn in range(0, whole + has_rest.to(tl.int32)):
            start = begin + turn * tile
            own = start + lane < elements
            x = load_gradient(address, start, lane, layout, own, gradient, compute, dims, wide, True)
            add_counts(x, limit, sums)


@triton.jit
def occupied(words):
    """Return the places of the first and the last word of a sum that are not 0; `words`: int64[PADDED]."""
    word = tl.arange(0, PADDED)
    inside = (words != 0) & (word < WORDS)
    return tl.min(tl.where(inside, word, WORDS), axis=0), tl.max(tl.where(inside, word, -1), axis=0)


@triton.jit
def settle(config, sums, words):
    """Add the copies of a sum, move carries up, and set the copies to zero for the next step; one sum a program.

    ``config``: the words of `Told`. ``sums``: int64[kinds, COPIES, PADDED]. ``words``: int64[kinds, TOTAL_WORDS],
    written; the first kind's counts also tell what the host has told the device.
    """
    kind = tl.program_id(0)
    words += kind * TOTAL_WORDS
    word = tl.arange(0, PADDED)
    at = sums + kind * (COPIES * PADDED) + tl.arange(0, COPIES)[:, None] * PADDED + word[None, :]
    total = tl.sum(tl.load(at), axis=0)
    tl.store(at, tl.zeros([COPIES, PADDED], tl.int64))
    tl.store(words + word, total, mask=word < TOTAL_WORDS)
    first, last = occupied(total)
    tl.debug_barrier()  # the words are written by all threads, and read by each
    carry = tl.full([], 0, tl.int64)
    for place in range(first, tl.minimum(last + 3, WORDS)):  # two words hold what is moved up from the last
        carry += tl.load(words + place)
        tl.store(words + place, carry & _LOW_32)
        carry = carry >> 32
    found_at = tl.load(config + FOUND_INF_AT)
    if (found_at != 0) & (kind == 0):
        tl.store(words + BAD, (number_at(found_at, 0) != 0.0).to(tl.int64))
    if kind == 0:  # a step that the device decides is not its rows' first
        tl.store(words + BEGUN, (tl.load(config + SETS) > 0).to(tl.int64))


@triton.jit
def root_of(words):
    """Return the root of a sum, as `lucid.engine.exact_sum.root`: rounded once to 53 bits, then its root once.

    ``words``: pointer to int64[WORDS]; carries may not have been moved up.
    """
    word = tl.arange(0, PADDED)
    first, last = occupied(tl.load(words + word, mask=word < WORDS, other=0))
    zero = tl.full([], 0, tl.int64)
    carry, here1, here2, here3, rest = zero, zero, zero, zero, zero
    high, middle, low, below = zero, zero, zero, zero  # the highest word that is not 0, two words below it, the others
    top = first * 0
    for place in range(first, tl.minimum(last + 3, WORDS)):
        carry += tl.load(words + place)
        rest = rest | here3
        here1, here2, here3 = carry & _LOW_32, here1, here2
        carry = carry >> 32
        found = here1 != 0
        high, middle, low = tl.where(found, here1, high), tl.where(found, here2, middle), tl.where(found, here3, low)
        below = tl.where(found, rest, below)
        top = tl.where(found, place, top)
    # The 64 highest bits, from the highest that is set.
    length = (high.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    shift = 32 - tl.maximum(length, 1)
    bits = (((high << 32) | middle).to(tl.uint64) << shift) | (low >> (32 - shift)).to(tl.uint64)
    below = below | ((low << shift) & _LOW_32)
    # Round to the nearest of 53 bits, ties to even.
    kept = (bits >> 11).to(tl.int64)
    under = (bits & 0x7FF).to(tl.int64)
    up = (under > 0x400) | ((under == 0x400) & ((below != 0) | ((kept & 1) == 1)))
    kept += up.to(tl.int64)
    exponent = 32 * top.to(tl.int64) + 32 - shift - 53 + LOWEST
    odd = exponent & 1
    kept = kept << odd
    power = ((exponent - odd) // 2 + 1023) << 52
    return tl.sqrt(kept.to(tl.float64)) * power.to(tl.float64, bitcast=True)
