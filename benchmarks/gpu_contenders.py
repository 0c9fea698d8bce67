"""Who is timed on a CUDA device: lucid, torch, other libraries where installed, and a plain copy."""

from __future__ import annotations

import torch
from torch import Tensor

import lucid.optim
from lucid.bench.contenders import (
    FOREACH,
    FORMATS,
    FUSED,
    FUSED_BF16,
    LIBRARY_PEERS,
    LR,
    WEIGHT_DECAY,
    Contender,
    Copy,
    Step,
    is_installed,
    optimizers,
)

from .averages import AVERAGED, DECAY, FUSED_AVERAGED, fused_averaged
from .clipping import CLIPPED, FUSED_CLIPPED, MAX_NORM

COPY = "copy"
GRAPH, FUSED_GRAPH = "lucid, graph", "torch fused, graph"

OWN = tuple(kind.name for kind in FORMATS if kind.state is not None)
EVERY_FORMAT = (COPY, *(kind.name for kind in FORMATS), FOREACH, *(peer.name for peer in LIBRARY_PEERS))


def rivals(own: str) -> dict[str, str]:
    """Return whom lucid's contender `own` stands beside, by the heading of their column."""
    beside = {peer.library: peer.name for peer in LIBRARY_PEERS if peer.beside == own}
    return {FUSED: FUSED, FUSED_BF16: FUSED_BF16, FOREACH: FOREACH, **beside}


def contenders() -> dict[str, Contender]:
    """Return all whose library is installed, with equal hyperparameters."""
    foreach = optimizers()[FOREACH]
    found = [
        Copy(COPY),
        *(kind.contender() for kind in FORMATS),
        Contender(FOREACH, lambda params: foreach(params).step),
        *(peer.contender() for peer in LIBRARY_PEERS if is_installed(peer.library)),
        Contender(CLIPPED, _clipped),
        Contender(FUSED_CLIPPED, _fused_clipped),
        Contender(AVERAGED, _averaged, state=12),
        Contender(FUSED_AVERAGED, fused_averaged, state=12),
        Contender(GRAPH, lambda params: Replay(lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY))),
        Contender(FUSED_GRAPH, _fused_graph),
    ]
    return {contender.name: contender for contender in found}


def _clipped(params: list[Tensor]) -> Step:
    return lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM).step


def _averaged(params: list[Tensor]) -> Step:
    return lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, ema_decay=DECAY).step


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
