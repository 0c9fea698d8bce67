"""Which 8-bit codes should hold AdamW's moments: each candidate beside float32, on the same gradients.

    python -m benchmarks.codes                  # all tables, some eight minutes on one core
    python -m benchmarks.codes --only synthetic --steps 1000

A block of B values keeps its largest magnitude s as a float32 scale; a value is sign · s · level, the level one of
128 (m, with a sign) or 256 (v) in [0, 1]. A code map is nothing but these levels. Rounding is stochastic with 16 bits,
unbiased in the value; a positive v never gets level 0.

The comparison is an open loop: float32 AdamW trains, and each candidate keeps its own moments by the recursion
m ← Q(β1 m + (1 − β1) g), v ← Q(β2 v + (1 − β2) g²) from the same gradients. What is compared is the update
u = m̂ / (√v̂ + ε), so an error counts by what it does to a step.

Columns of the tables: error, |u' − u| / |u|; lowest code, the share of v there, which is lifted and makes steps too
small; bias and spread, mean and standard deviation of log(√v' / √v); worst 1 %, what |u'| / |u| exceeds in one
hundredth of |u|; peak, max |u'| / max |u|; drift, of v over time where it is well above its lowest code; decay, of v
over 2,000 steps without gradients, against exact; decay, half, the same where half of a block goes on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from examples import train_gpt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lucid.engine.codecs import decode_unsigned

from .tables import markdown_table

BETA1 = 0.9
BLOCKS = (64, 128, 256)
EXACT = "float32"
RMS = (1e-12, 1e-6, 1.0, 1e6)  # of synthetic gradients
REACH = 16  # below that many times its lowest code v is lifted by it now and then
STOPPED = 2000  # steps after the gradients have stopped


def power_levels(count: int, exponent: float) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64) ** exponent


def softsign_levels(count: int, exponent: float) -> Tensor:
    """Levels evenly spaced in 2y / (1 + y), y being x to the 1 / `exponent`."""
    even = torch.linspace(0, 1, count, dtype=torch.float64)
    return (even / (2 - even)) ** exponent


def log_levels(count: int, octaves: int) -> Tensor:
    levels = torch.exp2(torch.linspace(-octaves, 0, count, dtype=torch.float64))
    levels[0] = 0
    return levels


def soft_float_levels(count: int, bits: int, exponent: float = 1) -> Tensor:
    """Levels (z − 1) / (Z − 1), z being the floats ≥ 1 with so many mantissa bits, Z the last of them.

    Near 0 they are even, further out they are those of a float: a code is made by one multiply-add and a shift.
    """
    one = torch.ones((), dtype=torch.float32).view(torch.int32)
    z = (one + (torch.arange(count, dtype=torch.int32) << (23 - bits))).view(torch.float32).double()
    return ((z - 1) / (z[-1] - 1)) ** exponent


M_MAPS = {
    "linear": power_levels(128, 1),
    "square": power_levels(128, 2),
    "cube": power_levels(128, 3),
    "softsign": softsign_levels(128, 1),
    **{f"soft float {bits}": soft_float_levels(128, bits) for bits in (3, 4, 5)},
}


def own_levels() -> Tensor:
    """Return what lucid stores v as, soft float 4 half a step up, and 0, which only a block of zeros is."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    levels = decode_unsigned(codes, torch.ones(1, 2)).flatten()
    return torch.cat([torch.zeros(1), levels / levels[-1]])


V_MAPS = {
    "√v linear": power_levels(256, 2),
    "cube": power_levels(256, 3),
    "4th power": power_levels(256, 4),
    "6th power": power_levels(256, 6),
    "√v softsign": softsign_levels(256, 2),
    **{f"soft float {bits}": soft_float_levels(256, bits) for bits in (3, 4, 5)},
    **{f"√v soft float {bits}": soft_float_levels(256, bits, 2) for bits in (4, 5, 6)},
    "log, 32 octaves": log_levels(256, 32),
    "lucid's": own_levels(),
}


class Pair(NamedTuple):
    """Maps of both moments; `ratio`: what m's holds is m / √v, v as it has just been stored."""

    m: str
    v: str
    ratio: bool = False

    def __str__(self) -> str:
        return f"{self.m}{' of m/√v' if self.ratio else ''}, {self.v}"


