"""The steps that are timed: `lucid.optim.AdamW` in every format, other libraries' AdamW, and plain copies."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import lucid.optim
from lucid.engine import _cpu
from lucid.engine.formats import MasterWeights, StateFormatName, state_bytes

from .shapes import Shape, elements, parameters

LUCID, FUSED, FOREACH, DEFAULT = "lucid", "torch fused", "torch foreach", "torch default"
FUSED_BF16 = "torch fused bf16"
DEEPSPEED = "DeepSpeed CPUAdam"
LIMIT = "memory's limit"
PEERS = (FUSED, FOREACH, DEFAULT, DEEPSPEED)
SLOW = (FOREACH, DEFAULT)  # several passes over memory, or a call per tensor: a few rounds are enough

LR, WEIGHT_DECAY = 1e-4, 1e-2
BYTES_MOVED = 28  # per parameter and step without amsgrad: four float32 read, three written

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer to time: its step, the dtype of its weights and gradients, and the size of its state.

    ``state``: one of lucid's state formats, or another library's bytes per parameter of a large matrix.
    """

    name: str
    step_of: Callable[[list[Tensor]], Step]
    dtype: torch.dtype = torch.float32
    state: StateFormatName | float = 8
    master_weights: MasterWeights = True

    def make(self, shapes: Sequence[Shape], device: str = "cpu") -> Step:
        """Return the step of newly made parameters, gradients and state."""
        with torch.device(device):
            params = parameters(shapes, self.dtype)
        return self.step_of(params)

    def state_bytes(self, shapes: Sequence[Shape]) -> float:
        """Return the bytes of its state."""
        if isinstance(self.state, str):
            return sum(
                state_bytes(shape, self.dtype, self.state, master_weights=self.master_weights) for shape in shapes
            )
        return self.state * elements(shapes)

    def moved(self, shapes: Sequence[Shape]) -> float:
        """Return the bytes that a step must move: it reads and writes weights and state, and reads gradients."""
        return 3 * self.dtype.itemsize * elements(shapes) + 2 * self.state_bytes(shapes)


# Formats


@dataclass(frozen=True, slots=True)
class Format:
    """An optimizer of lucid or torch, its state format, and the dtype of its parameters and gradients."""

    name: str
    dtype: torch.dtype = torch.float32
    state: StateFormatName | None = "fp32"  # None: torch's AdamW
    master_weights: MasterWeights = True

    def optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        if self.state is None:
            return torch.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, fused=True)
        return lucid.optim.AdamW(
            params, LR, weight_decay=WEIGHT_DECAY, state_format=self.state, master_weights=self.master_weights
        )

    def contender(self) -> Contender:
        state = 2 * self.dtype.itemsize if self.state is None else self.state
        return Contender(self.name, lambda params: self.optimizer(params).step, self.dtype, state, self.master_weights)


EIGHT_BIT, BF16_STATE = "lucid 8bit", "lucid bf16"
RESIDUAL, RESIDUAL_BF16 = "lucid, bf16 weights + residual", "lucid bf16, bf16 weights + residual"
RESIDUAL_EIGHT_BIT = "lucid 8bit, bf16 weights + residual"
STOCHASTIC_EIGHT_BIT = "lucid 8bit, bf16 weights, stochastic"
FORMATS = (
    Format(FUSED, state=None),
    Format(FUSED_BF16, torch.bfloat16, state=None),
    Format(LUCID),
    Format(BF16_STATE, state="bf16"),
    Format(EIGHT_BIT, state="8bit"),
    Format(RESIDUAL, torch.bfloat16),
    Format(RESIDUAL_BF16, torch.bfloat16, "bf16"),
    Format(RESIDUAL_EIGHT_BIT, torch.bfloat16, "8bit"),
    Format(STOCHASTIC_EIGHT_BIT, torch.bfloat16, "8bit", "stochastic"),
    Format("lucid 8bit, fp16 weights + master", torch.float16, "8bit"),
)


# Other optimizers


def optimizers(*, amsgrad: bool = False) -> dict[str, MakeOptimizer]:
    """Return a constructor for each optimizer of float32 weights on a CPU, all with the same hyperparameters."""

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
    if is_installed("deepspeed") and not amsgrad:  # DeepSpeed ignores amsgrad
        makers[DEEPSPEED] = _deepspeed
    return makers


