"""Who is timed on a CUDA device: lucid, torch, other libraries where installed, and a plain copy."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import lucid.optim

from .clipping import CLIPPED, FUSED_CLIPPED, MAX_NORM
from .contenders import FOREACH, FUSED, LR, LUCID, WEIGHT_DECAY, optimizers
from .formats import EIGHT_BIT, FORMATS, FUSED_BF16, RESIDUAL_EIGHT_BIT, Format
from .shapes import Shape, parameters

COPY = "copy"
GRAPH, FUSED_GRAPH = "lucid, graph", "torch fused, graph"

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contender:
    """Who steps: the type of its weights and gradients, and its bytes of state a parameter of a large matrix."""

    name: str
    step_of: Callable[[list[Tensor]], Step]
    dtype: torch.dtype = torch.float32
    state: float = 8

    def make(self, shapes: Sequence[Shape]) -> Step:
        """Return the step, on parameters, gradients and state of its own."""
        with torch.device("cuda"):
            params = parameters(shapes, self.dtype)
        return self.step_of(params)

    @property
    def moved(self) -> float:
        """Bytes a parameter and step that must move: weights and state are read and written, gradients read."""
        return 2 * (self.dtype.itemsize + self.state) + self.dtype.itemsize


class Copy(Contender):
    """The device's own copy of as many float32 as there are parameters, in one piece."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(COPY, self._step_of)

    def make(self, shapes: Sequence[Shape]) -> Step:
        return super().make([(sum(math.prod(shape) for shape in shapes),)])

    @property
    def moved(self) -> float:
        return 8

    @staticmethod
    def _step_of(params: list[Tensor]) -> Step:
        (param,) = params
        target, source = param.detach(), param.grad
        assert source is not None
        return lambda: target.copy_(source)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another library's AdamW; `beside`: the lucid that keeps the like of its weights and state."""

    library: str
    name: str
    path: str
    state: float
    beside: str | None
    dtype: torch.dtype = torch.float32
    options: Mapping[str, object] = field(default_factory=dict)

    def step_of(self, params: list[Tensor]) -> Step:
        module, _, name = self.path.rpartition(".")
        make = getattr(importlib.import_module(module), name)
        step: Step = make(params, lr=LR, weight_decay=WEIGHT_DECAY, **self.options).step
        return step


BITSANDBYTES, TORCHAO, FLASHOPTIM = LIBRARIES = ("bitsandbytes", "torchao", "flashoptim")
BITSANDBYTES_32 = "bitsandbytes 32bit"
# Scales: float32 for 256 in the first two, float16 for 32 in the last, whose weights gain 16 or 8 bits.
_BY_256, _BY_32 = 2 * (1 + 4 / 256), 2 * (1 + 2 / 32)
PEERS = (
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

OWN = tuple(kind.name for kind in FORMATS if kind.state is not None)
EVERY_FORMAT = (COPY, *(kind.name for kind in FORMATS), FOREACH, *(peer.name for peer in PEERS))


def rivals(own: str) -> dict[str, str]:
    """Return whom lucid's contender `own` stands beside, by the heading of their column."""
    beside = {peer.library: peer.name for peer in PEERS if peer.beside == own}
    return {FUSED: FUSED, FUSED_BF16: FUSED_BF16, FOREACH: FOREACH, **beside}


def contenders() -> dict[str, Contender]:
    """Return all whose library is installed, with equal hyperparameters."""
    foreach = optimizers()[FOREACH]
    found = [
        Copy(),
        *(Contender(kind.name, _step_of(kind), kind.dtype, _state(kind)) for kind in FORMATS),
        Contender(FOREACH, lambda params: foreach(params).step),
        *(
            Contender(peer.name, peer.step_of, peer.dtype, peer.state)
            for peer in PEERS
            if importlib.util.find_spec(peer.library) is not None
        ),
        Contender(CLIPPED, _clipped),
        Contender(FUSED_CLIPPED, _fused_clipped),
        Contender(GRAPH, lambda params: Replay(lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY))),
        Contender(FUSED_GRAPH, _fused_graph),
    ]
    return {contender.name: contender for contender in found}


def _step_of(kind: Format) -> Callable[[list[Tensor]], Step]:
    return lambda params: kind.optimizer(params).step


def _state(kind: Format) -> float:
    if kind.state is None:
        return 2 * kind.dtype.itemsize
    moments = {"fp32": 8, "bf16": 4, "8bit": 2 * (1 + 4 / 128)}
    master = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}
    return moments[kind.state] + master[kind.dtype]


def _clipped(params: list[Tensor]) -> Step:
    return lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM).step


def _fused_clipped(params: list[Tensor]) -> Step:
    optimizer = optimizers()[FUSED](params)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()

    return step


def _fused_graph(params: list[Tensor]) -> Step:
    return Replay(torch.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, fused=True, capturable=True))


class Replay:
    """A step captured in a CUDA graph, as torch's documentation does it; called, it runs once more."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer  # whose tensors the graph writes to
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            optimizer.step()

    def __call__(self) -> None:
        self._graph.replay()
