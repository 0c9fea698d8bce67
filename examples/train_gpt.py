"""Train a small GPT on Python's own language reference, with `lucid.optim.AdamW`.

    python examples/train_gpt.py                    # about a minute and a half on 2 cores
    python examples/train_gpt.py --optimizer torch  # the same run with torch.optim.AdamW
    python examples/train_gpt.py --compare          # lucid, torch and torch fused side by side
    python examples/train_gpt.py --state 8bit --dtype bf16  # 8 bytes per parameter instead of 16
    python examples/train_gpt.py --plot-statistics          # plots how much each layer moves

The text is `pydoc_data.topics`, which comes with every Python. The model reads and writes single
characters. Every tenth topic is held out of training and gives the held-out loss.

A run writes `checkpoint.pt`, `loss.png` and `sample.txt` into `--out`, and `statistics.png` with
`--plot-statistics`. A comparison writes `compare.png`.
Ctrl-C saves a checkpoint after the current step. `--resume` continues from it and ends with the same
bits as an uninterrupted run: everything that a step depends on is in the checkpoint, or follows from
the seed and the number of the step.
"""

import argparse
import hashlib
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import lucid.optim as optim

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVERY = 100  # steps between two held-out losses, and between two checkpoints


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the result depends on, except the text."""

    optimizer: str = "lucid"
    steps: int = 900
    seed: int = 0
    lr: float = 2e-3  # peak of the schedule
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup: float = 0.05  # part of the steps
    max_grad_norm: float = 1.0
    batch: int = 8  # windows per step
    context: int = 128  # characters per window
    width: int = 160
    heads: int = 5
    layers: int = 4
    state: Literal["fp32", "bf16", "8bit"] = "fp32"  # format of lucid's moments
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and gradients


def encode(text: str) -> Tensor:
    """Return ASCII codes; a character without an ASCII equivalent becomes "?"."""
    likenesses = str.maketrans("‘’“”–—", "''\"\"--")
    return torch.tensor(list(text.translate(likenesses).encode("ascii", "replace")))


class Corpus:
    """The text as codes: 1-d int64 tensors `train` and `held_out`. The `digest` identifies the text."""

    def __init__(self) -> None:
        texts = [topics[name] for name in sorted(topics)]
        self.train = encode("\n\n".join(text for i, text in enumerate(texts) if i % 10 != 5))
        self.held_out = encode("\n\n".join(texts[5::10]))
        self.digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:12]

    def batch(self, config: Config, step: int) -> Tensor:
        """Return the (batch, context + 1) codes of a step; they depend on the seed and the step only."""
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        last = len(self.train) - config.context
        starts = torch.randint(last, (config.batch, 1), generator=generator)
        return self.train[starts + torch.arange(config.context + 1)]


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
        mapped: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mapped


class GPT(nn.Module):
    """From codes to logits of the next character; the token embedding is also the output layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token = nn.Embedding(128, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = 2 * config.layers if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=0.05 / math.sqrt(depth))
        # Positions start as sinusoids: attention then learns to find neighbours in half the steps.
        angle = torch.arange(config.context)[:, None] / 1000 ** torch.arange(0, 1, 2 / config.width)
        self.position = nn.Parameter(0.1 * torch.cat([angle.sin(), angle.cos()], dim=1))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.token(codes) + self.position[: codes.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def cross_entropy(model: GPT, codes: Tensor) -> Tensor:
    """Return the mean loss, in nats per character, of predicting each code from those before it."""
    scores: Tensor = model(codes[:, :-1])
    return F.cross_entropy(scores.float().flatten(0, 1), codes[:, 1:].flatten())


@torch.no_grad()
def sample(model: GPT, config: Config, length: int = 600) -> str:
    """Continue a prompt by `length` characters, each sampled from the model's prediction."""
    generator = torch.Generator().manual_seed(config.seed)
    codes = encode("When a ")[None]
    for _ in range(length):
        scores = model(codes[:, -config.context :])[:, -1].float() / 0.7  # sharpened: fewer slips
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        codes = torch.cat([codes, drawn], dim=1)
    return bytes(codes[0].tolist()).decode()


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Decay matrices, but not biases and gains of norms. lucid's step also clips the gradient norm."""
    groups = optim.decay_groups(model, config.weight_decay)
    if config.optimizer == "lucid":
        return optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            state_format=config.state,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        )
    fused = True if config.optimizer == "torch-fused" else None  # None: torch chooses
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def lr_factor(step: int, config: Config) -> float:
    """Rise linearly during the warm-up, then fall along a cosine to a tenth at the last step."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup))


class Run:
    """A model in training: what a checkpoint holds, and the times of the steps of this process."""

    def __init__(self, config: Config, corpus: Corpus, observed: bool = False) -> None:
        self.config, self.corpus, self.observed = config, corpus, observed
        self.identity = asdict(config) | {"text": corpus.digest}
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(DTYPES[config.dtype])
        self.optimizer = make_optimizer(self.model, config)
        if isinstance(self.optimizer, optim.AdamW):
            self.optimizer.observe(observed)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.losses: list[float] = []  # of every step, in nats per character
        self.held_out: list[tuple[int, float]] = []  # (steps done, loss)
        self.seconds: list[tuple[float, float]] = []  # (whole step, clipping and optimizer's step)
        self.ratios: dict[int, dict[str, float]] = {}  # after a step: update over weight, by parameter

    @property
    def step(self) -> int:
        """The number of steps done, including those before a resume."""
        return len(self.losses)

    def advance(self) -> None:
        """Do one training step."""
        codes = self.corpus.batch(self.config, self.step)
        started = time.perf_counter()
        loss = cross_entropy(self.model, codes)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        updating = time.perf_counter()
        if self.config.optimizer != "lucid":
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        updated = time.perf_counter()
        self.schedule.step()
        self.losses.append(loss.item())
        if self.observed:
            assert isinstance(self.optimizer, optim.AdamW)
            found = self.optimizer.statistics()
            ending = "/update_ratio"
            self.ratios[self.step] = {k.removesuffix(ending): v for k, v in found.items() if k.endswith(ending)}
        self.seconds.append((time.perf_counter() - started, updated - updating))

    @torch.no_grad()
    def evaluate(self) -> None:
        """Compute the loss over the whole held-out text, in consecutive windows."""
        context = self.config.context
        windows = self.corpus.held_out.unfold(0, context + 1, context)
        batches = torch.split(windows, self.config.batch)
        losses = [len(batch) * cross_entropy(self.model, batch).item() for batch in batches]
        self.held_out.append((self.step, sum(losses) / len(windows)))

    def smoothed_loss(self, step: int) -> float:
        """Return the mean training loss of the 50 steps up to `step`: one batch is too noisy."""
        return statistics.fmean(self.losses[max(0, step - 50) : step])

    def milliseconds(self) -> tuple[float, float]:
        """Return the medians of a whole step and of the optimizer step; NaN if this process did none."""
        seconds = self.seconds or [(math.nan, math.nan)]
        step, update = (1e3 * statistics.median(each) for each in zip(*seconds, strict=True))
        return step, update

    def bytes_a_parameter(self) -> dict[str, float]:
        """Return the bytes per parameter of weights, gradients and optimizer state, from their tensors."""
        weights: list[Tensor] = list(self.model.parameters())
        tensors = {
            "weights": weights,
            "gradients": [weight.grad for weight in weights if weight.grad is not None],
            "state": [value for entry in self.optimizer.state.values() for value in entry.values()],
        }
        count = sum(weight.numel() for weight in weights)
        return {name: sum(tensor.nbytes for tensor in found) / count for name, found in tensors.items()}

    def save(self, path: Path) -> None:
        """Write a complete checkpoint or none: a crash leaves the previous one in place."""
        unfinished = path.with_suffix(".tmp")
        checkpoint = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "held_out": self.held_out,
        }
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Load a checkpoint, or raise ValueError if it belongs to another run."""
        checkpoint = torch.load(path, weights_only=True)
        for name, value in self.identity.items():
            if (saved := checkpoint["identity"].get(name)) != value:
                raise ValueError(f"{path} was made with {name} {saved!r}, this run has {value!r}")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.losses, self.held_out = checkpoint["losses"], checkpoint["held_out"]


