"""Train a small GPT on Python's own language reference, with `lucid.optim.AdamW`.

    python examples/train_gpt.py                    # about a minute and a half on 2 cores
    python examples/train_gpt.py --optimizer torch  # the same run with torch.optim.AdamW
    python examples/train_gpt.py --compare          # lucid, torch and torch fused side by side

The text is `pydoc_data.topics`, which every Python carries; the model reads and writes single
characters. Every tenth topic is kept out of training, whole, and gives the held-out loss.

A run writes `checkpoint.pt`, `loss.json`, `loss.png` and `sample.txt` into `--out`, a comparison
`compare.json` and `compare.png`. Ctrl-C saves a checkpoint at the last whole step. `--resume`
continues from it to the very bits that an uninterrupted run ends with: all that a step depends on
is in the checkpoint or follows from the seed and the number of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import lucid.optim as optim

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every rare character
EVERY = 100  # steps between two held-out losses, and between two checkpoints


@dataclass(frozen=True, slots=True)
class Config:
    """All that the result depends on, but for the text."""

    optimizer: str = "lucid"
    steps: int = 1000
    seed: int = 0
    lr: float = 2e-3  # at its peak
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup: float = 0.05  # of the steps
    max_grad_norm: float = 1.0
    batch: int = 8  # windows a step
    context: int = 128  # characters a window
    width: int = 160
    heads: int = 5
    layers: int = 4


class Corpus:
    """The text as codes of characters: 1-d int64 tensors `train` and `held_out`."""

    def __init__(self) -> None:
        names = sorted(topics)
        train = "\n\n".join(topics[name] for i, name in enumerate(names) if i % 10 != 5)
        held_out = "\n\n".join(topics[name] for i, name in enumerate(names) if i % 10 == 5)
        frequent = {char for char, count in Counter(train).items() if count >= 20}
        self.vocabulary = "".join(sorted(frequent | {UNKNOWN}))
        self.train, self.held_out = self.encode(train), self.encode(held_out)
        self.digest = hashlib.sha256((train + held_out).encode()).hexdigest()[:12]

    def encode(self, text: str) -> Tensor:
        codes = {char: code for code, char in enumerate(self.vocabulary)}
        return torch.tensor([codes.get(char, codes[UNKNOWN]) for char in text])

    def batch(self, config: Config, step: int) -> tuple[Tensor, Tensor]:
        """Draw the (batch, context) inputs and targets of a step from the seed and its number."""
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        last = len(self.train) - config.context
        starts = torch.randint(last, (config.batch, 1), generator=generator)
        windows = self.train[starts + torch.arange(config.context + 1)]
        return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Causal self-attention, then an MLP; each reads a normed copy and adds to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3 * self.heads, -1))
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)  # (batch, heads, context, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Codes in, scores of the next character out; the token embedding is the head as well."""

    def __init__(self, config: Config, vocabulary_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary_size, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = 2 * config.layers if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=0.05 / math.sqrt(depth))
        # Sinusoids to start from: attention then finds its neighbours in half as many steps.
        frequency = 1000.0 ** -torch.arange(0, 1, 2 / config.width)
        angle = torch.arange(config.context)[:, None] * frequency
        self.position.weight.data = 0.1 * torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.token(codes) + self.position.weight[: codes.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def cross_entropy(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats a character."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: GPT, corpus: Corpus, config: Config) -> float:
    """Return the loss over all of the held-out text, cut into windows side by side."""
    count = (len(corpus.held_out) - 1) // config.context
    inputs = corpus.held_out[: count * config.context].view(count, -1).split(config.batch)
    targets = corpus.held_out[1 : count * config.context + 1].view(count, -1).split(config.batch)
    batches = zip(inputs, targets, strict=True)
    return sum(len(x) * cross_entropy(model, x, y).item() for x, y in batches) / count


@torch.no_grad()
def sample(model: GPT, corpus: Corpus, config: Config, length: int = 600) -> str:
    """Continue a prompt by `length` characters, each drawn from the model's own prediction."""
    generator = torch.Generator().manual_seed(config.seed)
    codes = corpus.encode("The ")[None]
    for _ in range(length):
        scores = model(codes[:, -config.context :])[:, -1] / 0.7  # sharpened: fewer slips
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        codes = torch.cat([codes, drawn], dim=1)
    return "".join(corpus.vocabulary[code] for code in codes[0].tolist())


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Let matrices decay, and biases and the gains of norms not."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "lucid":
        return optim.AdamW(groups, lr=config.lr, betas=config.betas)
    fused = True if config.optimizer == "torch-fused" else None  # None: as torch chooses
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def lr_factor(step: int, config: Config) -> float:
    """Rise linearly over the warm-up, then fall along a cosine to a tenth at the last step."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup))


@dataclass(slots=True)
class History:
    """The losses of a run; equal bits for an equal Config."""

    train: list[float] = field(default_factory=list)  # of every step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)

    def smoothed(self, step: int) -> float:
        """Return the mean training loss of the 50 steps up to `step`: one batch is too noisy."""
        return statistics.fmean(self.train[max(0, step - 50) : step])


class Run:
    """A model in training: what a checkpoint holds, and how long the steps done here took."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.config, self.corpus = config, corpus
        torch.manual_seed(config.seed)
        self.model = GPT(config, len(corpus.vocabulary))
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, config)
        )
        self.history = History()
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    @property
    def step(self) -> int:
        """The number of steps done, those before a resume included."""
        return len(self.history.train)

    def advance(self) -> None:
        """Do one step, and at times a held-out loss, which is not timed."""
        inputs, targets = self.corpus.batch(self.config, self.step)
        started = time.perf_counter()
        loss = cross_entropy(self.model, inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        updating = time.perf_counter()
        self.optimizer.step()
        updated = time.perf_counter()
        self.schedule.step()
        self.history.train.append(loss.item())
        self.optimizer_seconds.append(updated - updating)
        self.step_seconds.append(time.perf_counter() - started)
        if self.step % EVERY == 0 or self.step == self.config.steps:
            held_out = held_out_loss(self.model, self.corpus, self.config)
            self.history.held_out.append((self.step, held_out))

    def losses(self) -> str:
        held_out = f"{self.history.held_out[-1][1]:.3f}" if self.history.held_out else "-"
        return f"train {self.history.smoothed(self.step):.3f}, held-out {held_out}"

    def milliseconds(self) -> tuple[float, float]:
        """Return the medians of a whole step and of the optimizer's step."""
        seconds = (self.step_seconds, self.optimizer_seconds)
        step, update = (1e3 * statistics.median(each) for each in seconds)
        return step, update

    def share(self) -> float:
        """Return the part of the steps' time that was spent in the optimizer."""
        return sum(self.optimizer_seconds) / sum(self.step_seconds)

    def identity(self) -> dict[str, Any]:
        return asdict(self.config) | {"text": self.corpus.digest}

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all: a crash leaves the previous one in place."""
        unfinished = path.with_suffix(".tmp")
        checkpoint = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": asdict(self.history),
        }
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint, or raise ValueError if it is another run's."""
        checkpoint = torch.load(path, weights_only=True)
        for name, value in self.identity().items():
            if (saved := checkpoint["identity"].get(name)) != value:
                raise ValueError(f"{path} was made with {name} {saved!r}, not {value!r}")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.history = History(**checkpoint["history"])


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """Let Ctrl-C set a flag, so that it cuts no step in half; a second one acts at once."""
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def train(runs: Sequence[Run], last: int, checkpoint: Path | None) -> bool:
    """Advance the runs to step `last`; False if Ctrl-C came first. Only one run checkpoints.

    Runs that are compared take turns, so that whatever else the machine does slows them alike.
    """
    first = runs[0]
    with (
        interrupt_between_steps() as interrupted,
        tqdm(total=first.config.steps, initial=first.step, disable=None, unit="step") as bar,
    ):
        while first.step < last and not interrupted.is_set():
            for run in runs:
                run.advance()
            tokens = first.config.batch * first.config.context / first.step_seconds[-1]
            bar.set_postfix_str(
                f"loss {first.history.smoothed(first.step):.3f}, {tokens:,.0f} tokens/s, "
                f"optimizer {first.share():.1%}",
                refresh=False,
            )
            bar.update()
            if first.step % EVERY == 0 or first.step == first.config.steps:
                losses = (f"{run.config.optimizer}: {run.losses()}" for run in runs)
                bar.write(f"step {first.step:>5}   " + "   ".join(losses))
                sys.stdout.flush()
            if checkpoint and first.step % EVERY == 0:
                first.save(checkpoint)
        if checkpoint:
            first.save(checkpoint)
    return not interrupted.is_set()


def save_curves(runs: Sequence[Run], stem: Path) -> None:
    """Write the losses as numbers and as a picture; where runs agree, thin lines lie on thick."""
    histories = {run.config.optimizer: asdict(run.history) for run in runs}
    stem.with_suffix(".json").write_text(json.dumps(histories))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for run, width, color in zip(runs, (5, 2.5, 1), ("#f4b942", "#2a6f97", "#222222")):
        name, steps = run.config.optimizer, range(1, run.step + 1)
        smoothed = [run.history.smoothed(step) for step in steps]
        axes.plot(steps, smoothed, color=color, linewidth=width, label=f"{name}, train")
        at, held_out = zip(*run.history.held_out, strict=True)
        axes.plot(at, held_out, "o--", color=color, markersize=3 + width, label=f"{name}, held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a character)")
    axes.set_title("A small GPT on Python's language reference (train: mean of 50 steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(stem.with_suffix(".png"))


def comparison(runs: Sequence[Run]) -> str:
    """Lay out one column for each run, lucid's first."""
    step, update = zip(*(run.milliseconds() for run in runs), strict=True)
    rows = {
        "": [run.config.optimizer for run in runs],
        "final train loss": [f"{run.history.smoothed(run.step):.4f}" for run in runs],
        "final held-out loss": [f"{run.history.held_out[-1][1]:.4f}" for run in runs],
        "whole step, ms": [f"{ms:.1f}" for ms in step],
        "optimizer step, ms": [f"{ms:.2f}" for ms in update],
        "optimizer's share": [f"{run.share():.1%}" for run in runs],
        "optimizer, times lucid's": [f"{ms / update[0]:.2f}" for ms in update],
    }
    return "\n".join(f"{name:<26}" + "".join(f"{x:>13}" for x in row) for name, row in rows.items())


def whole_number(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isdecimal() and low <= int(text) < 2**31:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} on, got {text!r}")

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    optimizers = ("lucid", "torch", "torch-fused")
    default = Config()
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own reference.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=optimizers, default=default.optimizer)
    which.add_argument("--compare", action="store_true", help="train with each, side by side")
    parser.add_argument("--steps", type=whole_number(1), default=default.steps)
    parser.add_argument("--seed", type=whole_number(0), default=default.seed)
    parser.add_argument("--stop-after", type=whole_number(1), metavar="STEP", help="as Ctrl-C does")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"), help="folder to fill")
    options = parser.parse_args(arguments)
    if options.compare and (options.resume or options.stop_after):
        parser.error("--compare runs from start to end: drop --resume and --stop-after")
    config = Config(options.optimizer, options.steps, options.seed)
    out, checkpoint = options.out, options.out / "checkpoint.pt"
    if options.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no {checkpoint}; start once without --resume")

    corpus = Corpus()
    names = optimizers if options.compare else [config.optimizer]
    runs = [Run(replace(config, optimizer=name), corpus) for name in names]
    run = runs[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if options.resume:
            run.load(checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f"{error}")
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{parameters:,} parameters, {len(corpus.vocabulary)} symbols, "
        f"{len(corpus.train):,} characters to train on, {len(corpus.held_out):,} held out"
    )
    last = min(config.steps, options.stop_after or config.steps)
    finished = train(runs, last, None if options.compare else checkpoint)
    if options.compare:
        if not finished:
            print("stopped: an unfinished comparison saves nothing")
            return 130
        save_curves(runs, out / "compare")
        print(f"
{comparison(runs)}

written to {out}: compare.json, compare.png")
        return 0
    if run.step < config.steps:
        print(f"saved {checkpoint} at step {run.step}: the same command with --resume goes on")
        return 0 if finished else 130
    text = sample(run.model, corpus, config)
    (out / "sample.txt").write_text(text, encoding="utf-8")
    save_curves(runs, out / "loss")
    print(f"\n{text}\n\nfinal loss in nats a character: {run.losses()}")
    if run.step_seconds:  # none where a finished run was resumed
        step, update = run.milliseconds()
        print(
            f"median step {step:.1f} ms: {step - update:.1f} forward, backward and clipping, "
            f"{update:.2f} optimizer; its share of all time {run.share():.1%}"
        )
    print(f"written to {out}: checkpoint.pt, loss.json, loss.png, sample.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
