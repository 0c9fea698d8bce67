"""What `spike_threshold` leaves out where nothing is wrong, and what it saves where batches are bad.

    python -m benchmarks.spikes ordinary --runs 66              # steps left out of ordinary training; 5 minutes
    python -m benchmarks.spikes planted --plot docs/spikes.png  # a small GPT with planted bad batches; 1 minute

`ordinary` trains the tasks of the quality study with small networks, records the norms, and then asks several rules
which steps they would leave out. As long as a rule leaves out none, the norms are those of a run with it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from examples.train_gpt import lr_factor
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import lucid.optim as optim
from lucid.engine.spikes import MOST_IN_A_ROW, SPAN, WARM_UP, Memory, judged

from .arguments import count
from .quality_tasks import TASKS, Examples, Task

THRESHOLD = 6.0
ORDINARY = (
    replace(TASKS["gpt-small"], name="GPT", width=32, layers=1, steps=400),
    replace(TASKS["vit"], name="ViT", width=32, layers=1),
    replace(TASKS["convnet"], name="ConvNet", width=16, layers=1),
    replace(TASKS["gpt-small"], name="GPT, 2 windows of 32", width=32, layers=1, steps=600, batch=2, context=32),
    replace(TASKS["gpt-small"], name="GPT, 2 windows of 16", width=64, layers=2, steps=300, batch=2, context=16),
    replace(TASKS["vit"], name="ViT, 16 images", width=32, layers=1, batch=16),
    replace(TASKS["convnet"], name="ConvNet, 16 images", width=16, layers=1, batch=16),
)
PLANTED = replace(TASKS["gpt-small"], width=64, layers=2, steps=600)
BAD = (200, 300, 301, 302, 400, 500, 501, 502, 503, 504)  # the steps with a bad batch


class Run(NamedTuple):
    """A training: the loss and the gradient norm of each step, the steps left out, the held-out loss at the end."""

    losses: list[float]
    norms: list[float]
    skipped: int
    held_out: float


def train(task: Task, seed: int, bad: Sequence[int] = (), **options: Any) -> Run:
    """Train with lucid's AdamW as the quality study does. In the steps `bad`, each window is one character repeated."""
    torch.manual_seed(seed)
    network, data = task.network(), task.data()
    params = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": task.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = optim.AdamW(groups, lr=task.lr, betas=(0.9, task.beta2), **{"max_grad_norm": math.inf} | options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, task.schedule()))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        scores: Tensor = network(inputs)
        return F.cross_entropy(scores.flatten(0, -2), targets.flatten())

    losses, norms = [], []
    for step in range(task.steps):
        batch = data.draw(task.batch, torch.Generator().manual_seed((seed << 32) + step))
        if step in bad:
            batch = Examples(torch.full_like(batch.inputs, ord("~")), torch.full_like(batch.targets, ord("~")))
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        assert optimizer.grad_norm is not None
        losses.append(math.nan if step in bad else loss.item())
        norms.append(optimizer.grad_norm.item())
    inputs, targets = data.rest()
    with torch.no_grad():
        parts = zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True)
        held_out = sum(loss_of(*part).item() * len(part[0]) for part in parts) / len(inputs)
    return Run(losses, norms, optimizer.skipped_steps, held_out)


# Ordinary steps

Limit = Callable[[float, float], float]  # of the mean norm and its standard deviation


class Rule(NamedTuple):
    """A rule: which norm is a spike, and whether the first norms count alike."""

    limit: Limit
    alike: bool = True


RULES = {
    "√q, at least mean / 20; weight 1/128 from the start": Rule(lambda m, s: m + THRESHOLD * max(s, m / 20), False),
    "√q, at least mean / 20": Rule(lambda m, s: m + THRESHOLD * max(s, m / 20)),
    "√q, at least mean / 2": Rule(lambda m, s: m + THRESHOLD * max(s, m / 2)),
    "√q, at least mean": Rule(lambda m, s: m + THRESHOLD * max(s, m)),
    "√q + mean / 2, as it is": Rule(lambda m, s: m + THRESHOLD * (s + m / 2)),
}


def left_out(rule: Rule, norms: Sequence[float]) -> tuple[int, list[float]]:
    """Return how many steps the rule leaves out, and for each step that it judges the limit over the norm."""
    mean = square = 0.0
    seen = in_a_row = number = 0
    room = []
    for norm in norms:
        limit = rule.limit(mean, math.sqrt(square)) if seen >= WARM_UP else math.inf
        if seen >= WARM_UP:
            room.append(limit / norm)
        if norm > limit:
            number, in_a_row = number + 1, in_a_row + 1
            if in_a_row == MOST_IN_A_ROW:
                mean, square, seen, in_a_row = 0.0, 0.0, 0, 0
            continue
        weight = 1 / min(seen + 1, SPAN) if rule.alike or not seen else 1 / SPAN
        distance, in_a_row = norm - mean, 0
        square = square + weight * (distance * distance - square) if seen else 0.0
        mean, seen = mean + weight * distance, seen + 1
    return number, room