def train(runs: Sequence[Run], last: int, checkpoint: Path | None) -> None:
    """Advance the runs to step `last`, or until Ctrl-C; the first one writes the checkpoints.

    In a comparison the runs take turns, so that other work on the machine slows them equally.
    Ctrl-C takes effect after the current step, so that no step is cut in half.
    """
    first, config = runs[0], runs[0].config
    interrupts: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    bar = tqdm(total=config.steps, initial=first.step, disable=None, unit="step")
    try:
        while first.step < last and not interrupts:
            for run in runs:
                run.advance()
            step, update = first.milliseconds()
            speed = 1e3 * config.batch * config.context / step
            loss = f"loss {first.smoothed_loss(first.step):.3f}, {speed:,.0f} tokens/s"
            bar.set_postfix_str(f"{loss}, optimizer {update / step:.1%}", refresh=False)
            bar.update()
            if first.step % EVERY == 0 or first.step == config.steps:
                line = f"step {first.step:>5}"
                for run in runs:
                    run.evaluate()
                    line += f"   {run.config.optimizer}: train {run.smoothed_loss(run.step):.3f},"
                    line += f" held-out {run.held_out[-1][1]:.3f}"
                bar.write(line)
                sys.stdout.flush()
                if checkpoint:
                    first.save(checkpoint)
        if checkpoint:
            first.save(checkpoint)
    finally:
        signal.signal(signal.SIGINT, previous)
        bar.close()


