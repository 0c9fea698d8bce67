"""The step that also averages the weights, beside torch's: its fused step, then `AveragedModel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lucid.optim
from lucid.bench.contenders import FUSED, LR, LUCID, WEIGHT_DECAY, optimizers
from lucid.bench.machine import last_level_cache
from lucid.bench.paired import Timed, rounds, sampler
from lucid.bench.shapes import CASES as SHAPES
from lucid.bench.shapes import parameters

AVERAGED, FUSED_AVERAGED = "lucid, ema_decay", "torch fused + AveragedModel"
DECAY = 0.9999
CASES = {f"ema-{name}": SHAPES[name] for name in ("64M", "gpt2-small", "1000x1000")}


@dataclass(frozen=True, slots=True)
class AveragesResult(Timed):
    """The step of each contender."""

    case: str
    samples: dict[str, list[float]]


class _Model(torch.nn.Module):
    """A module of given parameters, for `AveragedModel` to copy."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for number, param in enumerate(params):
            self.register_parameter(str(number), torch.nn.Parameter(param.detach()))


def _fused_averaged(params: list[Tensor]) -> Callable[[], object]:
    model = _Model(params)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    for own, param in zip(model.parameters(), params, strict=True):
        own.grad = param.grad
    optimizer = optimizers()[FUSED](model.parameters())

    def step() -> None:
        optimizer.step()
        average.update_parameters(model)

    return step


def time_averages(name: str, count: int) -> AveragesResult:
    """Time one case; each contender has parameters, gradients and state of its own."""
    case = CASES[name]
    large = case.bytes >= 4 * last_level_cache()

    def ours(params: list[Tensor], ema_decay: float | None) -> Callable[[], object]:
        return lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, ema_decay=ema_decay).step

    makers: dict[str, Callable[[list[Tensor]], Callable[[], object]]] = {
        LUCID: lambda params: ours(params, None),
        AVERAGED: lambda params: ours(params, DECAY),
        FUSED: lambda params: optimizers()[FUSED](params).step,
        FUSED_AVERAGED: _fused_averaged,
    }
    samplers = {key: sampler(make(parameters(case.shapes)), warm=not large) for key, make in makers.items()}
    return AveragesResult(name, rounds(samplers, dict.fromkeys(samplers, count), name))
