"""Draw docs/decay.png: how much each kind of weight decay takes away, over a schedule and in a real training.

    python -m benchmarks.decay

Half a minute: it trains the ViT of the quality study once with each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from examples.train_gpt import lr_factor
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import lucid.optim as optim

from .quality_tasks import TASKS

PICTURE = Path(__file__).parents[1] / "docs" / "decay.png"
TASK = TASKS["vit"]
PEAKS = (5e-4, 1e-3, 2e-3)
COLOURS = ("#90caf9", "#1e88e5", "#0d47a1")
INDEPENDENT, CAUTIOUS = "#d81b60", "#ef6c00"
DECAY = {"lr": 0.3, "independent": 3e-4}  # equal at a peak of 1e-3
STEPS = 10_000


def left(decays: Sequence[float]) -> list[float]:
    """Return the part of a weight without gradients that is left after each step."""
    found, part = [], 1.0
    for decay in decays:
        part *= 1.0 - decay
        found.append(part)
    return found


class Course(NamedTuple):
    """A training step by step: the part of the decay that cautious decay leaves out, and the norm of the weights."""

    left_out: list[float]
    norm: list[float]


def trained(cautious: bool) -> Course:
    """Train the ViT on digits; its matrices decay."""
    torch.manual_seed(0)
    network, data = TASK.network(), TASK.data()
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, lr=TASK.lr, weight_decay=TASK.weight_decay, cautious_decay=cautious)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, TASK.schedule()))
    course = Course([], [])
    for step in range(TASK.steps):
        inputs, targets = data.draw(TASK.batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        before = [p.detach().clone() for p in matrices]
        optimizer.step()
        schedule.step()
        total = sum(float(p.abs().sum()) for p in before)
        kept = sum(float(p.abs()[_agrees(optimizer, q, p)].sum()) for p, q in zip(before, matrices, strict=True))
        course.left_out.append(1 - kept / total)
        course.norm.append(sum(float(p.detach().double().square().sum()) for p in matrices) ** 0.5)
    return course


def _agrees(optimizer: optim.AdamW, param: nn.Parameter, before: torch.Tensor) -> torch.Tensor:
    """Return where the update has the sign of the weight: the update's sign is that of the first moment."""
    moment: torch.Tensor = optimizer.state[param]["exp_avg"]
    return moment.sign() * before.sign() > 0


def draw(plain: Course, cautious: Course) -> Figure:
    """Draw what a schedule leaves of a weight, and the two trainings."""
    figure = Figure(figsize=(10, 3.9), dpi=130, layout="constrained")
    schedule, share, norm = figure.subplots(1, 3)
    factors = [lr_factor(step, TASK.schedule()) for step in range(TASK.steps)]
    factors = [factors[step * TASK.steps // STEPS] for step in range(STEPS)]
    for peak, colour in zip(PEAKS, COLOURS, strict=True):
        values = left([DECAY["lr"] * peak * factor for factor in factors])
        schedule.plot(values, color=colour, label=f'"lr", peak {peak:g}')
    values = left([DECAY["independent"] * factor for factor in factors])
    schedule.plot(values, color=INDEPENDENT, linestyle=(0, (4, 3)), label='"independent", any peak')
    schedule.set_ylim(0, 1)
    schedule.set_title("left of a weight without gradients", fontsize=10)
    share.plot(cautious.left_out, color=CAUTIOUS, linewidth=1)
    share.set_ylim(0, 1)
    share.set_title("part of the decay that\ncautious decay leaves out, ViT", fontsize=10)
    norm.plot(plain.norm, color=COLOURS[1], label="ordinary decay")
    norm.plot(cautious.norm, color=CAUTIOUS, label="cautious decay")
    norm.set_title("norm of the matrices, ViT", fontsize=10)
    for axes in (schedule, share, norm):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (schedule, norm):
        axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(trained(cautious=False), trained(cautious=True)).savefig(PICTURE)
    print(PICTURE)
