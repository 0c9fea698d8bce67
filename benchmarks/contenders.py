"""Who is timed: `lucid.optim.AdamW`, its peers, and a kernel that only moves the same bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import lucid.optim
from lucid.engine import _cpu

LUCID, FUSED, FOREACH, DEFAULT = "lucid", "torch fused", "torch foreach", "torch default"
DEEPSPEED = "DeepSpeed CPUAdam"
LIMIT = "memory's limit"
PEERS = (FUSED, FOREACH, DEFAULT, DEEPSPEED)
SLOW = (
    FOREACH,
    DEFAULT,
)  # several passes over memory, or a call for each tensor: few rounds are enough

LR, WEIGHT_DECAY = 1e-4, 1e-2
BYTES_MOVED = 28  # a parameter and step without amsgrad: four float32 read, three written

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def optimizers(*, amsgrad: bool = False) -> dict[str, MakeOptimizer]:
    """Return how to make each contender, with equal hyperparameters."""

    def peer(*, fused: bool | None = None, foreach: bool | None = None) -> MakeOptimizer:
        return lambda params: torch.optim.AdamW(
            params, LR, weight_decay=WEIGHT_DECAY, amsgrad=amsgrad, fused=fused, foreach=foreach
        )

    makers: dict[str, MakeOptimizer] = {
        LUCID: lambda params: lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, amsgrad=amsgrad),
        FUSED: peer(fused=True),
        FOREACH: peer(foreach=True),
        DEFAULT: peer(),
    }
    if importlib.util.find_spec("deepspeed") is not None and not amsgrad:  # which it ignores
        makers[DEEPSPEED] = _deepspeed
    return makers


def _deepspeed(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(list(params), lr=LR, weight_decay=WEIGHT_DECAY, adamw_mode=True)
    return optimizer


def mover(elements: int) -> Callable[[], None]:
    """Return a step that moves an AdamW step's streams and computes next to nothing."""
    a, b, c, d = (torch.empty(elements).fill_(1e-6) for _ in range(4))  # so that pages exist
    return lambda: _cpu.move(
        elements,
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        d.data_ptr(),
        threads=torch.get_num_threads(),
    )
