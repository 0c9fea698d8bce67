"""Gradients with one bad entry: numbers that are not finite, or whose square is not."""

import math

import torch
from torch.nn import Parameter

import lucid.optim as optim
from gradients import LIES, SMALL, compute_type
from lucid import engine

LEVELS = engine.cpu.simd_levels()
FEW = [*SMALL, ((64, 66), "dense", "dense"), ((41, 101), "strided", "transposed")]
LIMITS = {torch.float32: 2.0**64, torch.float64: 2.0**512}


def bad_values(param, dtype):
    """What no step of `param` can use, as numbers that a gradient of `dtype` may have."""
    values = [math.nan, math.inf, -math.inf]
    limit = LIMITS[compute_type(param)]
    largest = torch.finfo(dtype).max
    values += [value for value in (limit, -2 * limit, largest) if limit <= abs(value) <= largest]
    if largest > torch.finfo(compute_type(param)).max:
        values.append(1e300)  # finite, but not in float32
    return values


def with_entry(gradient, lies, where, value):
    """A gradient that lies alike, its real number `where` replaced."""
    values = gradient.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    reals = torch.view_as_real(values) if values.is_complex() else values
    reals.view(-1)[where] = value
    return LIES[lies](values)


def reals_in(tensor):
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def spoilable(world):
    """The numbers of the parameters that have a gradient with entries to replace."""
    return [
        index
        for index, (shape, _, lies) in enumerate(world.lies)
        if lies not in (None, "expanded") and math.prod(shape)
    ]


def single(gradient, param=None, **options):
    """An optimizer of one parameter, of zeros unless given, with this gradient."""
    param = Parameter(torch.zeros_like(gradient) if param is None else param)
    param.grad_dtype = None
    param.grad = gradient
    return optim.AdamW([param], **options)