def summary(runs: Sequence[Run]) -> str:
    """Return a table with one column per run."""
    step, update = zip(*(run.milliseconds() for run in runs), strict=True)
    rows = {
        "": [run.config.optimizer for run in runs],
        "train loss, last 50 steps": [f"{run.smoothed_loss(run.step):.4f}" for run in runs],
        "held-out loss": [f"{run.held_out[-1][1]:.4f}" for run in runs],
        "step, ms (median)": [f"{ms:.1f}" for ms in step],
        "  forward, backward": [f"{s - u:.1f}" for s, u in zip(step, update, strict=True)],
        "  clip and optimizer": [f"{ms:.2f}" for ms in update],
        "optimizer's share": [f"{u / s:.1%}" for s, u in zip(step, update, strict=True)],
    }
    memory = [run.bytes_a_parameter() for run in runs]
    rows["bytes per parameter"] = [f"{sum(each.values()):.2f}" for each in memory]
    rows |= {f"  {name}": [f"{each[name]:.2f}" for each in memory] for name in memory[0]}
    if len(runs) > 1:
        rows["optimizer, against lucid"] = [f"{ms / update[0]:.2f} x" for ms in update]
    return "\n".join(f"{name:<25}" + "".join(f"{x:>13}" for x in row) for name, row in rows.items())