def ordinary(tasks: Sequence[Task], runs: int) -> str:
    """Return a table of the steps that each rule leaves out of ordinary runs, and of the room that it leaves."""
    every = {task.name: [train(task, seed).norms for seed in range(runs)] for task in tasks}
    return ordinary_table(every)


def ordinary_table(every: dict[str, list[list[float]]]) -> str:
    """Return that table for the norms of the runs of each task."""
    rows = []
    for name, rule in RULES.items():
        row = [name]
        for norms in every.values():
            found = [left_out(rule, each) for each in norms]
            room = [value for _, values in found for value in values]
            row.append(f"{sum(number for number, _ in found)} ({statistics.median(room):.1f}, {min(room):.2f})")
        rows.append(row)
    header = ["rule", *(f"{name} ({len(norms)} runs)" for name, norms in every.items())]
    return tabulate(rows, header, "github", disable_numparse=True)


# Planted batches

ARMS: dict[str, tuple[Sequence[int], dict[str, Any]]] = {
    "no bad batch": ((), {}),
    "bad batches": (BAD, {}),
    "bad batches, max_grad_norm=1": (BAD, {"max_grad_norm": 1.0}),
    f"bad batches, spike_threshold={THRESHOLD:g}": (BAD, {"spike_threshold": THRESHOLD}),
}
COLOURS = ("#90a4ae", "#bf6f2d", "#5e35b1", "#00695c")


def planted(seeds: int) -> dict[str, list[Run]]:
    """Return the runs of each arm, by seed."""
    return {
        name: [train(PLANTED, seed, bad, **options) for seed in range(seeds)] for name, (bad, options) in ARMS.items()
    }


def planted_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of how they ended."""
    clean = [run.held_out for run in next(iter(runs.values()))]
    rows = []
    for name, each in runs.items():
        worse = [run.held_out - other for run, other in zip(each, clean, strict=True)]
        skipped = ", ".join(str(run.skipped) for run in each)
        rows.append([name, f"{statistics.fmean(worse):+.4f}", f"{min(worse):+.4f} to {max(worse):+.4f}", skipped])
    header = ["run", "held-out loss beside no bad batch", "of the seeds", "steps left out"]
    return tabulate(rows, header, "github", disable_numparse=True)


def limits(norms: Sequence[float]) -> list[float]:
    """Return the norm from which each step would have been left out; NaN before there is one."""
    memory, found = Memory(), []
    for norm in norms:
        limit = memory.mean + THRESHOLD * (math.sqrt(memory.square) + memory.mean / 2)
        found.append(limit if memory.seen >= WARM_UP else math.nan)
        memory = judged(norm, THRESHOLD, memory).memory
    return found


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the first seed: norms with the limit, and the loss beside that of the run without bad batches."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    looking = list(runs.values())[-1][0]
    steps = range(len(looking.norms))
    top.semilogy(steps, looking.norms, color="#455a64", linewidth=0.8, label="gradient norm")
    top.semilogy(steps, limits(looking.norms), color=COLOURS[-1], label=f"limit at spike_threshold={THRESHOLD:g}")
    top.semilogy(BAD, [looking.norms[step] for step in BAD], "x", color=COLOURS[1], label="bad batch, left out")
    top.legend(frameon=False, ncols=3, loc="upper center")
    top.set_ylim(0.5, 100)
    top.set_title("A small GPT, 10 bad batches: norms, and what they cost", loc="left")
    clean = next(iter(runs.values()))[0].losses
    for (name, each), colour in list(zip(runs.items(), COLOURS, strict=True))[1:]:
        more = [ours - theirs for ours, theirs in zip(each[0].losses, clean, strict=True)]
        kept = [[value for value in more[max(0, step - 9) : step + 1] if not math.isnan(value)] for step in steps]
        means = [statistics.fmean(values) if values else math.nan for values in kept]
        bottom.plot(steps, means, color=colour, label=name)
    bottom.axhline(0, color=COLOURS[0], linewidth=1)
    bottom.set_xlim(150, len(looking.norms))
    bottom.set_xlabel("step")
    bottom.set_ylabel("loss beside no bad batch, mean of 10 steps")
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def main() -> None:
    """Read the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ordinary").add_argument("--runs", type=count, default=66, help="of each task")
    planting = commands.add_parser("planted")
    planting.add_argument("--seeds", type=count, default=3)
    planting.add_argument("--plot", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "ordinary":
        print(ordinary(ORDINARY, given.runs))
        return
    runs = planted(given.seeds)
    print(planted_table(runs))
    if given.plot is not None:
        draw(runs, given.plot)


if __name__ == "__main__":
    main()
