"""How values are stored in fewer bits, in Triton: the same as ``csrc/formats.h``, line by line, with the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from lucid.engine import numbers
from lucid.engine.numbers import USE_SHIFT, Dtype, MomentFormat, ParamFormat, Use

from .adamw import quotient

# Triton reads only constants of the module: these are the numbers of lucid.engine.numbers that make a row's kind.
FLOAT32 = tl.constexpr(int(Dtype.FLOAT32))
FLOAT64 = tl.constexpr(int(Dtype.FLOAT64))
FLOAT16 = tl.constexpr(int(Dtype.FLOAT16))
BFLOAT16 = tl.constexpr(int(Dtype.BFLOAT16))
PLAIN = tl.constexpr(int(ParamFormat.PLAIN))
BFLOAT16_ALONE = tl.constexpr(int(ParamFormat.BFLOAT16))
BFLOAT16_RESIDUAL = tl.constexpr(int(ParamFormat.BFLOAT16_RESIDUAL))
FLOAT16_ALONE = tl.constexpr(int(ParamFormat.FLOAT16))
FLOAT16_MASTER = tl.constexpr(int(ParamFormat.FLOAT16_MASTER))
BFLOAT16_DRAWN = tl.constexpr(int(ParamFormat.BFLOAT16_DRAWN))
PLAIN_MOMENTS = tl.constexpr(int(MomentFormat.PLAIN))
BFLOAT16_MOMENTS = tl.constexpr(int(MomentFormat.BFLOAT16))
EIGHT_BIT = tl.constexpr(int(MomentFormat.EIGHT_BIT))
BLOCK = tl.constexpr(numbers.BLOCK)
# XORed with the key of a step's random bits.
USE_PARAM = tl.constexpr(int(Use.PARAM) << USE_SHIFT)
USE_EMA = tl.constexpr(int(Use.EMA) << USE_SHIFT)

_INFINITY = tl.constexpr(0x7F800000)
_QUIET_NAN = tl.constexpr(0x7FC00000)
_TWO = tl.constexpr(0x40000000)  # the bits of 2.0
_SIGN = tl.constexpr(0x80000000)

_SHIFT = tl.constexpr(19)
_SIGNED_LARGEST = tl.constexpr(494.0)  # z from 2 to 496
_UNSIGNED_OFFSET = tl.constexpr(1.9375)  # the lowest code decodes to a value above zero
_UNSIGNED_LARGEST = tl.constexpr(126974.0625)  # z from 2 to 126976
_LEAST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load(at, mask, masked: tl.constexpr):
    if masked:
        return tl.load(at, mask=mask, other=0)
    else:
        return tl.load(at)


@triton.jit
def store(at, x, mask, masked: tl.constexpr):
    if masked:
        tl.store(at, x, mask=mask)
    else:
        tl.store(at, x)


# Random bits


@triton.jit
def mixed(x):
    """Return 64 bits, each of which depends on all bits of x: the finalizer of splitmix64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def draws(key, number):
    """Return 32 bits for each element, its number times an odd key plus another key. The upper 16 are random.

    `number`: uint32 if all numbers are below 2^32, else int64.
    """
    if number.dtype == tl.uint32:
        keys = mixed(key)
        low = number
    else:
        keys = mixed(key + (number >> 32).to(tl.uint64))
        low = number.to(tl.uint32)
    return low * (keys.to(tl.uint32) | 1) + (keys >> 32).to(tl.uint32)


@triton.jit
def dither(x, drawn):
    """Return a random number between -1/2 and 1/2 units of the last place of x, float32."""
    exponent = float_of(bits_of(x) & _INFINITY)  # the largest power of two that is not above |x|
    return ((drawn >> 16).to(tl.float32) - 32767.5) * 2.0**-39 * exponent


# Sixteen bits


@triton.jit
def load_upper(at, mask, masked: tl.constexpr):
    """Load 16-bit integers as the upper halves of 32 bits."""
    return load(at, mask, masked).to(tl.uint32) << 16


@triton.jit
def store_upper(at, half, mask, masked: tl.constexpr):
    """Store the bits of bfloat16 numbers; return the numbers in float32."""
    store(at, half, mask, masked)
    return float_of(half.to(tl.uint32) << 16)


@triton.jit
def nearest_bfloat16(x):
    """Round to nearest, ties to even; a NaN becomes a quiet NaN."""
    bits = bits_of(x)
    rounded = tl.where(x != x, _QUIET_NAN, bits + 0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).to(tl.uint16)


