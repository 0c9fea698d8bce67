"""Gradients of every size and layout, of parameters of every kind, and what is to be expected of their norm."""

import contextlib
import fractions
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import draw
from lucid import engine

LEVELS = engine.cpu.simd_levels()
REALS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
# float64 and complex parameters keep their moments in full, whatever the format.
KINDS = [
    *itertools.product(REALS[:3], ["fp32", "bf16", "8bit"]),
    *((dtype, "fp32") for dtype in [*REALS[3:], *COMPLEX]),
]
PIECE = 4096  # about as many elements as are added in one window


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last)


def lazy(values):
    """A view whose numbers are not what its memory says: a conjugate, or the imaginary part of one."""
    if values.is_complex():
        return values.conj().resolve_conj().conj()
    if values.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    return torch._neg_view(-values)  # there is no complex number of two bfloat16


LIES = {
    "dense": lambda values: values.contiguous(),
    "transposed": lambda values: values.t().contiguous().t(),
    "channels-last": channels_last,
    "strided": lambda values: torch.stack([values, torch.full_like(values, math.nan)], -1)[..., 0],
    "lazy": lazy,
    "expanded": lambda values: values.reshape(-1)[:1].reshape(()).expand(values.shape),
}
# Shape, how the parameter lies in memory, how its gradient does; None where it has no gradient.
ROWS = [
    *(((size,), "dense", "dense") for size in (0, 1, 31, 32, 33, 4095, 4096, 4097, 8193, 3 * PIECE + 5)),
    ((6,), "dense", None),
    ((), "dense", "dense"),
    ((64, 66), "dense", "dense"),
    ((67, 65), "transposed", "transposed"),
    ((67, 65), "transposed", "dense"),
    ((67, 65), "dense", "transposed"),
    ((4, 6, 5, 3), "channels-last", "channels-last"),
    ((4, 6, 5, 3), "channels-last", "dense"),
    ((41, 101), "strided", "dense"),
    ((41, 101), "dense", "strided"),
    ((130,), "strided", "strided"),
    ((33,), "dense", "lazy"),
    ((64, 67), "transposed", "lazy"),
    ((1,), "dense", "lazy"),
    ((9, 8), "dense", "expanded"),
]
SMALL = [row for row in ROWS if math.prod(row[0]) < 500]


def numbers(seed, shape, dtype):
    """Of several orders of magnitude, all of which every dtype can hold."""
    spread = torch.randint(-3, 2, shape, generator=torch.Generator().manual_seed(seed + 100_000))
    return (draw(seed, shape, dtype if dtype.is_complex else torch.float32) * 10.0**spread).to(dtype)


class Mixed:
    """Parameters of all rows in three groups; gradients of every dtype that they may have in turn."""

    OPTIONS = (
        {"lr": 0.01},
        {"lr": 0.03, "amsgrad": True},
        {"maximize": True, "betas": (0.4, 0.95), "master_weights": False},
    )

    def __init__(self, dtype=torch.float32, state_format="fp32", rows=ROWS, gradients=None, names=None, **options):
        self.lies = [row for start in range(3) for row in rows[start::3]]
        self.params = [
            Parameter(LIES[lies](numbers(index, shape, dtype))) for index, (shape, lies, _) in enumerate(self.lies)
        ]
        left = iter(self.params if names is None else zip(names, self.params, strict=False))
        groups = [
            {"params": list(itertools.islice(left, len(rows[start::3])))} | own
            for start, own in enumerate(self.OPTIONS)
        ]
        self.optimizer = optim.AdamW(groups, state_format=state_format, **options)
        self.gradients = gradients or (COMPLEX if dtype.is_complex else REALS)
        self.done = 0

    def set_gradients(self, change=lambda param, gradient: gradient):
        for index, (param, (shape, _, lies)) in enumerate(zip(self.params, self.lies, strict=True)):
            param.grad_dtype = None  # so that it takes any
            if lies is not None:
                dtype = self.gradients[(index + self.done) % len(self.gradients)]
                param.grad = change(param, LIES[lies](numbers(1000 * (self.done + 1) + index, shape, dtype)))
        self.done += 1

    def step(self, max_grad_norm=None):
        self.set_gradients()
        self.optimizer.max_grad_norm = max_grad_norm
        self.optimizer.step()
        return self.optimizer.grad_norm


def compute_type(param):
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def used(param):
    """The gradient as real numbers in the compute type, in logical order; each rounded once by numpy."""
    gradient = param.grad.detach().resolve_conj().resolve_neg()
    gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    gradient = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    narrow = np.float64 if compute_type(param) == torch.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return gradient.contiguous().numpy().astype(narrow)


# The norm


def squares(param):
    """The squares of a gradient's elements as they are used, each rounded once to float64."""
    with np.errstate(over="ignore", under="ignore"):
        return [x * x for x in used(param).astype(np.float64).reshape(-1).tolist()]


def exact_root(total):
    """The root of a fraction, which is rounded once to 53 bits first."""
    with mpmath.workprec(53):
        return float(mpmath.sqrt(mpmath.mpf(total.numerator) / total.denominator))  # a power of two


def exact_norm(values, scale=1.0):
    """The norm of elements with these squares, from their exact sum."""
    return exact_root(sum(map(fractions.Fraction, values), fractions.Fraction())) / scale


def uneven(seed, shape, dtype):
    """Some large numbers, beside which the others are lost one by one, but not together."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * (2 if dtype.is_complex else 1)
    values = torch.full((size,), 2.0**-17, dtype=torch.float64)
    for begin in range(0, size, PIECE):
        where = begin + torch.randint(min(PIECE, size - begin), (2,), generator=generator)
        values[where] = 1024.0 + torch.randint(8, (2,), generator=generator).double() * 64
    return (torch.view_as_complex(values.view(-1, 2)) if dtype.is_complex else values).to(dtype).view(shape)


# One result everywhere


@contextlib.contextmanager
def two_engines():
    """Every other row on the reference engine, as where parameters are on several devices."""
    engine_of = engine.Plan._engine_of
    numbers_taken = set()

    def chosen(plan, row):
        if row.index % 2 == 0:
            return engine_of(plan, row)
        numbers_taken.add(row.index)
        return plan._begun_reference()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Plan, "_engine_of", chosen)
        yield
    assert numbers_taken


# The factor


def expected_factor(norm, bound, scale):
    """The factor of ``torch.nn.utils.clip_grad_norm_``, unscaled, each operation exact and rounded once to float64."""

    def rounded(number):
        return fractions.Fraction(float(number))  # Fraction to float rounds correctly

    clip = fractions.Fraction(1)
    if bound is not None and bound != math.inf:
        room = rounded(fractions.Fraction(norm) + fractions.Fraction(1e-6))
        clip = min(clip, rounded(fractions.Fraction(bound) / room))
    return float(rounded(clip / fractions.Fraction(scale)))
