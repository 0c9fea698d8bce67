"""The step in each number format, beside torch's fused one in float32 and in naive bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lucid.optim
from lucid.optim.formats import StateFormatName

from . import footprint, machine
from .contenders import FUSED, LR, LUCID, WEIGHT_DECAY
from .paired import Timed, rounds, sampler
from .shapes import Shape, parameters

FUSED_BF16 = "torch fused bf16"


@dataclass(frozen=True, slots=True)
class Format:
    """Who steps, how its moments are kept, and of which type its parameters and gradients are."""

    name: str
    dtype: torch.dtype = torch.float32
    state: StateFormatName | None = "fp32"  # None: torch's

    def optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        if self.state is None:
            return torch.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, fused=True)
        return lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, state_format=self.state)


EIGHT_BIT, BF16_STATE = "lucid 8bit", "lucid bf16"
RESIDUAL, RESIDUAL_BF16 = "lucid, bf16 weights + residual", "lucid bf16, bf16 weights + residual"
RESIDUAL_EIGHT_BIT = "lucid 8bit, bf16 weights + residual"
FORMATS = (
    Format(FUSED, state=None),
    Format(FUSED_BF16, torch.bfloat16, state=None),
    Format(LUCID),
    Format(BF16_STATE, state="bf16"),
    Format(EIGHT_BIT, state="8bit"),
    Format(RESIDUAL, torch.bfloat16),
    Format(RESIDUAL_BF16, torch.bfloat16, "bf16"),
    Format(RESIDUAL_EIGHT_BIT, torch.bfloat16, "8bit"),
    Format("lucid 8bit, fp16 weights + master", torch.float16, "8bit"),
)

# Parameters of one dimension keep float32 moments under 8bit; those of the last case do not.
CASES: dict[str, Sequence[Shape]] = {
    "formats-64M": [(2**16, 2**10)],
    "formats-1000x1000": 1000 * [(1000,)],
    "formats-1000x64x64": 1000 * [(64, 64)],
}


@dataclass(frozen=True, slots=True)
class FormatResult(Timed):
    """The step in each format, and the resident bytes that each one holds."""

    case: str
    elements: int
    samples: dict[str, list[float]]
    resident: dict[str, int]  # weights, gradients and state; empty where not measured

    def bytes_a_parameter(self, name: str) -> float | None:
        return self.resident[name] / self.elements if name in self.resident else None


def time_formats(case: str, count: int) -> FormatResult:
    """Time one case; each format has parameters, gradients and state of its own."""
    shapes = CASES[case]
    elements = sum(math.prod(shape) for shape in shapes)
    large = 16 * elements >= 4 * machine.last_level_cache()

    def step_of(kind: Format) -> Callable[[], object]:
        step = kind.optimizer(parameters(shapes, kind.dtype)).step
        step()
        return step

    samplers, resident = {}, {}
    for kind in FORMATS:
        before = footprint.resident_bytes()
        step = step_of(kind)
        after = footprint.resident_bytes()
        if large and before is not None and after is not None:
            resident[kind.name] = after - before
        samplers[kind.name] = sampler(step, warm=not large)
    samples = rounds(samplers, dict.fromkeys(samplers, count), case)
    return FormatResult(case, elements, samples, resident)