def _deepspeed(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(list(params), lr=LR, weight_decay=WEIGHT_DECAY, adamw_mode=True)
    return optimizer


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@dataclass(frozen=True, slots=True)
class Peer:
    """Another library's AdamW; `beside`: the lucid contender with comparable weights and state."""

    library: str
    name: str
    path: str
    state: float
    beside: str | None
    dtype: torch.dtype = torch.float32
    options: Mapping[str, object] = field(default_factory=dict)

    def contender(self) -> Contender:
        return Contender(self.name, self._step_of, self.dtype, self.state)

    def _step_of(self, params: list[Tensor]) -> Step:
        module, _, name = self.path.rpartition(".")
        make = getattr(importlib.import_module(module), name)
        step: Step = make(params, lr=LR, weight_decay=WEIGHT_DECAY, **self.options).step
        return step


BITSANDBYTES, TORCHAO, FLASHOPTIM = LIBRARIES = ("bitsandbytes", "torchao", "flashoptim")
BITSANDBYTES_32 = "bitsandbytes 32bit"
# Scales: one float32 per 256 codes in the first two libraries, one float16 per 32 in the last. FlashOptim stores 16 or
# 8 more bits per bfloat16 weight.
_BY_256, _BY_32 = 2 * (1 + 4 / 256), 2 * (1 + 2 / 32)
LIBRARY_PEERS = (
    Peer(BITSANDBYTES, BITSANDBYTES_32, "bitsandbytes.optim.AdamW", 8, LUCID),
    Peer(BITSANDBYTES, "bitsandbytes 8bit", "bitsandbytes.optim.AdamW8bit", _BY_256, EIGHT_BIT),
    Peer(TORCHAO, "torchao 8bit", "torchao.optim.AdamW8bit", _BY_256, EIGHT_BIT),
    Peer(
        FLASHOPTIM,
        "flashoptim 8bit",
        "flashoptim.FlashAdamW",
        _BY_32,
        EIGHT_BIT,
        options={"master_weight_bits": None},
    ),
    Peer(
        BITSANDBYTES,
        "bitsandbytes 8bit, bf16 weights",
        "bitsandbytes.optim.AdamW8bit",
        _BY_256,
        RESIDUAL_EIGHT_BIT,
        torch.bfloat16,
    ),
    Peer(
        TORCHAO,
        "torchao 8bit, bf16 weights",
        "torchao.optim.AdamW8bit",
        _BY_256,
        RESIDUAL_EIGHT_BIT,
        torch.bfloat16,
        {"bf16_stochastic_round": True},
    ),
    Peer(
        FLASHOPTIM,
        "flashoptim 8bit, bf16 weights + 16",
        "flashoptim.FlashAdamW",
        _BY_32 + 2,
        RESIDUAL_EIGHT_BIT,
        torch.bfloat16,
        {"master_weight_bits": 32},
    ),
    Peer(
        FLASHOPTIM,
        "flashoptim 8bit, bf16 weights + 8",
        "flashoptim.FlashAdamW",
        _BY_32 + 1,
        None,
        torch.bfloat16,
        {"master_weight_bits": 24},
    ),
)


# Memory bandwidth


def mover(count: int) -> Step:
    """Return a step that moves as many bytes on the CPU as AdamW of `count` float32, and computes almost nothing."""
    a, b, c, d = (torch.empty(count).fill_(1e-6) for _ in range(4))  # so that memory pages exist
    return lambda: _cpu.move(
        count,
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        d.data_ptr(),
        threads=torch.get_num_threads(),
    )


class Copy(Contender):
    """A device copy of as many float32 as there are parameters, in one call."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name, self._step_of)

    def make(self, shapes: Sequence[Shape], device: str = "cpu") -> Step:
        return super().make([(elements(shapes),)], device)

    def moved(self, shapes: Sequence[Shape]) -> float:
        return 8 * elements(shapes)

    @staticmethod
    def _step_of(params: list[Tensor]) -> Step:
        (param,) = params
        target, source = param.detach(), param.grad
        assert source is not None
        return lambda: target.copy_(source)