@triton.jit
def drawn_bfloat16(x, drawn, positive: tl.constexpr):
    """Round stochastically. Finite values stay finite; with `positive`, values above zero stay above zero."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.minimum(magnitude + (drawn >> 16), 0x7F7FFFFF)
    if positive:
        rounded = tl.where(magnitude > 0, tl.maximum(rounded, 0x10000), rounded)
    special = tl.where(magnitude > _INFINITY, _QUIET_NAN, _INFINITY)
    rounded = tl.where(magnitude >= _INFINITY, special.to(tl.uint32), rounded)
    return ((rounded | (bits & _SIGN)) >> 16).to(tl.uint16)


# How a parameter is loaded and stored. `at`: its address, `at_low_bits`: the address of its residual or master.


@triton.jit
def load_param(at, at_low_bits, mask, masked: tl.constexpr, form: tl.constexpr):
    if form == PLAIN:
        return load(at, mask, masked)
    elif form == FLOAT16_ALONE:
        return load(at, mask, masked).to(tl.float32)
    elif form == BFLOAT16_ALONE or form == BFLOAT16_DRAWN:
        return float_of(load_upper(at, mask, masked))
    elif form == BFLOAT16_RESIDUAL:
        alone = load_upper(at, mask, masked)
        both = alone + load(at_low_bits, mask, masked).to(tl.int32).to(tl.uint32, bitcast=True)
        master = float_of(both)
        return tl.where(master != master, float_of(alone), master)
    else:
        half = load(at, mask, masked)
        master = load(at_low_bits, mask, masked)
        alone = half.to(tl.float32)
        rounded = master.to(tl.float16)
        same = rounded.to(tl.uint16, bitcast=True) == half.to(tl.uint16, bitcast=True)
        return tl.where(same | ((master != master) & (alone != alone)), master, alone)


@triton.jit
def store_param(at, at_low_bits, theta, mask, masked: tl.constexpr, form: tl.constexpr):
    """Store a parameter; return it as the next step loads it."""
    if form == PLAIN:
        store(at, theta, mask, masked)
        return theta
    elif form == FLOAT16_ALONE:
        half = theta.to(tl.float16)
        store(at, half, mask, masked)
        return half.to(tl.float32)
    elif form == BFLOAT16_ALONE:
        return store_upper(at, nearest_bfloat16(theta), mask, masked)
    elif form == BFLOAT16_RESIDUAL:
        bits = tl.where(theta != theta, _QUIET_NAN, bits_of(theta))
        store(at, ((bits + 0x8000) >> 16).to(tl.uint16), mask, masked)
        store(at_low_bits, bits.to(tl.int16), mask, masked)
        return theta
    else:
        store(at_low_bits, theta, mask, masked)
        store(at, theta.to(tl.float16), mask, masked)
        return theta


# Eight bits. A code is the lowest three (signed) or four (unsigned) exponent bits of a float32 z, the upper four bits
# of its mantissa, and for exp_avg the sign. The value is z minus an offset, in units of the block's scale.


@triton.jit
def decoded_signed(code, scale):
    bits = code.to(tl.uint32)
    z = float_of(((bits & 0x7F) << _SHIFT) + _TWO)
    return (z - 2.0) * float_of(bits_of(scale) ^ ((bits & 0x80) << 24))


@triton.jit
def decoded_unsigned(code, scale):
    return (float_of((code.to(tl.uint32) << _SHIFT) + _TWO) - _UNSIGNED_OFFSET) * scale


@triton.jit
def scale_of(bits, largest: tl.constexpr):
    """Return the scales of blocks (NaN if a magnitude is not finite) and their inverses (0 for a scale of 0 or NaN).

    `bits`: the bits of the blocks' magnitudes, uint32[blocks, BLOCK]; results are [blocks, 1].
    """
    most = tl.max(bits, axis=1, keep_dims=True)
    scale = quotient(float_of(most), tl.full(most.shape, largest, tl.float32))
    scale = tl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
    scale = tl.where(most == 0, 0.0, scale)
    scale = tl.where(most < _INFINITY, scale, float_of(tl.full(most.shape, _QUIET_NAN, tl.uint32)))
    inverse = quotient(tl.full(most.shape, 1.0, tl.float32), scale)
    return scale, tl.where(scale > 0, inverse, 0.0)


@triton.jit
def below_code(drawn):
    """Return what is added to the bits of z below a code before they are cut off: 16 random bits and half a unit."""
    return ((drawn >> 13) & 0x7FFF8) | 4


@triton.jit
def encoded_signed(x, drawn):
    """Return the codes and scales of a tile whose rows are blocks."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    scale, inverse = scale_of(magnitude, _SIGNED_LARGEST)
    z = float_of(magnitude) * inverse + 2.0
    code = ((bits_of(z) + below_code(drawn)) >> _SHIFT) & 0x7F
    code = tl.where(scale == scale, code | ((bits >> 24) & 0x80), 0)
    return code.to(tl.uint8), scale


@triton.jit
def encoded_unsigned(x, drawn):
    """Return codes and scales as `encoded_signed` does, for values >= 0."""
    scale, inverse = scale_of(bits_of(x), _UNSIGNED_LARGEST)
    z = x * inverse + _UNSIGNED_OFFSET
    code = (tl.maximum(bits_of(z), _TWO) + below_code(drawn)) >> _SHIFT
    return tl.where(scale == scale, code, 0).to(tl.uint8), scale