def save_curves(runs: Sequence[Run], path: Path) -> None:
    """Plot training losses as lines and held-out losses as rings; earlier runs are drawn wider."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        name, steps, cover = run.config.optimizer, range(1, run.step + 1), len(runs) - i
        smoothed = [run.smoothed_loss(step) for step in steps]
        axes.plot(steps, smoothed, f"C{i}", linewidth=1.5 * cover, label=f"{name}, train")
        at, held_out = zip(*run.held_out, strict=True)
        axes.plot(at, held_out, f"C{i}o", fillstyle="none", ms=4 + 3 * cover, label=f"{name}, held-out")
    title = "A small GPT on Python's language reference (train: mean of 50 steps)"
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    axes.legend()
    figure.savefig(path)


def save_ratios(run: Run, path: Path) -> None:
    """Plot RMS of the update / RMS of the weights for each matrix and step; deeper layers are darker."""
    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    matrices = [name for name, parameter in run.model.named_parameters() if parameter.ndim == 2]
    kind_of = {name: name.removesuffix(".weight").split(".")[-1] for name in matrices}
    kinds = list(dict.fromkeys(kind_of.values()))
    for name, kind in kind_of.items():
        parts = name.split(".")
        depth = int(parts[1]) if parts[0] == "blocks" else run.config.layers - 1
        steps, values = zip(*((step, found[name]) for step, found in run.ratios.items()), strict=True)
        means = [statistics.fmean(values[max(0, i - 10) : i + 1]) for i in range(len(values))]
        shade = 0.35 + 0.65 * (depth + 1) / run.config.layers
        axes.plot(steps, means, f"C{kinds.index(kind)}", alpha=shade, linewidth=1.2, label=name.removesuffix(".weight"))
    axes.axhline(1e-3, color="grey", linestyle=":", label="1e-3, a rule of thumb")
    title = "How much a step moves each layer (mean of 11 steps)"
    axes.set(xlabel="step", ylabel="RMS of the update / RMS of the weights", yscale="log", title=title)
    figure.legend(loc="outside right center", fontsize="x-small")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    default = Config()
    optimizers = ("lucid", "torch", "torch-fused")
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own reference.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=optimizers, default=default.optimizer)
    which.add_argument("--compare", action="store_true", help="train with all three, side by side")
    parser.add_argument(
        "--state", choices=("fp32", "bf16", "8bit"), default=default.state, help="format of lucid's moments"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=default.dtype, help="dtype of weights and gradients")
    parser.add_argument("--plot-statistics", action="store_true", help="draw each layer's update/weight ratio")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop after this step, as with Ctrl-C")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"), help="output folder")
    options = parser.parse_args(arguments)
    out, checkpoint = options.out, options.out / "checkpoint.pt"
    last = options.steps if options.stop_after is None else min(options.steps, options.stop_after)
    if last < 1:
        parser.error("--steps and --stop-after must be at least 1")
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed must lie in 0 ... 2**31 - 1, got {options.seed}")
    if options.compare and (options.resume or options.stop_after):
        parser.error("--compare runs from start to end: remove --resume and --stop-after")
    if options.plot_statistics and (options.compare or options.optimizer != "lucid"):
        parser.error("--plot-statistics works with lucid only: remove --compare and --optimizer")
    if options.state != "fp32" and options.optimizer != "lucid":
        parser.error(f"--state {options.state} works with lucid only, not with {options.optimizer}: remove one of them")
    if options.resume and not checkpoint.exists():
        parser.error(f"--resume: there is no {checkpoint}; run without --resume first")

    corpus = Corpus()
    config = Config(options.optimizer, options.steps, options.seed, state=options.state, dtype=options.dtype)
    names = optimizers if options.compare else (config.optimizer,)
    runs = [Run(replace(config, optimizer=name), corpus, options.plot_statistics) for name in names]
    run = runs[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if options.resume:
            run.load(checkpoint)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{size:,} parameters, {len(corpus.train):,} characters to learn from", flush=True)
    train(runs, last, None if options.compare else checkpoint)
    if run.step < config.steps:
        way_on = "a comparison cannot resume" if options.compare else "add --resume to continue"
        print(f"stopped after step {run.step} of {config.steps}: {way_on}")
        return 0 if run.step == last else 130
    if not options.compare:
        text = sample(run.model, config)
        (out / "sample.txt").write_text(text, encoding="utf-8")
        print(f"\n{text}\n")
    save_curves(runs, out / ("compare.png" if options.compare else "loss.png"))
    if options.plot_statistics:
        save_ratios(run, out / "statistics.png")
    print(f"{summary(runs)}\nwritten to {out}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