PAIRS = [
    *(Pair(m, EXACT) for m in M_MAPS),
    *(Pair(EXACT, v) for v in V_MAPS),
    *(Pair(m, v) for m in ("square", "cube", "soft float 4") for v in ("4th power", "soft float 4")),
    *(Pair("soft float 4", v) for v in ("lucid's", "soft float 3", "√v soft float 5", "√v soft float 6")),
    Pair("soft float 3", "soft float 3"),
    Pair("soft float 5", "soft float 4"),
    Pair("cube", "6th power"),
    Pair("softsign", "√v softsign"),
    *(Pair("softsign", v, ratio=True) for v in ("6th power", "soft float 4", "√v soft float 5")),
    *(Pair(m, "soft float 4", ratio=True) for m in ("soft float 4", "soft float 5")),
]


class Rounding:
    """Stochastic rounding of the last dimension, a block, to levels times its largest magnitude."""

    def __init__(self, levels: Tensor, lifts: bool) -> None:
        self.low = levels.float()
        self.high = torch.cat([self.low[1:], torch.tensor([math.inf])])
        self.per_gap = 1 / (self.high - self.low)
        self.lifts = lifts  # a positive value never gets level 0
        # The last level at or below each float of 10 mantissa bits: from there it is one level up at most.
        floats = (torch.arange((127 << 10) + 1, dtype=torch.int32) << 13).view(torch.float32)
        self.first = torch.bucketize(floats, self.low, right=True, out_int32=True) - 1
        if (self.first.diff() > 1).any():
            raise ValueError("levels closer than 10 mantissa bits tell apart")

    def __call__(self, values: Tensor, dice: Tensor) -> Tensor:
        """Round (blocks, B) `values` by `dice` of the same shape, uniform in (0, 1)."""
        scale = values.abs().amax(-1, keepdim=True)
        x = (values.abs() / scale.clamp_min(torch.finfo().tiny)).flatten()
        code = self.first.index_select(0, x.view(torch.int32) >> 13)
        code += x >= self.high.index_select(0, code)
        low, per_gap = self.low.index_select(0, code), self.per_gap.index_select(0, code)
        up = dice.flatten() < (x - low) * per_gap
        level = torch.where(up, self.high.index_select(0, code), low)
        if self.lifts:
            level = torch.where(x > 0, level.clamp_min(self.low[1]), level)
        return (level.view_as(values) * scale).copysign(values)


