"""How values are stored in fewer bits, in plain torch operations. This defines the bits for every engine.

It is the same as ``csrc/formats.h``, line by line; ``docs/formats.md`` describes the formats for users. Rounding is
stochastic if 16 random bits are given for each element (``drawn``), and to nearest otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .numbers import BLOCK, USE_SHIFT, Use

_LOW32 = 0xFFFFFFFF
_INFINITY = 0x7F800000
_QUIET_NAN = 0x7FC00000
_TWO = 0x40000000  # the bits of 2.0

# A code is some bits of a float32 z: three (signed) or four (unsigned) bits of its exponent, and four of its mantissa.
# z - offset is the value in units of the block's scale. `largest` is the value of the highest code.
_SHIFT = 19
_SIGNED_LARGEST = 494.0  # z from 2 to 496
_UNSIGNED_OFFSET = 1.9375  # the lowest code decodes to a value above zero
_UNSIGNED_LARGEST = 126974.0625  # z from 2 to 126976
_LEAST_SCALE = 2.0**-126


# Random bits


def _mixed(x: int) -> int:
    """Return 64 bits, each of which depends on all bits of `x` (the finalizer of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def draws(stream: int, step: int, numbers: Tensor, use: Use = Use.MOMENTS) -> Tensor:
    """Return 16 random bits for each element of a parameter, as int32. They are the same on every machine and shard.

    ``stream`` (64 bits) identifies the parameter. ``step`` is the step count after this step. ``numbers``, int64, are
    the numbers of the elements in row-major order in the whole parameter. ``use``: what the bits are for. The bits
    are the number times an odd key plus another key; both keys are new at each step. So the bits of one element at
    different steps are independent. Over the steps, so are the bits of two elements, unless their numbers differ by a
    large power of two (M. Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem",
    1997, section 2).
    """
    key = _mixed((_mixed(stream % 2**64) + step) % 2**64) ^ (use << USE_SHIFT)
    bits = torch.zeros_like(numbers, dtype=torch.int32)
    highs = numbers >> 32
    for high in range(int(highs.min()), int(highs.max()) + 1) if numbers.numel() else ():
        keys = _mixed((key + high) % 2**64)
        factor, offset = keys & _LOW32 | 1, keys >> 32
        drawn = ((numbers & _LOW32) * factor + offset & _LOW32) >> 16
        bits = torch.where(highs == high, drawn.int(), bits)
    return bits


def dither(x: Tensor, drawn: Tensor) -> Tensor:
    """Return a random number between -1/2 and 1/2 units of the last place of `x`, a float32 tensor.

    Added to a small change of `x`, it makes the sum's rounding stochastic.
    """
    exponent = _float(_bits(x) & _INFINITY)  # the largest power of two that is not above |x|
    return (drawn.float() - 32767.5) * 2.0**-39 * exponent


# Sixteen bits


def _bits(x: Tensor) -> Tensor:
    """Return the bits of a float32 tensor as non-negative int64."""
    return x.contiguous().view(torch.int32).long() & _LOW32


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _bfloat16(bits: Tensor) -> Tensor:
    """Return the upper halves of float32 bits as bfloat16."""
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def rounded_to_bfloat16(x: Tensor, drawn: Tensor | None = None, *, positive: bool = False) -> Tensor:
    """Return a float32 tensor in bfloat16. Finite values stay finite; with `positive`, values above 0 stay above 0."""
    bits = _bits(x)
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    below = 0x7FFF + ((bits >> 16) & 1) if drawn is None else drawn  # ties to even
    rounded = torch.clamp_max(magnitude + below, 0x7F7FFFFF) & 0xFFFF0000
    if positive:
        rounded = torch.where(magnitude > 0, torch.clamp_min(rounded, 0x10000), rounded)
    rounded = torch.where(magnitude >= _INFINITY, torch.where(magnitude > _INFINITY, _QUIET_NAN, magnitude), rounded)
    return _bfloat16(rounded | sign)


def joined(upper: Tensor, residual: Tensor) -> Tensor:
    """Return the float32 master weights of a bfloat16 parameter (``upper``) and its residual.

    ``residual``: a bfloat16 tensor whose bits, as int16, are added to the bits of the parameter. If the result is NaN,
    somebody has overwritten the parameter, and the parameter's own value is used.
    """
    alone = _bits(upper.float())
    master = _float((alone + residual.contiguous().view(torch.int16).long()) & _LOW32)
    return torch.where(master.isnan(), _float(alone), master)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return (parameter, residual) for a master weight, the inverse of `joined`: to nearest, ties away from zero."""
    bits = torch.where(master.isnan(), _QUIET_NAN, _bits(master))
    return _bfloat16(bits + 0x8000), bits.to(torch.int16).view(torch.bfloat16)


def master_of_float16(param: Tensor, master: Tensor) -> Tensor:
    """Return the float32 values to update: the master, or the parameter's value where somebody has overwritten it."""
    known = master.to(torch.float16)
    same = known.contiguous().view(torch.int16) == param.contiguous().view(torch.int16)
    return torch.where(same | (known.isnan() & param.isnan()), master, param.float())


# Eight bits


def blocks(shape: torch.Size) -> int:
    """Return the number of blocks in a row; a row is all elements with the same index of dim 0."""
    return math.ceil(math.prod(shape[1:]) / BLOCK)


def _blocked(x: Tensor) -> Tensor:
    """Return `x` as (rows, blocks, BLOCK), with zeros appended to each row."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return rows.view(x.shape[0], rows.shape[1] // BLOCK, BLOCK)


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    return x.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)


def _scales(magnitude: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return each block's scale and its inverse (0 for a scale of 0 or NaN).

    The scale is NaN if a value of the block is negative, infinite or NaN.
    """
    bits = _bits(magnitude).amax(-1, keepdim=True)
    most = _float(bits)
    scale = torch.where(bits == 0, 0.0, torch.clamp_min(most / largest, _LEAST_SCALE))
    scale = torch.where(bits < _INFINITY, scale, math.nan)
    return scale, torch.where(scale > 0, 1.0 / scale, 0.0)


def _encoded(z: Tensor, drawn: Tensor | None) -> Tensor:
    below = 0x40000 if drawn is None else (_blocked(drawn).long() << 3) | 4
    return (_bits(z) + below) >> _SHIFT


def encode_signed(x: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes (uint8, a sign and 7 bits, of the shape of `x`) and scales (float32, [rows, blocks])."""
    values = _blocked(x)
    scale, inverse = _scales(values.abs(), _SIGNED_LARGEST)
    code = _encoded(values.abs() * inverse + 2.0, drawn) & 0x7F
    code = torch.where(scale.isnan(), 0, code | ((_bits(values) >> 24) & 0x80))
    return _flat(code, x.shape).to(torch.uint8), scale.squeeze(-1)


def decode_signed(code: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of `encode_signed`."""
    bits = _blocked(code).long()
    z = _float(((bits & 0x7F) << _SHIFT) + _TWO)
    return _flat((z - 2.0) * _float(_bits(scale.unsqueeze(-1)) ^ ((bits & 0x80) << 24)), code.shape)


def encode_unsigned(x: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes (uint8, of the shape of `x` >= 0) and scales. No code means zero; only a scale of 0 gives zeros."""
    values = _blocked(x)
    scale, inverse = _scales(values, _UNSIGNED_LARGEST)
    code = _encoded(torch.clamp_min(values * inverse + _UNSIGNED_OFFSET, 2.0), drawn) & 0xFF
    code = torch.where(scale.isnan(), 0, code)
    return _flat(code, x.shape).to(torch.uint8), scale.squeeze(-1)


def decode_unsigned(code: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of `encode_unsigned`."""
    z = _float((_blocked(code).long() << _SHIFT) + _TWO)
    return _flat((z - _UNSIGNED_OFFSET) * scale.unsqueeze(-1), code.shape)
