"""The step inside a training loop: caches hold activations then, and torch's threads spin."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lucid.bench.contenders import MakeOptimizer
from lucid.bench.paired import Quartiles, ratios, rounds


class LoopSeconds(NamedTuple):
    """Of one iteration: `optimizer.step()` alone, and forward, backward, step together."""

    step: float
    whole: float


class SmallGPT(nn.Module):
    """1.9 M parameters: 4 blocks of width 192 over 64 tokens of 256."""

    def __init__(self, width: int = 192, layers: int = 4, context: int = 64, tokens: int = 256) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(
            width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.blocks(self.token(codes) + self.position, self.mask, is_causal=True)
        return F.linear(hidden, self.token.weight)


class ManySmallLayers(nn.Module):
    """200 residual layers of width 32: 400 tensors, 211,200 parameters."""

    def __init__(self, width: int = 32, layers: int = 200) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * F.relu(layer(x))
        return x


@dataclass(frozen=True, slots=True)
class Training:
    """A model and its loss on one fixed batch, the same for each contender."""

    name: str
    make_model: Callable[[], nn.Module]
    make_loss: Callable[[], Callable[[nn.Module], Tensor]]
    iterations: int  # timed in a sample, after one that is not


def gpt_loss(batch: int = 8, context: int = 64) -> Callable[[nn.Module], Tensor]:
    """Return the loss of a `SmallGPT` on `batch` rows of `context` codes to predict."""
    codes = torch.randint(256, (batch, context + 1))
    return lambda model: F.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


def _mlp_loss() -> Callable[[nn.Module], Tensor]:
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    return lambda model: F.mse_loss(model(x), target)


TRAININGS = {
    training.name: training
    for training in (
        Training("loop-gpt", SmallGPT, gpt_loss, iterations=4),
        Training("loop-mlp", ManySmallLayers, _mlp_loss, iterations=8),
    )
}


class Loop:
    """A model in training under one optimizer."""

    def __init__(self, training: Training, make_optimizer: MakeOptimizer) -> None:
        torch.manual_seed(0)
        self.model = training.make_model()
        self._loss = training.make_loss()
        self._iterations = training.iterations
        self._optimizer = make_optimizer(self.model.parameters())
        self._iterate()
        self._iterate()

    def _iterate(self) -> LoopSeconds:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self._loss(self.model).backward()  # type: ignore[no-untyped-call]
        updating = time.perf_counter()
        self._optimizer.step()
        ended = time.perf_counter()
        return LoopSeconds(step=ended - updating, whole=ended - started)

    def sample(self) -> LoopSeconds:
        """Return the medians over a block of iterations."""
        self._iterate()
        block = [self._iterate() for _ in range(self._iterations)]
        steps, wholes = zip(*block, strict=True)
        return LoopSeconds(step=statistics.median(steps), whole=statistics.median(wholes))


@dataclass(frozen=True, slots=True)
class LoopResult:
    """Training: samples of each contender, the n-th of each of the same round."""

    training: str
    tensors: int
    elements: int
    samples: dict[str, list[LoopSeconds]]

    def milliseconds(self, name: str) -> LoopSeconds:
        step, whole = (1e3 * Quartiles.of(each).median for each in self._columns(name))
        return LoopSeconds(step, whole)

    def times(self, peer: str, name: str) -> tuple[Quartiles, Quartiles]:
        """How many times as long as `name`'s `peer`'s step and whole iteration took."""
        step, whole = (
            ratios(over, under) for over, under in zip(self._columns(peer), self._columns(name), strict=True)
        )
        return step, whole

    def _columns(self, name: str) -> tuple[list[float], list[float]]:
        return [each.step for each in self.samples[name]], [each.whole for each in self.samples[name]]


def time_training(training: Training, makers: Mapping[str, MakeOptimizer], count: int) -> LoopResult:
    """Time the loop under each optimizer."""
    loops = {name: Loop(training, make) for name, make in makers.items()}
    samples = rounds({name: loop.sample for name, loop in loops.items()}, dict.fromkeys(loops, count), training.name)
    sizes = [param.numel() for param in next(iter(loops.values())).model.parameters()]
    return LoopResult(training.name, len(sizes), sum(sizes), samples)