class Layout:
    """How flat values lie in blocks of B: along each row, the last block of a row filled up with zeros."""

    def __init__(self, rows: Sequence[int], block: int) -> None:
        """Take the length of each row."""
        slots = [torch.arange(-(-row // block) * block) < row for row in rows]
        self.real = torch.cat(slots).view(-1, block)

    def blocks(self, flat: Tensor) -> Tensor:
        return flat.new_zeros(self.real.shape).masked_scatter_(self.real, flat)

    def flat(self, blocks: Tensor) -> Tensor:
        return blocks[self.real]


class Figures(NamedTuple):
    """A candidate beside float32."""

    error: float  # |u' − u| / |u|
    bias: float  # mean of log(√v' / √v)
    spread: float  # standard deviation of the same
    worst: float  # |u'| / |u|, exceeded by 1 % of all, weighted by |u|
    peak: float  # largest |u'| / largest |u|
    lowest: float  # share of positive v at the lowest code
    drift: float = (
        math.nan
    )  # mean of (time average of v') / (that of v), less 1, where v is REACH times the lowest code
    decay: float = math.nan  # after the gradients have stopped everywhere: v' / (what is exact), less 1
    partly: float = math.nan  # after they have stopped for half of each block

    @staticmethod
    def mean(each: Sequence[Figures]) -> Figures:
        return Figures(*(sum(column) / len(each) for column in zip(*each, strict=True)))

    @staticmethod
    def largest(each: Sequence[Figures]) -> Figures:
        return Figures(*(max(column, key=abs) for column in zip(*each, strict=True)))


class State(NamedTuple):
    """The name of one stored moment; β2 is 0 for an m that no v goes into, else `unit` is the map of that v."""

    moment: str
    beta2: float
    map: str
    block: int
    unit: str = ""


Study = dict[tuple[float, Pair, int], Figures]  # by β2, maps, block


def states_of(pair: Pair, beta2: float, block: int) -> tuple[State, State]:
    """What a pair stores of m and of v."""
    unit = pair.v if pair.ratio else ""
    return State("m", beta2 if unit else 0.0, pair.m, block, unit), State("v", beta2, pair.v, block)


class Moments:
    """Every candidate's moments of the same gradients."""

    def __init__(self, rows: Sequence[int], betas: Sequence[float], eps: float, blocks: Sequence[int]) -> None:
        self.betas, self.eps, self.blocks, self.step = betas, eps, blocks, 0
        self.layouts = {block: Layout(rows, block) for block in blocks}
        self.exact = {key: torch.zeros(sum(rows)) for key in (("m", 0.0), *(("v", beta2) for beta2 in betas))}
        self.roundings = {("m", name): Rounding(levels, False) for name, levels in M_MAPS.items()}
        self.roundings |= {("v", name): Rounding(levels, True) for name, levels in V_MAPS.items()}
        states = [
            state for block in blocks for beta in betas for pair in PAIRS for state in states_of(pair, beta, block)
        ]
        states.sort(key=lambda state: state.moment, reverse=True)  # v before the m that takes it for a unit
        self.stored = {s: self.layouts[s.block].blocks(torch.zeros(sum(rows))) for s in states if s.map != EXACT}
        self.generator = torch.Generator().manual_seed(0)

    def advance(self, gradient: Tensor) -> None:
        """Take in a step's flat gradient."""
        self.step += 1
        inputs = {"m": gradient, "v": gradient.square()}
        for (moment, beta2), values in self.exact.items():
            beta = BETA1 if moment == "m" else beta2
            values.mul_(beta).add_(inputs[moment], alpha=1 - beta)
        taken = {(kind, block): self.layouts[block].blocks(inputs[kind]) for kind in inputs for block in self.blocks}
        # The same dice for all maps: they differ by their levels, not by luck.
        dice = {
            key: (torch.randint(1 << 16, values.shape, generator=self.generator) + 0.5) / (1 << 16)
            for key, values in taken.items()
        }
        for state, values in self.stored.items():
            key, beta = (state.moment, state.block), BETA1 if state.moment == "m" else state.beta2
            mean, rounding = values * beta + taken[key] * (1 - beta), self.roundings[state.moment, state.map]
            if state.unit:
                unit = self.stored[State("v", state.beta2, state.unit, state.block)].sqrt()
                self.stored[state] = rounding((mean / unit).nan_to_num_(0), dice[key]) * unit
            else:
                self.stored[state] = rounding(mean, dice[key])

    def flat(self, state: State) -> Tensor:
        """A candidate's or float32's moment in the gradient's order."""
        if state.map == EXACT:
            return self.exact[state.moment, state.beta2]
        return self.layouts[state.block].flat(self.stored[state])

    def update(self, m: Tensor, v: Tensor, beta2: float) -> Tensor:
        m_hat, v_hat = m / (1 - BETA1**self.step), v / (1 - beta2**self.step)
        return m_hat / (v_hat.sqrt() + self.eps)

    def compare(self, part: slice) -> Study:
        """Figures of every pair of maps, over a part of the entries."""
        figures = {}
        for beta2 in self.betas:
            m, v = self.exact["m", 0.0][part], self.exact["v", beta2][part]
            u, seen = self.update(m, v, beta2), v > 0
            for block in self.blocks:
                for pair in PAIRS:
                    for_m, for_v = states_of(pair, beta2, block)
                    own_m, own_v = self.flat(for_m)[part], self.flat(for_v)[part]
                    own_u = self.update(own_m, own_v, beta2)
                    log = (own_v[seen].log() - v[seen].log()) / 2
                    figures[beta2, pair, block] = Figures(
                        ((own_u - u).norm() / u.norm()).item(),
                        log.mean().item(),
                        log.std().item(),
                        weighted_quantile((own_u / u).abs()[u != 0], u.abs()[u != 0], 0.99),
                        (own_u.abs().max() / u.abs().max()).item(),
                        self.lowest(for_v)[part][seen].float().mean().item(),
                    )
        return figures

    def lowest(self, state: State) -> Tensor:
        """Where v lies at its lowest code."""
        if state.map == EXACT:
            return torch.zeros_like(self.exact["v", state.beta2], dtype=torch.bool)
        values = self.stored[state]
        threshold = self.roundings["v", state.map].low[1] * values.amax(-1, keepdim=True)
        return self.layouts[state.block].flat(values <= threshold)

    def in_reach(self, v: Tensor, state: State) -> Tensor:
        """Where flat float32 v lies well above the lowest code."""
        if state.map == EXACT:
            return torch.ones_like(v, dtype=torch.bool)
        layout = self.layouts[state.block]
        values = layout.blocks(v)
        lowest = self.roundings["v", state.map].low[1] * values.amax(-1, keepdim=True)
        return layout.flat(values >= REACH * lowest)


def weighted_quantile(values: Tensor, weights: Tensor, share: float) -> float:
    values, order = values.sort()
    total = weights[order].double().cumsum(0)
    return values[torch.searchsorted(total, share * total[-1])].item()


def spaced(rows: Tensor, count: int = 24) -> Tensor:
    """So many rows of a matrix, evenly spaced."""
    return rows.flatten(1)[:: max(1, len(rows) // count)][:count]


def gpt_gradients(steps: int) -> Iterator[list[Tensor]]:
    """Train the example's GPT; yield rows of some of its gradients at each step."""
    run = train_gpt.Run(train_gpt.Config(steps=steps, width=256, heads=8, layers=2), train_gpt.Corpus())
    model = run.model
    first, last = model.blocks[0], model.blocks[-1]
    assert isinstance(first, train_gpt.Block)
    assert isinstance(last, train_gpt.Block)
    layers = first.query_key_value, last.attention_out, first.mlp_in, last.mlp_out
    chosen = [model.token.weight, model.position, *(layer.weight for layer in layers)]
    for _ in range(steps):
        run.advance()
        yield [spaced(p.grad) for p in chosen if p.grad is not None]


def digits_gradients(steps: int) -> Iterator[list[Tensor]]:
    """Train a small ConvNet on scikit-learn's digits; yield rows of its large gradients at each step."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images / 16).float()[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    wide, wider, head = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Linear(1024, 10)
    body = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), nn.MaxPool2d(2), wider, nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield [spaced(layer.weight.grad, 16) for layer in (wide, wider, head) if layer.weight.grad is not None]


def real(name: str, gradients: Iterator[list[Tensor]], steps: int, options: Options) -> Study:
    """Compare on a training run's gradients, every so many steps."""
    moments, compared = None, []
    for rows in tqdm(gradients, name, steps, disable=None):
        if moments is None:
            lengths = [len(row) for matrix in rows for row in matrix]
            moments = Moments(lengths, (0.99, 0.999), 1e-8, options.blocks)
        moments.advance(torch.cat([matrix.flatten() for matrix in rows]))
        if moments.step % options.every == 0:
            compared.append(moments.compare(slice(None)))
    return {key: Figures.mean([figures[key] for figures in compared]) for key in compared[0]}


def synthetic(options: Options) -> dict[str, Study]:
    """Compare on stationary normal gradients of every rms, alike in all columns and spread over 4 decades.

    Then the gradients stop: in half of the rows everywhere, in the others for every second column. Returned is, for
    both spreads, the largest of each figure over every rms.
    """
    rows, columns = options.rows, 512
    generator = torch.Generator().manual_seed(1)
    scales = []
    for decades in (0, 4):
        column = 10 ** (decades * (torch.rand(rows, columns, generator=generator) - 0.5))
        scales += [rms * column / column.square().mean().sqrt() for rms in RMS]
    sigma = torch.cat(scales).flatten()
    part = rows * columns
    parts = {
        f"{spread}, rms {rms:g}": slice(i * part, (i + 1) * part)
        for i, (spread, rms) in enumerate((spread, rms) for spread in ("alike", "spread") for rms in RMS)
    }
    moments = Moments([columns] * (len(sigma) // columns), (0.999,), 1e-30, options.blocks)
    compared: dict[str, list[Study]] = {name: [] for name in parts}
    totals: dict[State, Tensor] = {}
    states = [state for state in moments.stored if state.moment == "v"]
    states += [State("v", 0.999, EXACT, block) for block in options.blocks]
    for step in tqdm(range(options.steps), "stationary", disable=None):
        moments.advance(sigma * torch.randn(len(sigma), generator=generator))
        if step >= options.steps // 2 and (step + 1) % 20 == 0:
            for state in states:
                totals[state] = totals.get(state, 0) + moments.flat(state).double()
        if (step + 1) % (options.steps // 4) == 0:
            for name, where in parts.items():
                compared[name].append(moments.compare(where))

    before = {state: moments.flat(state).double() for state in states}
    half = torch.arange(len(sigma)) % columns % 2 == 1
    whole = torch.arange(len(sigma)) // columns % 2 == 1
    active = sigma * ~(half | whole)
    for _ in tqdm(range(STOPPED), "stopped", disable=None):
        moments.advance(active * torch.randn(len(sigma), generator=generator))

    studies: dict[str, Study] = {}
    for name, where in parts.items():
        inside = torch.zeros(len(sigma), dtype=torch.bool)
        inside[where] = True
        studies[name] = {}
        for key in compared[name][0]:
            beta2, pair, block = key
            state, exact = State("v", beta2, pair.v, block), State("v", beta2, EXACT, block)
            left = moments.flat(state).double() / (before[state] * beta2**STOPPED)
            in_reach = inside & moments.in_reach(totals[exact], state)
            studies[name][key] = Figures.mean([figures[key] for figures in compared[name]])._replace(
                drift=(totals[state] / totals[exact])[in_reach].mean().item() - 1,
                decay=left[inside & whole].mean().item() - 1,
                partly=left[inside & half & ~whole].mean().item() - 1,
            )
    return {
        spread: {
            key: Figures.largest([study[key] for name, study in studies.items() if name.startswith(spread)])
            for key in next(iter(studies.values()))
        }
        for spread in ("alike", "spread")
    }


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    steps: int
    every: int
    rows: int
    blocks: tuple[int, ...]


def report(title: str, study: Study) -> str:
    """One table for each β2, a row for each pair of maps: two figures at each block, the others at the middle one."""
    text = ""
    blocks = sorted({block for _, _, block in study})
    middle = blocks[len(blocks) // 2]
    header = ["m, v", *(f"error, {block}" for block in blocks), *(f"lowest code, {block}" for block in blocks)]
    header += ["bias", "spread", "worst 1 %", "peak"]
    stationary = not math.isnan(next(iter(study.values())).drift)
    header += ["drift", "decay", "decay, half"] if stationary else []
    for beta2 in sorted({key[0] for key in study}):
        rows = []
        for pair in PAIRS:
            figures = study[beta2, pair, middle]
            row = [f"{pair}", *(f"{study[beta2, pair, block].error:.1%}" for block in blocks)]
            row += [f"{study[beta2, pair, block].lowest:.1%}" for block in blocks]
            row += [f"{figures.bias:+.1%}", f"{figures.spread:.1%}", f"{figures.worst:.2f}", f"{figures.peak:.2f}"]
            if stationary:
                row += [f"{figures.drift:+.2%}", f"{figures.decay:+.2%}", f"{figures.partly:+.1%}"]
            rows.append(row)
        text += (
            f"\n### {title}, β2 {beta2} (bias and all that follows: block {middle})\n\n{markdown_table(header, rows)}\n"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=("gpt", "digits", "synthetic"), help="one of the three studies")
    parser.add_argument(
        "--steps", type=int, default=2500, help="stationary steps; a real run takes a fifth (%(default)s)"
    )
    parser.add_argument("--every", type=int, default=50, help="steps of a real run between comparisons (%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="synthetic rows of 512 for each rms (%(default)s)")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="block sizes (64 128 256)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    read = parser.parse_args(arguments)
    if read.steps < 40:
        parser.error(f"--steps must be at least 40, got {read.steps}")
    torch.set_num_threads(read.threads)
    options = Options(read.steps, read.every, read.rows, tuple(read.blocks))
    steps = max(options.every, options.steps // 5)
    if read.only in (None, "gpt"):
        print(report("A small GPT", real("GPT", gpt_gradients(steps), steps, options)), flush=True)
    if read.only in (None, "digits"):
        print(report("A ConvNet on digits", real("digits", digits_gradients(steps), steps, options)), flush=True)
    if read.only in (None, "synthetic"):
        for name, study in synthetic(options).items():
            title = {"alike": "all columns alike", "spread": "columns spread over 4 decades"}[name]
            print(report(f"Normal gradients, {title}, worst of rms 1e-12 ... 1e6", study), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
