"""The step with what people put before it: the gradients' norm bounded; and the step observed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lucid.optim
from lucid.bench.contenders import FUSED, LR, LUCID, WEIGHT_DECAY, optimizers
from lucid.bench.machine import last_level_cache
from lucid.bench.paired import Timed, rounds, sampler
from lucid.bench.shapes import CASES as SHAPES
from lucid.bench.shapes import parameters

CLIPPED, OBSERVED = "lucid, max_grad_norm", "lucid, observed"
FUSED_CLIPPED = "clip_grad_norm_ (foreach) + torch fused"
MAX_NORM = 1.0
CASES = {f"clip-{name}": SHAPES[name] for name in ("64M", "gpt2-small", "1000x1000")}


@dataclass(frozen=True, slots=True)
class ClippingResult(Timed):
    """The step of each contender."""

    case: str
    samples: dict[str, list[float]]


def _steps() -> dict[str, Callable[[list[Tensor]], Callable[[], object]]]:
    def ours(*, max_norm: float | None = None, observe: bool = False) -> Callable[[list[Tensor]], Callable[[], object]]:
        def make(params: list[Tensor]) -> Callable[[], object]:
            optimizer = lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, max_grad_norm=max_norm)
            optimizer.observe(observe)
            return optimizer.step

        return make

    fused = optimizers()[FUSED]

    def fused_clipped(params: list[Tensor]) -> Callable[[], object]:
        optimizer = fused(params)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()

        return step

    return {
        LUCID: ours(),
        CLIPPED: ours(max_norm=MAX_NORM),
        OBSERVED: ours(observe=True),
        FUSED: lambda params: fused(params).step,
        FUSED_CLIPPED: fused_clipped,
    }


def time_clipping(name: str, count: int) -> ClippingResult:
    """Time one case; each contender has parameters, gradients and state of its own."""
    case = CASES[name]
    large = case.bytes >= 4 * last_level_cache()
    samplers = {}
    for contender, make in _steps().items():
        params = parameters(case.shapes, gradient_rms=1e-2)  # whose norm is above the bound
        samplers[contender] = sampler(make(params), warm=not large)
    return ClippingResult(name, rounds(samplers, dict.fromkeys(samplers, count), name))
